"""Which model a specification names, and how it is to run."""

import difflib
import os
import shutil
from typing import Literal

from embedders.base import Embedder, EmbedderError, Runtime
from embedders.specs import DINOV2, SSCD, parse_spec

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("auto", "float32", "bfloat16")
COMPILERS = ("g++", "clang++", "c++")
"""Where torch.compile looks for one, after $CXX."""


def load_embedder(spec: str, runtime: Runtime) -> Embedder:
    """The model that `spec` names, by the grammar of `embedders/specs.py`.

    Files are fetched if need be, configurations read and weights hashed; the network itself is opened, on `runtime`, at
    the first `embed`.

    Raises:
        EmbedderError: unknown kind or option, missing or unusable files; one line that says what to do.
    """
    parsed = parse_spec(spec)
    if parsed.kind == "dct":
        from embedders.dct import DctEmbedder

        return DctEmbedder()
    if parsed.kind in DINOV2 or parsed.kind == "vit":
        from embedders import dinov2

        return (dinov2.load_file if parsed.kind == "vit" else dinov2.load_published)(parsed, runtime)
    if parsed.kind in SSCD:
        from embedders import sscd

        return sscd.load(parsed, runtime)
    if parsed.kind == "torchscript":
        from embedders import torchscript

        return torchscript.load(parsed, runtime)
    from embedders import hf

    return hf.load(parsed, runtime)


def resolve_runtime(
    spec: str,
    device: str = "auto",
    precision: str = "auto",
    threads: int = 1,
    compiled: bool | Literal["auto"] = "auto",
) -> Runtime:
    """How the model `spec` is to run, with nothing left open. It is asked once, and the answer given to all workers.

    Args:
        device: "auto" is the GPU where this machine has one. "cuda" is not checked here, since workers may run
            elsewhere.
        precision: "auto" is bfloat16 where the device multiplies it fast: GPUs with units for it, CPUs with AVX512-BF16
            or AMX.
        threads: of torch on the CPU.
        compiled: "auto" compiles networks of `embedders/vit.py` named as such (`dinov2_*`, `vit:`) on a GPU, and on a
            CPU where there is a C++ compiler, which it needs.

    `dct` runs on the CPU, in one thread, whatever is asked for.

    Raises:
        EmbedderError: unknown model, device or precision, or TorchScript is to be compiled.
    """
    kind = parse_spec(spec).kind
    for key, value, known in (("device", device, DEVICES), ("precision", precision, PRECISIONS)):
        if value not in known:
            close = difflib.get_close_matches(value, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"take one of {', '.join(known)}"
            raise EmbedderError(f"unknown {key} {value!r}; {hint}")
    if kind == "dct":
        return Runtime()
    if compiled is True and (kind in SSCD or kind == "torchscript"):
        raise EmbedderError(f"{kind}: compile true, but TorchScript cannot be compiled again; leave it at auto")
    if device == "auto":
        device = "cuda" if _has_gpu() else "cpu"
    if precision == "auto":
        precision = "bfloat16" if _multiplies_bfloat16(device) else "float32"
    if compiled == "auto":
        compiled = (kind in DINOV2 or kind == "vit") and (device == "cuda" or _has_compiler())
    return Runtime(device, precision, threads, compiled)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _multiplies_bfloat16(device: str) -> bool:
    """Of a GPU that is elsewhere it is assumed."""
    import torch

    if device == "cuda":
        return not torch.cuda.is_available() or bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _has_compiler() -> bool:
    named = os.environ.get("CXX", "").split()[:1]
    return any(shutil.which(name) for name in (*named, *COMPILERS))
