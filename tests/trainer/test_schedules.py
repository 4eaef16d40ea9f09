"""Schedules against the published arrays, written out, and the published presets' numbers."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from curation.errors import ConfigError
from trainer.build import make_schedules
from trainer.config import load_settings
from trainer.schedules import Schedules

EPOCH = 1250
VITL16_SHORT = Schedules(steps=100 * EPOCH, global_batch=2048, base_lr=4e-3, warmup_steps=10 * EPOCH)
VITL14 = Schedules(
    steps=500 * EPOCH,
    global_batch=3072,
    base_lr=2e-4,
    warmup_steps=80 * EPOCH,
    weight_decay=0.04,
    final_weight_decay=0.2,
    momentum=0.994,
)
SMALL = replace(
    VITL16_SHORT, steps=40, global_batch=256, warmup_steps=7, teacher_temperature_steps=12, freeze_last_layer_steps=5
)


def cosine(start: float, end: float, steps: int) -> np.ndarray:
    return end + 0.5 * (start - end) * (1 + np.cos(np.pi * np.arange(steps) / steps))


def slow_values(s: Schedules) -> np.ndarray:
    """All steps, [steps, 5], as arrays in the published form."""
    peak = s.base_lr * math.sqrt(s.global_batch / 1024.0)
    final = peak if s.final_lr is None else s.final_lr
    lr = np.concatenate([np.linspace(0, peak, s.warmup_steps), cosine(peak, final, s.steps - s.warmup_steps)])
    last = lr.copy()
    last[: s.freeze_last_layer_steps] = 0
    temperature = np.full(max(s.steps, s.teacher_temperature_steps), s.teacher_temperature)
    temperature[: s.teacher_temperature_steps] = np.linspace(
        s.warmup_teacher_temperature, s.teacher_temperature, s.teacher_temperature_steps
    )
    decay = cosine(s.weight_decay, s.final_weight_decay, s.steps)
    momentum = cosine(s.momentum, s.final_momentum, s.steps)
    return np.stack([lr, last, decay, momentum, temperature[: s.steps]], axis=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup_steps": 0, "freeze_last_layer_steps": 0, "teacher_temperature_steps": 0},
        {"warmup_steps": 1, "teacher_temperature_steps": 1},
        {"warmup_steps": 40, "teacher_temperature_steps": 60},
        {"final_lr": None, "final_weight_decay": 0.04, "final_momentum": 0.992},
        {"freeze_last_layer_steps": 20, "global_batch": 4096},
    ],
)
def test_every_step_is_the_published_array(changes: dict[str, Any]) -> None:
    settings = replace(SMALL, **changes)
    found = np.array([settings.at(step) for step in range(settings.steps)])
    np.testing.assert_allclose(found, slow_values(settings), rtol=1e-12, atol=1e-18)
    assert all(type(value) is float for value in settings.at(3))


def test_the_published_presets() -> None:
    assert VITL16_SHORT.peak_lr == pytest.approx(5.66e-3, rel=1e-3)
    assert VITL14.peak_lr == pytest.approx(3.464e-4, rel=1e-3)
    assert VITL14.at(0).lr == 0
    assert VITL14.at(99_999).lr == VITL14.at(100_000).lr == VITL14.peak_lr
    assert VITL14.at(50_000).lr == pytest.approx(VITL14.peak_lr / 2, rel=1e-4)
    assert VITL14.at(362_500).lr == pytest.approx((VITL14.peak_lr + 1e-6) / 2)
    assert VITL14.at(624_999).lr == pytest.approx(1e-6, rel=1e-3)
    assert [VITL14.at(step).weight_decay for step in (0, 312_500, 625_000)] == pytest.approx([0.04, 0.12, 0.2])
    assert [VITL14.at(step).momentum for step in (0, 312_500, 625_000)] == pytest.approx([0.994, 0.997, 1.0])
    assert [VITL14.at(step).teacher_temperature for step in (0, 37_499, 600_000)] == pytest.approx([0.04, 0.07, 0.07])
    assert VITL14.at(1249).last_layer_lr == 0 < VITL14.at(1249).lr
    assert VITL14.at(1250).last_layer_lr == VITL14.at(1250).lr > 0
    assert VITL16_SHORT.at(125_000)[2:] == (0.4, 1.0, 0.07)


@pytest.mark.parametrize("step", [40, 41, 10_000])
def test_after_the_end_the_final_values_stay(step: int) -> None:
    assert SMALL.at(step) == (1e-6, 1e-6, 0.4, 1.0, 0.07)


def test_constant_schedules_stay_after_their_warm_ups() -> None:
    held = replace(SMALL, final_lr=None, final_weight_decay=0.04, final_momentum=0.992)
    assert [held.at(step) for step in range(6)] != [held.at(6)] * 6
    assert {held.at(step) for step in range(12, 100)} == {(held.peak_lr, held.peak_lr, 0.04, 0.992, 0.07)}
    assert [held.at(step).lr for step in range(7)] == [SMALL.at(step).lr for step in range(7)]


def test_the_high_resolution_finish_compresses_the_curves_of_the_long_run() -> None:
    finish = make_schedules(load_settings("high_resolution", ["optimizer.base_lr=2e-4"]), 3072)
    assert (finish.steps, finish.warmup_steps, finish.teacher_temperature_steps) == (10_000, 1_600, 600)
    assert finish.freeze_last_layer_steps == 20
    for share in (0.0, 0.17, 0.3, 0.5, 0.9, 1.0):
        found, whole = finish.at(int(10_000 * share)), VITL14.at(int(625_000 * share))
        np.testing.assert_allclose(found, whole, rtol=1e-2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"global_batch": 0}, "images"),
        ({"base_lr": -1.0}, "base_lr"),
        ({"final_lr": math.nan}, "final_lr"),
        ({"weight_decay": math.inf}, "weight_decay"),
        ({"warmup_steps": 41}, "warmup_steps 41"),
        ({"momentum": 1.5}, "momentum"),
        ({"teacher_temperature": 0.0}, "temperatures"),
    ],
)
def test_settings_that_make_no_schedule_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SMALL, **changes)


def test_there_is_no_step_before_the_first() -> None:
    with pytest.raises(ValueError, match="-1"):
        SMALL.at(-1)
