import pytest
import torch

from embedders.base import EmbedderError
from embedders.dct import DctEmbedder
from embedders.load import load_embedder, resolve_device


def test_dct_needs_nothing() -> None:
    model = load_embedder("dct")
    assert isinstance(model, DctEmbedder) and (model.name, model.dim) == ("dct", 128)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dtc", "did you mean dct?"),
        ("torchscrpt:x.pt", "did you mean torchscript?"),
        ("hf", "hf:NAME_OR_DIR"),
        ("hf:", "hf:NAME_OR_DIR"),
        ("dct:x", "models are dct"),
        ("", "models are dct"),
        ("torchscript:/missing/sscd.pt", "no such file"),
    ],
)
def test_bad_names_are_one_line_that_helps(spec: str, message: str) -> None:
    with pytest.raises(EmbedderError) as caught:
        load_embedder(spec, "cpu", "float32")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_device_and_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_device("cpu", "float32") == ("cpu", "float32")
    assert resolve_device("cpu", "bfloat16") == ("cpu", "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, expected in (({"avx512_bf16": True}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda flags=flags: flags)
        assert resolve_device("auto", "auto") == ("cpu", expected)
    with pytest.raises(EmbedderError, match="no GPU"):
        resolve_device("cuda", "auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_device("auto", "auto") == ("cuda", "bfloat16")
    assert resolve_device("cpu", "float32") == ("cpu", "float32")


@pytest.mark.parametrize(
    ("device", "precision"), [("gpu", "auto"), ("cudda", "auto"), ("cpu", "fp32"), ("cpu", "float3")]
)
def test_unknown_device_or_precision(device: str, precision: str) -> None:
    with pytest.raises(EmbedderError, match=r"unknown (device|precision)"):
        resolve_device(device, precision)
