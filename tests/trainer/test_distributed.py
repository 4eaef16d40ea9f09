"""Two processes (gloo), DDP and FSDP2, against one that has both batches; checkpoints between numbers of ranks."""

import json
import multiprocessing
import os
import socket
from functools import partial
from pathlib import Path

import pytest
import torch

import trainer.objective
import trainer.step
from embedders.vit import VARIANTS
from tests.trainer.tiny_runs import joined as both
from tests.trainer.tiny_runs import random_batch, settings, trained
from trainer.batch import Batch
from trainer.build import make_network, make_pair, make_schedules, make_trained
from trainer.checkpoints import Checkpoints, Facts, newest, read_tensors, restore, tensors_of
from trainer.config import TrainSettings
from trainer.distributed import World, joined, whole
from trainer.losses import koleo_loss
from trainer.step import Metrics, Trained, train_step

ALONE = World(0, 1, torch.device("cpu"), None)
RANKS, STEPS = 2, 3
CASES = {
    "ddp": ("sharding=ddp",),
    "fsdp": ("sharding=fsdp", "loss.centering=sinkhorn", "heads.separate=true", "heads.ibot_prototypes=21"),
}
"""21 prototypes and class tokens do not divide by two."""


pytestmark = pytest.mark.usefixtures("one_thread")


def batch_of(given: TrainSettings, step: int, rank: int) -> Batch:
    return random_batch(given, 10 * step + rank)


def save(run: Trained, folder: Path, world: World, step: int) -> None:
    checkpoints = Checkpoints(folder, 1, world)
    checkpoints.save(tensors_of(run), Facts(step, 8, VARIANTS["test"], {}))
    checkpoints.finish()


def work(rank: int, folder: Path, port: int) -> None:
    """One of the processes."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    found = {}
    with joined("cpu") as world:
        for name, assignments in CASES.items():
            given = settings(*assignments)
            run = make_trained(given, make_pair(given)[0], world)
            start = newest(folder / name / "start")
            assert start is not None
            restore(start, tensors_of(run), world)
            metrics = [one_step(given, run, step, world.rank) for step in range(STEPS)]
            save(run, folder / name, world, STEPS)
            found[name] = {
                "metrics": [dict(zip(each.names, each.values.tolist(), strict=True)) for each in metrics],
                "changed by a bad step": changed_by_a_bad_step(given, run, rank),
                "whole": float(whole(run.pair.ema, partial(make_network, given)).dino_head.mlp[0].weight.sum()),
            }
    (folder / f"{rank}.json").write_text(json.dumps(found))


def one_step(given: TrainSettings, run: Trained, step: int, rank: int) -> Metrics:
    schedules = make_schedules(given, RANKS * given.batch_size)
    return train_step(run, batch_of(given, step, rank), step, schedules.at(step))


def changed_by_a_bad_step(given: TrainSettings, run: Trained, rank: int) -> list[str]:
    """Names of the parameters and moments that differ after a step that is not finite on rank 1 alone."""
    before = {name: local(value).clone() for name, value in tensors_of(run).items() if "objective" not in name}
    augment = trainer.step.augment

    def broken(crops: torch.Tensor, colors: object) -> torch.Tensor:
        out = augment(crops, colors)  # type: ignore[arg-type]
        out[0, 0, 0, 0] = torch.inf if rank == 1 else 0
        return out

    trainer.step.augment = broken
    metrics = one_step(given, run, STEPS, rank)
    trainer.step.augment = augment
    after = tensors_of(run)
    changed = [name for name, value in before.items() if not torch.equal(local(after[name]), value)]
    return changed if not metrics.values.isfinite().all() else ["everything was finite"]


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if hasattr(value, "to_local") else value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both processes left, who began with what one process had written."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, assignments in CASES.items():
        save(trained(settings(*assignments), seed=4), folder / name / "start", ALONE, 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=work, args=(rank, folder, port)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    return folder


def reference(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Trained, list[Metrics]]:
    """One process with the batches of both; KoLeo among the images of each."""
    given = settings(*CASES[name])
    monkeypatch.setattr(trainer.objective, "koleo_loss", partial(koleo_loss, rank_size=given.batch_size))
    run, schedules = trained(given, seed=4), make_schedules(given, RANKS * given.batch_size)
    metrics = [
        train_step(run, both(batch_of(given, step, 0), batch_of(given, step, 1)), step, schedules.at(step))
        for step in range(STEPS)
    ]
    return run, metrics


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, metrics = reference(name, monkeypatch)
    for rank in range(RANKS):
        found = json.loads((folder / f"{rank}.json").read_text())[name]
        for ours, theirs in zip(metrics, found["metrics"], strict=True):
            assert theirs == pytest.approx(dict(zip(ours.names, ours.values.tolist(), strict=True)), rel=1e-4, abs=1e-6)
        assert found["whole"] == pytest.approx(float(run.pair.ema.dino_head.mlp[0].weight.sum()), abs=1e-3)
    checkpoint = newest(folder / name)
    assert checkpoint is not None
    there = read_tensors(checkpoint, "")
    assert there.keys() == tensors_of(run).keys()
    for key, value in tensors_of(run).items():
        kind = key.split(".")[0]
        if kind in ("student", "ema"):
            sure = tensors_of(run)[f"optimizer.{key.partition('.')[2]}.exp_avg_sq"].sqrt() > 1e-5
            value, other = value[sure], there[key][sure]
        else:
            other = there[key]
        torch.testing.assert_close(other, value, rtol=1e-4, atol=2e-5, msg=key)


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_bad_on_one_rank_changes_nothing_on_any(name: str, folder: Path) -> None:
    for rank in range(RANKS):
        assert json.loads((folder / f"{rank}.json").read_text())[name]["changed by a bad step"] == []


def test_two_ranks_write_parts_and_one_reads_them(folder: Path) -> None:
    checkpoint = newest(folder / "fsdp")
    assert checkpoint is not None
    files = sorted(checkpoint.glob("*.safetensors"))
    assert len(files) == RANKS
    assert all(file.stat().st_size > 0.3 * sum(each.stat().st_size for each in files) for file in files)
    given = settings(*CASES["fsdp"])
    run = trained(given, seed=9)
    restore(checkpoint, tensors_of(run), ALONE)
    there = read_tensors(checkpoint, "")
    assert all(torch.equal(value, there[name]) for name, value in tensors_of(run).items())


def test_plain_python_has_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with joined("cpu") as world:
        assert world == ALONE
        world.wait()
