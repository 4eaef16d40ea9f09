"""What changes from step to step: learning rate, weight decay, momentum of the teacher, its temperature.

All by step, as published (arXiv 2304.07193, appendix B); epochs play no part. Steps count from 0.
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

from curation.errors import ConfigError


class Values(NamedTuple):
    """What holds during one step, all plain floats.

    Attributes:
        lr: learning rate before the factors of the parameter groups; last_layer_lr: that of the heads' last layers.
        weight_decay: before the factors of the parameter groups.
        momentum: of the teacher, an exponential moving average of the student.
        teacher_temperature: that sharpens the teacher's logits.
    """

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temperature: float


@dataclass(frozen=True)
class Schedules:
    """Settings of all schedules, and their values at a step.

    Learning rate: linear from 0 to its peak, base_lr x sqrt(global_batch / 1024), then a cosine to final_lr. Weight
    decay and momentum: a cosine between their ends over all steps. Teacher temperature: linear, then constant.

    Attributes:
        steps: length of the run.
        global_batch: images a step, over all ranks.
        base_lr: learning rate for 1024 images a step.
        warmup_steps: of the learning rate.
        final_lr: at the end, not scaled; None stays at the peak.
        weight_decay, final_weight_decay; momentum, final_momentum: both ends; equal ones are a constant.
        warmup_teacher_temperature, teacher_temperature: first, and after `teacher_temperature_steps`.
        freeze_last_layer_steps: first steps in which the heads' last layers do not learn.

    Raises:
        ConfigError: for settings that make no schedule.
    """

    steps: int
    global_batch: int
    base_lr: float
    warmup_steps: int
    final_lr: float | None = 1e-6
    weight_decay: float = 0.04
    final_weight_decay: float = 0.4
    momentum: float = 0.992
    final_momentum: float = 1.0
    warmup_teacher_temperature: float = 0.04
    teacher_temperature: float = 0.07
    teacher_temperature_steps: int = 37_500
    freeze_last_layer_steps: int = 1_250

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{field.name} is {value}: it must be a number that is not negative")
        if self.steps < 1 or self.global_batch < 1:
            raise ConfigError(f"{self.steps} steps of {self.global_batch} images: both must be at least 1")
        if self.warmup_steps > self.steps:
            raise ConfigError(f"warmup_steps {self.warmup_steps} is above steps {self.steps}: lower it")
        if max(self.momentum, self.final_momentum) > 1:
            raise ConfigError(f"momentum {self.momentum} to {self.final_momentum}: it must not be above 1")
        if min(self.warmup_teacher_temperature, self.teacher_temperature) <= 0:
            raise ConfigError("teacher temperatures must be above 0")

    @property
    def peak_lr(self) -> float:
        """Highest learning rate."""
        return self.base_lr * math.sqrt(self.global_batch / 1024)

    def at(self, step: int) -> Values:
        """Values during a step; from `steps` on, the final ones."""
        if step < 0:
            raise ValueError(f"step {step}")
        lr = self._lr(step)
        share = step / self.steps
        return Values(
            lr=lr,
            last_layer_lr=0.0 if step < self.freeze_last_layer_steps else lr,
            weight_decay=_cosine(self.weight_decay, self.final_weight_decay, share),
            momentum=_cosine(self.momentum, self.final_momentum, share),
            teacher_temperature=self._teacher_temperature(step),
        )

    def _lr(self, step: int) -> float:
        if step < self.warmup_steps:
            return _linear(0.0, self.peak_lr, step, self.warmup_steps)
        final = self.peak_lr if self.final_lr is None else self.final_lr
        return _cosine(self.peak_lr, final, (step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1))

    def _teacher_temperature(self, step: int) -> float:
        if step >= self.teacher_temperature_steps:
            return self.teacher_temperature
        return _linear(self.warmup_teacher_temperature, self.teacher_temperature, step, self.teacher_temperature_steps)


def _linear(start: float, end: float, step: int, steps: int) -> float:
    """From `start` at step 0 to `end` at the last of `steps`."""
    return start + (end - start) * step / max(steps - 1, 1)


def _cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` at share 0 to `end` at share 1, and `end` from there on."""
    return end if share >= 1 else end + (start - end) * (1 + math.cos(math.pi * share)) / 2
