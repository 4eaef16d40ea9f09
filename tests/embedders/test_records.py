"""Dataclasses from JSON: what fits comes back as it was, anything else is an error that names the key."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pytest

from embedders.preprocessing import Preprocessing
from embedders.records import from_json
from embedders.vit import VARIANTS, ViTConfig


@dataclass(frozen=True)
class Inner:
    number: float
    name: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    inner: Inner
    pair: tuple[int, int] | int | None
    many: tuple[float, ...] = ()


GOOD: dict[str, Any] = {"inner": {"number": 1.5, "name": "b"}, "pair": [1, 2], "many": [0.5, 1]}


@pytest.mark.parametrize("seed", range(5))
def test_what_was_written_is_read_again(seed: int) -> None:
    rng = np.random.default_rng(seed)
    crop = (int(rng.integers(1, 99)), 14)
    values = {"mean": tuple(rng.random(3).tolist()), "std": tuple(rng.random(3).tolist()), "scale": float(rng.random())}
    for record in (
        Preprocessing(resize=100, crop=[crop, None][seed % 2], resample=3, **values),
        Preprocessing(resize=(100, 200), crop=None, resample=2, **values),
        replace(VARIANTS["giant"], registers=seed, mlp_ratio=float(rng.random())),
    ):
        assert from_json(type(record), json.loads(json.dumps(asdict(record))), "x") == record
    assert from_json(Outer, GOOD, "x") == Outer(Inner(1.5, "b"), (1, 2), (0.5, 1))
    assert from_json(Outer, {"inner": {"number": 1}, "pair": None}, "x") == Outer(Inner(1), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pair": [1]}, r"x\.pair: \[1\] does not fit"),
        ({"pair": [1, 2, 3]}, r"x\.pair"),
        ({"pair": [1, 2.0]}, r"x\.pair"),
        ({"pair": True}, r"x\.pair: True"),
        ({"pair": "12"}, r"x\.pair"),
        ({"many": [1, True]}, r"x\.many"),
        ({"many": [1, "2"]}, r"x\.many"),
        ({"many": 1}, r"x\.many"),
        ({"inner": []}, r"x\.inner: not a JSON object"),
        ({"inner": {}}, r"x\.inner\.number: missing"),
        ({"inner": {"number": "1"}}, r"x\.inner\.number"),
        ({"inner": {"number": True}}, r"x\.inner\.number"),
        ({"inner": {"number": 1, "name": "c"}}, r"x\.inner\.name: 'c' does not fit"),
        ({"inner": {"number": 1, "nome": "a"}}, r"x\.inner\.nome: unexpected key"),
        ({"other": 1}, r"x\.other: unexpected key"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(Outer, {**GOOD, **change}, "x")


def test_a_record_that_refuses_its_values_is_named() -> None:
    config = {**asdict(VARIANTS["test"]), "heads": 5}
    with pytest.raises(ValueError, match=r"^x: dim 32 is not a multiple of heads 5"):
        from_json(ViTConfig, config, "x")
