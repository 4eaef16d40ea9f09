"""Checkpoints: whole or not at all, the newest kept, as they were when saving began, and read without pickle."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from curation.errors import ConfigError, LvdError
from embedders.vit import VARIANTS
from tests.trainer.tiny_runs import random_batch, settings, trained
from trainer.build import make_schedules
from trainer.checkpoints import Checkpoints, Facts, checkpoints_in, facts_of, newest, read_tensors, restore, tensors_of
from trainer.distributed import World
from trainer.step import train_step

ALONE = World(0, 1, torch.device("cpu"), None)


def facts(step: int) -> Facts:
    return Facts(step, 4, VARIANTS["test"], {"seed": 0, "loss.betas": [0.9, 0.99]})


def some_tensors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"a.b": torch.randn(3, 4, generator=draw), "a.c": torch.randn(5, generator=draw), "step": torch.tensor(7.0)}


def saved(run: Path, steps: list[int], keep: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(run, keep, ALONE)
    for step in steps:
        checkpoints.save(some_tensors(step), facts(step))
    checkpoints.finish()
    return checkpoints


def test_what_is_saved_is_what_was_there_when_saving_began(tmp_path: Path) -> None:
    checkpoints, tensors = Checkpoints(tmp_path, 2, ALONE), some_tensors(0)
    before = {name: value.clone() for name, value in tensors.items()}
    checkpoints.save(tensors, facts(3))
    for value in tensors.values():
        value.zero_()
    checkpoints.finish()
    checkpoint = newest(tmp_path)
    assert checkpoint == tmp_path / "checkpoints" / "step-00000003"
    restore(checkpoint, tensors, ALONE)
    assert all(torch.equal(value, before[name]) for name, value in tensors.items())
    assert facts_of(checkpoint) == facts(3)
    assert {name: value.shape for name, value in read_tensors(checkpoint, "a.").items()} == {"b": (3, 4), "c": (5,)}
    assert torch.equal(read_tensors(checkpoint, "a.")["b"], before["a.b"])


def test_the_newest_are_kept_and_what_was_cut_short_is_removed(tmp_path: Path) -> None:
    saved(tmp_path, [1, 2, 3])
    folder = tmp_path / "checkpoints"
    assert [path.name for path in checkpoints_in(folder)] == ["step-00000002", "step-00000003"]
    (folder / "step-00000002").rename(folder / ".step-00000004.partial")
    (folder / "step-00000005").mkdir()  # without what is written last
    assert newest(tmp_path) == folder / "step-00000003"
    saved(tmp_path, [6])
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003", "step-00000005", "step-00000006"]


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert {path.suffix for path in checkpoint.iterdir()} == {".safetensors", ".json"}


def test_all_of_a_run_is_restored(tmp_path: Path) -> None:
    given = settings()
    run, other, schedules = trained(given, 0), trained(given, 1), make_schedules(given, 4)
    for step in range(2):
        train_step(run, random_batch(given, step), step, schedules.at(step))
    checkpoints = Checkpoints(tmp_path, 1, ALONE)
    checkpoints.save(tensors_of(run), facts(2))
    checkpoints.finish()
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    restore(checkpoint, tensors_of(other), ALONE)
    for step in (2, 3):
        for each in (run, other):
            train_step(each, random_batch(given, step), step, schedules.at(step))
    ours, theirs = tensors_of(run), tensors_of(other)
    assert any(name.startswith("objective.") and value.any() for name, value in ours.items())
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_damage_and_other_shapes_are_one_line_with_the_name(tmp_path: Path) -> None:
    saved(tmp_path, [1])
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    with pytest.raises(LvdError, match=r"checkpoint .*step-00000001: .*a\.b"):
        restore(checkpoint, {"a.b": torch.zeros(4, 3)}, ALONE)
    with pytest.raises(LvdError, match=r"checkpoint .*step-00000001: .*other"):
        restore(checkpoint, {"other": torch.zeros(1)}, ALONE)
    (tensors,) = checkpoint.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(LvdError, match=r"checkpoint .*step-00000001: "):
        restore(checkpoint, some_tensors(1), ALONE)
    (checkpoint / "run.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ConfigError, match=r"run\.json: .*format"):
        facts_of(checkpoint)
    (checkpoint / "run.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"run\.json: "):
        facts_of(checkpoint)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*checkpoints"):
        Checkpoints(tmp_path, 1, ALONE)
    (tmp_path / "checkpoints").unlink()
    checkpoints = Checkpoints(tmp_path, 1, ALONE)
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(LvdError, match=r"checkpoint .*step-00000001"):  # noqa: PT012 (it may show in either)
        checkpoints.save(some_tensors(0), facts(1))
        checkpoints.finish()
