"""What a run shows and writes of itself."""

import json
from pathlib import Path

import pytest
import torch

from trainer.metrics import Log, Reading, drop_after, not_finite
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


def test_lines_now_and_then_and_all_in_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, steps=100, begin=10, images_per_step=4, clock=Clock()) as log:
        for done in range(20, 70, 10):
            log.step(done, NUMBERS)
        log.evaluation(60, {"knn_20": 0.25})
        log.step(100, NUMBERS)
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [20, 30, 40, 50, 60, 60, 100]
    assert written[0]["images_per_second"] == pytest.approx(10 * 4 / 10)
    assert written[5] == {"step": 60, "knn_20": 0.25}
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "step 20/100  loss 2.5000  lr 1.00e-03  4 images/s  0:01:20 left"
    assert "step 60: knn_20 0.25" in shown
    assert shown[-1].startswith("step 100/100") and 4 <= len(shown) < 7


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, steps=10, begin=0, images_per_step=4, active=False) as log:
        log.step(10, NUMBERS)
        log.evaluation(10, NUMBERS)
    assert capsys.readouterr().err == "" and list(tmp_path.iterdir()) == []


def test_what_a_resumed_run_does_again_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 3}\n{"step": 3}\n{"step": 2}\n{"ste')
    drop_after(file, 2)
    assert file.read_text() == '{"step": 1, "loss": 3}\n{"step": 2}\n'
    drop_after(tmp_path / "none", 2)
