"""Which model a specification names, on which device and in which precision."""

import difflib

from embedders.base import Embedder, EmbedderError

KINDS = ("dct", "hf", "torchscript")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")


def load_embedder(spec: str, device: str = "auto", precision: str = "auto", threads: int = 1) -> Embedder:
    """The model that `spec` names: "dct", "hf:NAME_OR_DIR" or "torchscript:FILE".

    Args:
        device: "auto", "cpu" or "cuda". `dct` runs on the CPU whatever it says.
        precision: "auto", "float32" or "bfloat16".
        threads: of a torch model on the CPU.

    Raises:
        EmbedderError: unknown kind, missing or unusable weights, no such device; one line that says what to do.
    """
    kind, _, model = spec.partition(":")
    if spec == "dct":
        from embedders.dct import DctEmbedder

        return DctEmbedder()
    if kind == "hf" and model:
        from embedders import hf

        return hf.load(model, *resolve_device(device, precision), threads)
    if kind == "torchscript" and model:
        from embedders import torchscript

        return torchscript.load(model, *resolve_device(device, precision), threads)
    close = difflib.get_close_matches(kind, KINDS, n=1)
    hint = f"; did you mean {close[0]}?" if close and close[0] != kind else ";"
    raise EmbedderError(f"unknown model {spec!r}{hint} models are dct, hf:NAME_OR_DIR and torchscript:FILE")


def resolve_device(device: str, precision: str) -> tuple[str, str]:
    """What was asked for as ("cpu" or "cuda", "float32" or "bfloat16").

    "auto" is the GPU where there is one, and bfloat16 where the device multiplies it fast: GPUs with units for it, CPUs
    with AVX512-BF16 or AMX. torch is imported only where a value is "auto" or "cuda".

    Raises:
        EmbedderError: unknown value, or a GPU was asked for and torch finds none.
    """
    for key, value, known in (("device", device, DEVICES), ("precision", precision, PRECISIONS)):
        if value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"take one of {', '.join(known)}"
            raise EmbedderError(f"unknown {key} {value!r}; {hint}")
    if device != "cpu":
        device = _cuda_or_cpu(required=device == "cuda")
    if precision == "auto":
        precision = "bfloat16" if _multiplies_bfloat16(device) else "float32"
    return device, precision


def _cuda_or_cpu(required: bool) -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if required:
        raise EmbedderError("device cuda: torch finds no GPU here; take device cpu, or install torch for CUDA")
    return "cpu"


def _multiplies_bfloat16(device: str) -> bool:
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
