import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from embedders import dinov2, hf, load, sscd, torchscript
from embedders.base import Embedder, EmbedderError, Runtime
from embedders.dct import DctEmbedder
from embedders.load import load_embedder, resolve_runtime
from embedders.specs import DINOV2, KINDS, SSCD, Spec
from tests.embedders.images_for_tests import photo, saved


def test_dct_needs_nothing() -> None:
    model: Embedder = load_embedder("dct", Runtime())
    assert isinstance(model, DctEmbedder) and (model.name, model.dim, model.fixed_shape) == ("dct", 128, True)
    assert model.details["model"] == "dct" and json.loads(json.dumps(model.details)) == model.details
    batch = np.stack([model.preprocess(saved(photo(n))) for n in range(2)])
    assert model.upload(batch) is batch and model.embed(model.upload(batch)).shape == (2, 128)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dct"])
def test_every_kind_is_opened_by_its_module(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((dinov2, "load_published"), (dinov2, "load_file"), (sscd, "load"), (torchscript, "load")):
        monkeypatch.setattr(module, name, lambda spec, runtime, place=(module, name): (place, spec, runtime))
    monkeypatch.setattr(hf, "load", lambda spec, runtime: ((hf, "load"), spec, runtime))
    expected = {"vit": (dinov2, "load_file"), "hf": (hf, "load"), "torchscript": (torchscript, "load")}
    expected |= dict.fromkeys(DINOV2, (dinov2, "load_published")) | dict.fromkeys(SSCD, (sscd, "load"))
    place = "x" if KINDS[kind].place else ""
    runtime = Runtime(threads=3)
    found = load_embedder(f"{kind}:x" if place else kind, runtime)
    assert found == (expected[kind], Spec(kind, place, {}), runtime)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("dtc", "did you mean dct?"),
        ("dct:x", "nothing follows dct"),
        ("torchscript:/missing/sscd.pt", "no such file"),
        ("vit:/missing/m.pth", "no such file"),
    ],
)
def test_mistakes_are_one_line_that_helps(spec: str, message: str) -> None:
    with pytest.raises(EmbedderError) as caught:
        load_embedder(spec, Runtime())
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """Without GPU, bfloat16 and C++ compiler."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    return monkeypatch


def with_gpu(machine: pytest.MonkeyPatch, bfloat16: bool = True) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bfloat16 or including_emulation)


def with_compiler(folder: Path, name: str) -> None:
    (folder / name).write_text("#!/bin/sh")
    (folder / name).chmod(0o755)


def test_what_is_asked_for_is_taken(machine: pytest.MonkeyPatch) -> None:
    for device in ("cpu", "cuda"):
        for precision in ("float32", "bfloat16"):
            for compiled in (False, True):
                found = resolve_runtime("vit:x", device, precision, 3, compiled)
                assert found == Runtime(device, precision, 3, compiled)


@pytest.mark.parametrize("flags", [{}, {"avx512_bf16": True}, {"amx_bf16": True}, {"avx512_bf16": False, "avx2": True}])
def test_auto_precision_on_a_cpu_is_what_it_multiplies_fast(
    machine: pytest.MonkeyPatch, flags: dict[str, bool]
) -> None:
    machine.setattr(torch.cpu, "get_capabilities", lambda: flags)
    fast = flags.get("avx512_bf16") or flags.get("amx_bf16")
    assert resolve_runtime("hf:x") == Runtime("cpu", "bfloat16" if fast else "float32", 1, False)
    assert resolve_runtime("hf:x", precision="float32").precision == "float32"


@pytest.mark.parametrize(("bfloat16", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_auto_takes_a_gpu_where_there_is_one(machine: pytest.MonkeyPatch, bfloat16: bool, precision: str) -> None:
    with_gpu(machine, bfloat16)
    assert resolve_runtime("hf:x", threads=2) == Runtime("cuda", precision, 2, False)
    assert resolve_runtime("hf:x", "cpu").device == "cpu"


def test_a_gpu_elsewhere_is_taken_at_its_word(machine: pytest.MonkeyPatch) -> None:
    assert resolve_runtime("dinov2_vits14", "cuda") == Runtime("cuda", "bfloat16", 1, True)


@pytest.mark.parametrize("name", load.COMPILERS)
def test_our_networks_are_compiled_where_there_is_a_compiler(
    machine: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    ours, others = ("dinov2_vits14", "vit:x.pth#size=98"), ("hf:x", "sscd_disc_mixup", "torchscript:x.pt")
    assert not any(resolve_runtime(spec).compiled for spec in (*ours, *others))
    with_compiler(tmp_path, name)
    assert all(resolve_runtime(spec).compiled for spec in ours)
    assert not any(resolve_runtime(spec).compiled for spec in others)
    assert not resolve_runtime("vit:x", compiled=False).compiled


@pytest.mark.parametrize(
    ("value", "found"), [("own-c++", True), ("own-c++ -O2", True), ("missing", False), ("", False)]
)
def test_the_compiler_may_be_named(machine: pytest.MonkeyPatch, tmp_path: Path, value: str, found: bool) -> None:
    with_compiler(tmp_path, "own-c++")
    machine.setenv("CXX", value)
    assert resolve_runtime("vit:x").compiled == found


def test_dct_runs_in_one_way(machine: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_gpu(machine)
    with_compiler(tmp_path, "g++")
    assert shutil.which("g++")
    assert resolve_runtime("dct", "cuda", "bfloat16", 8, True) == resolve_runtime("dct") == Runtime()


@pytest.mark.parametrize("spec", ["torchscript:x.pt", "sscd_disc_mixup"])
def test_torchscript_is_not_compiled_again(spec: str) -> None:
    with pytest.raises(EmbedderError, match="cannot be compiled again"):
        resolve_runtime(spec, "cpu", "float32", 1, True)


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("gpu", "auto", "unknown device 'gpu'; "),
        ("cudda", "auto", "did you mean cuda?"),
        ("cpu", "fp32", "unknown precision 'fp32'; "),
        ("cpu", "float3", "did you mean float32?"),
    ],
)
@pytest.mark.parametrize("spec", ["dct", "hf:x"])
def test_unknown_device_or_precision(spec: str, device: str, precision: str, message: str) -> None:
    with pytest.raises(EmbedderError) as caught:
        resolve_runtime(spec, device, precision)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_model_runs_nowhere() -> None:
    with pytest.raises(EmbedderError, match="unknown model"):
        resolve_runtime("dtc")
