"""Whole runs on a few images: interrupted and resumed, refused, stopped by a bad batch; and what they leave behind."""

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer.step
from curation.errors import ConfigError, LvdError, PartialError, StoppedError
from embedders.checkpoints import load_vit
from embedders.vit import VisionTransformer
from tests.trainer.tiny_runs import settings, write_images
from trainer.checkpoints import newest, read_tensors
from trainer.config import TrainSettings
from trainer.loop import MODEL
from trainer.photometric import augment
from trainer.train import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "images.parquet")


def of(images: Path, *assignments: str) -> TrainSettings:
    return settings(f"data.sources={{web: {{images: {images}}}}}", "model.drop_path=0.3", "eval_every=1", *assignments)


class Interrupter:
    """An evaluation that, at one of its calls, does what Ctrl-C does."""

    def __init__(self, at: int | None = None) -> None:
        self.calls, self.at = 0, at

    def __call__(self, backbone: VisionTransformer, head: nn.Module | None) -> dict[str, float]:
        self.calls += 1
        if self.calls == self.at:
            signal.raise_signal(signal.SIGINT)
        values = [*backbone.parameters(), *(head.parameters() if head else [])]
        return {"sum": float(sum(value.double().sum() for value in values))}


def lines(run: Path) -> list[dict[str, float]]:
    """What was measured, without speeds."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in found]


@pytest.fixture(scope="module")
def whole_run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("whole") / "run"
    summary = train(of(images), run, device="cpu", evaluate=Interrupter())
    assert (summary.steps, summary.images, summary.skipped, summary.model) == (6, 24, 0, run / "model.safetensors")
    assert summary.numbers["loss"] == lines(run)[-2]["loss"]
    return run


def test_what_a_run_leaves(whole_run: Path) -> None:
    assert {path.name for path in whole_run.iterdir()} >= {
        *("checkpoints", "metrics.jsonl", "settings.json", "model.safetensors")
    }
    found = lines(whole_run)
    assert [line["step"] for line in found] == [step for step in range(1, 7) for _ in range(2)]
    assert found[0].keys() == {
        *("step", "loss", "dino", "ibot", "koleo", "norm_backbone", "norm_dino_head", "lr", "momentum")
    }
    assert found[1].keys() == {"step", "sum"}
    model = load_vit(whole_run / "model.safetensors")
    assert (model.config.dim, model.config.image_size) == (32, 56)


@pytest.mark.parametrize("at", range(1, 6))
def test_interrupted_and_resumed_equals_not_interrupted(at: int, images: Path, whole_run: Path, tmp_path: Path) -> None:
    workers = "data.workers=1" if at == 2 else "data.workers=0"
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(PartialError, match=f"stopped after {at} of 6 steps, which are saved in"):
        train(of(images), tmp_path, device="cpu", evaluate=Interrupter(at))
    assert signal.getsignal(signal.SIGINT) is handler
    torch.manual_seed(99)
    train(of(images, workers), tmp_path, device="cpu", evaluate=Interrupter(), resume=True)
    assert lines(tmp_path) == lines(whole_run)
    model = "model.safetensors"
    assert (tmp_path / model).read_bytes() == (whole_run / model).read_bytes()


@pytest.mark.parametrize("kind", ["heads alone at first", "from heads", "from features", "homogeneous"])
def test_every_kind_of_run_goes_on_exactly(kind: str, images: Path, whole_run: Path, tmp_path: Path) -> None:
    """Begun from weights without heads, distilled with and without heads, of sources that fill whole batches."""
    other = write_images(tmp_path / "other.parquet", 9)
    sources = f"{{web: {{images: {images}}}, other: {{images: {other}, homogeneous: true}}}}"
    assignments = {
        "heads alone at first": ["schedule.freeze_last_layer=2"],
        "from heads": [f"teacher.model={whole_run}", "model.drop_path=0"],
        "from features": [f"teacher={{model: {whole_run}, objective: features}}", "model.drop_path=0"],
        "homogeneous": [f"data.sources={sources}"],
    }[kind]
    init = str(whole_run / "model.safetensors") if kind == "heads alone at first" else None
    given = of(images, *assignments)
    train(given, tmp_path / "whole", device="cpu", init=init, evaluate=Interrupter())
    with pytest.raises(StoppedError):
        train(given, tmp_path / "parts", device="cpu", init=init, evaluate=Interrupter(3))
    train(given, tmp_path / "parts", device="cpu", init=init, evaluate=Interrupter(), resume=True)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    assert (tmp_path / "parts" / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()
    tokens = read_tensors(tmp_path / "whole" / "checkpoints" / "step-00000006", "student.backbone.mask_token")[""]
    assert bool(tokens.any()) == (not kind.startswith("from")), "the mask token is frozen in distillation alone"


def test_a_run_by_the_name_of_a_preset(images: Path, tmp_path: Path) -> None:
    small = ["schedule.steps=1", "batch_size=2", "data.workers=0", "model.depth=1", "precision=float32"]
    summary = train("laptop", tmp_path / "run", images=str(images), overrides=small, device="cpu")
    assert (summary.steps, summary.images) == (1, 2)
    again = train(None, tmp_path / "run", overrides=["keep=5"], resume=True, device="cpu")
    assert again.numbers == {}
    with pytest.raises(ConfigError, match="no run to resume: name a preset"):
        train(None, tmp_path / "none", resume=True)
    with pytest.raises(ConfigError, match="no local path"):
        train("laptop", "s3://bucket/run", images=str(images))


def test_a_run_that_is_done_is_done(images: Path, whole_run: Path) -> None:
    before = lines(whole_run)
    summary = train(of(images), whole_run, device="cpu", evaluate=Interrupter(), resume=True)
    assert (summary.steps, summary.numbers) == (6, {})
    assert lines(whole_run) == before


def test_other_runs_are_refused_with_the_difference(images: Path, whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not empty: resume the run in it"):
        train(of(images), whole_run, device="cpu")
    with pytest.raises(ConfigError, match=r"another run was begun in .*: optimizer.clip was 0.5, now 0.7"):
        train(of(images, "optimizer.clip=0.7"), whole_run, device="cpu", resume=True)
    with pytest.raises(ConfigError, match="has 4 images a step, now it would be 5: set batch_size"):
        train(of(images, "batch_size=5"), whole_run, device="cpu", resume=True)
    other = write_images(tmp_path / "images.parquet", 8)
    with pytest.raises(ConfigError, match=r"data.fingerprint was"):
        train(of(other), whole_run, device="cpu", resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("")
    with pytest.raises(ConfigError, match="holds no run to resume"):
        train(of(images), tmp_path / "other", device="cpu", resume=True)


def test_weights_to_start_from_are_no_run_to_resume(images: Path, whole_run: Path, tmp_path: Path) -> None:
    given = of(images, "schedule.steps=2", "schedule.warmup=1")
    train(given, tmp_path / "with heads", device="cpu", init=str(whole_run))
    assert json.loads((tmp_path / "with heads" / "settings.json").read_text())["schedule"]["heads_only"] == 0
    train(given, tmp_path / "without", device="cpu", init=str(whole_run / "model.safetensors"))
    assert json.loads((tmp_path / "without" / "settings.json").read_text())["schedule"]["heads_only"] == 2
    before, after = (load_vit(run / "model.safetensors").state_dict() for run in (whole_run, tmp_path / "without"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    train(given, tmp_path / "without", device="cpu", resume=True)


def test_a_bad_batch_stops_the_run_a_step_later(
    monkeypatch: pytest.MonkeyPatch, images: Path, whole_run: Path, tmp_path: Path
) -> None:
    steps: list[int] = []
    step_of_ours = trainer.step.draw_seed

    def record(seed: int, step: int, rank: int) -> int:
        steps.append(step)
        return step_of_ours(seed, step, rank)

    def broken(*args: Any) -> Tensor:
        out = augment(*args)
        return out * math.inf if steps[-1] == 3 else out

    monkeypatch.setattr(trainer.step, "draw_seed", record)
    monkeypatch.setattr(trainer.step, "augment", broken)
    given = of(images, "eval_every=0", "checkpoint_every=2")
    with pytest.raises(LvdError, match=r"step 3: loss, .* not finite.*images on rank 0 are .*step-0000000[24]"):
        train(given, tmp_path, device="cpu")
    failure = json.loads((tmp_path / "failure-rank0.json").read_text())
    assert failure["step"] == 3 and len(failure["image_ids"]) == 4 and "loss" in failure["not_finite"]
    assert steps == [0, 1, 2, 3]
    steps.clear()
    monkeypatch.setattr(trainer.step, "augment", augment)
    assert newest(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    train(given, tmp_path, device="cpu", resume=True)
    assert steps == [2, 3, 4, 5]
    assert (tmp_path / "model.safetensors").read_bytes() == (whole_run / "model.safetensors").read_bytes()


def test_a_bad_step_is_noticed_while_the_next_is_under_way(
    monkeypatch: pytest.MonkeyPatch, images: Path, tmp_path: Path
) -> None:
    steps: list[int] = []

    def broken(*args: Any) -> Tensor:
        steps.append(len(steps) // 2)
        return augment(*args) * (math.nan if steps[-1] == 2 else 1)

    monkeypatch.setattr(trainer.step, "augment", broken)
    with pytest.raises(LvdError, match=r"step 2: .*there is no checkpoint before it"):
        train(of(images, "eval_every=0"), tmp_path, device="cpu")
    assert steps[-1] == 3


def test_no_data_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no sources"):
        train(settings(), tmp_path / "run", device="cpu")
