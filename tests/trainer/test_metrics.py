"""What a run shows and writes of itself."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.metrics import NO_BOARD, Display, Follower, Log, Reading, drop_after, not_finite
from trainer.step import Metrics

NUMBERS = {"loss": 2.5, "lr": 0.001}


class Clock:
    """Ten seconds between one look and the next."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 10
        return self.now


def test_readings() -> None:
    numbers = Reading(Metrics(("loss", "norm"), torch.tensor([1.5, torch.inf]))).read()
    assert numbers == {"loss": 1.5, "norm": float("inf")}
    assert not_finite(numbers) == ["norm"]
    assert not_finite({"loss": float("nan"), "x": 1.0}) == ["loss"]


@pytest.fixture
def no_board(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where TensorBoard is not installed."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)


@pytest.mark.usefixtures("no_board")
def test_lines_now_and_then_and_all_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with Log(tmp_path, steps=100, begin=10, images_per_step=4, clock=clock) as log:
        for done in range(20, 70, 10):
            log.step(done, NUMBERS, clock())
        log.evaluation(60, {"knn_20": 0.25})
        log.step(100, NUMBERS, clock())
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [20, 30, 40, 50, 60, 60, 100]
    assert written[0]["images_per_second"] == pytest.approx(10 * 4 / 10)
    assert written[5] == {"step": 60, "knn_20": 0.25}
    missing, *shown = capsys.readouterr().err.splitlines()
    assert missing == NO_BOARD
    assert shown[0] == "step 20/100  loss 2.5000  lr 1.00e-03  4 images/s  0:01:20 left"
    assert "step 60: knn_20 0.25" in shown
    assert shown[-1].startswith("step 100/100") and 4 <= len(shown) < 7


def test_an_evaluation_is_left_out_of_the_rate(tmp_path: Path) -> None:
    with Log(tmp_path, steps=10, begin=0, images_per_step=4, clock=lambda: 0.0) as log:
        log.step(2, NUMBERS, 2.0)
        log.evaluation(3, {"knn_20": 0.25})
        log.leave_out(5.0)
        log.step(4, NUMBERS, 9.0)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("images_per_second") for line in written] == [pytest.approx(4), None, pytest.approx(4)]


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, steps=10, begin=0, images_per_step=4, active=False) as log:
        log.step(10, NUMBERS, 1.0)
        log.evaluation(10, NUMBERS)
    assert capsys.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_what_a_resumed_run_does_again_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 3}\n{"step": 3}\n{"step": 2}\n{"ste')
    drop_after(file, 2)
    assert file.read_text() == '{"step": 1, "loss": 3}\n{"step": 2}\n'
    drop_after(tmp_path / "none", 2)


def test_tensorboard_gets_every_number_and_forgets_what_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, value, step))

        def close(self) -> None:
            told.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    with Log(tmp_path, steps=9, begin=3, images_per_step=4, clock=Clock()) as log:
        log.step(4, NUMBERS, 30.0)
        log.evaluation(4, {"knn_20": 0.25})
    assert told == [
        (str(tmp_path / "tensorboard"), 4),
        ("loss", 2.5, 4),
        ("lr", 0.001, 4),
        ("images_per_second", pytest.approx(4 / 20), 4),
        ("knn_20", 0.25, 4),
        "closed",
    ]
    assert NO_BOARD not in capsys.readouterr().err


def test_event_files_are_read_by_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for begin, steps in ((0, (1, 2, 3)), (1, (2, 3, 4))):
        with Log(tmp_path, steps=9, begin=begin, images_per_step=4) as log:
            for step in steps:
                log.step(step, {"loss": step + 10.0 * begin, "lr": 0.5}, 0.0)
    found = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [(1, 1), (2, 12), (3, 13), (4, 14)]


@pytest.mark.usefixtures("no_board")
def test_what_another_process_writes_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1}\n')
    clock = Clock()
    clock.now = 1e9  # each line is due
    display = Display(9, 3, clock=lambda: 10 * clock())
    follower = Follower(tmp_path, display, 3, 4)
    follower.look()
    with Log(tmp_path, steps=9, begin=3, images_per_step=4, active=True) as log:
        capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Display, "say", lambda self, line: None)
            log.step(4, NUMBERS, 1.0)
            log.evaluation(4, {"knn_20": 0.25})
        follower.look()
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')
        follower.look()
    shown = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in shown] == ["step 4/9", "step 4: knn_20 0.25"]


def test_a_follower_reads_a_rewritten_file_from_its_beginning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "metrics.jsonl"
    clock = Clock()
    follower = Follower(tmp_path, Display(9, 0, clock=lambda: 10 * clock()), 0, 4)
    numbers = {**NUMBERS, "images_per_second": 8.0}
    file.write_text("".join(json.dumps({"step": step, **numbers}) + "\n" for step in (1, 2, 3)))
    follower.look()
    size = file.stat().st_size
    drop_after(file, 2)
    with file.open("a") as more:  # longer than it was, so that the old end lies within a line
        more.writelines(json.dumps({"step": step, **numbers, "norm": 0.123456789}) + "\n" for step in (3, 4, 5))
    assert file.read_bytes()[size - 1 : size] != b"\n"
    capsys.readouterr()
    follower.look()
    assert [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()] == ["step 4/9", "step 5/9"]
