"""Where ranks find a place on a cluster; training on Ray itself is in tests/e2e."""

from types import SimpleNamespace
from typing import Any

import pytest

from curation.errors import ConfigError
from tests.trainer.tiny_runs import settings
from trainer.launch import Job, _cores, _placed


def cluster(*nodes: tuple[float, float]) -> Any:
    """A stand-in for ray: nodes of so many cores and GPUs, and one that is gone."""
    found = [{"Alive": True, "Resources": {"CPU": cpus, "GPU": gpus}} for cpus, gpus in nodes]
    total = {"CPU": sum(cpus for cpus, _ in nodes), "GPU": sum(gpus for _, gpus in nodes)}
    gone = {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}
    return SimpleNamespace(nodes=lambda: [*found, gone], cluster_resources=lambda: total)


def job(device: str = "auto") -> Job:
    return Job(settings(), "/run", False, None, device)


@pytest.mark.parametrize(
    ("nodes", "ranks", "device", "cores"),
    [
        ([(8, 0)], 2, "cpu", 4),
        ([(3, 0), (3, 0)], 3, "cpu", 1),
        ([(3, 0), (3, 0)], 2, "cpu", 3),
        ([(5, 0), (2, 0)], 3, "cpu", 2),
        ([(16, 2), (16, 2)], 4, "cuda", 8),
        ([(16, 1), (16, 3)], 4, "cuda", 5),
    ],
)
def test_ranks_get_as_many_cores_as_let_all_of_them_be_placed(
    nodes: list[tuple[float, float]], ranks: int, device: str, cores: int
) -> None:
    assert _cores(cluster(*nodes), ranks, device) == cores


@pytest.mark.parametrize(
    ("nodes", "ranks", "device", "expected"),
    [
        ([(8, 4), (8, 4)], None, "auto", (8, "cuda")),
        ([(8, 4)], 6, "auto", (6, "cpu")),
        ([(8, 4)], None, "cpu", (1, "cpu")),
        ([(8, 0), (8, 0)], None, "auto", (2, "cpu")),
        ([(8, 4)], 2, "cuda", (2, "cuda")),
    ],
)
def test_a_rank_a_gpu_or_a_rank_a_node(
    nodes: list[tuple[float, float]], ranks: int | None, device: str, expected: tuple[int, str]
) -> None:
    found, placed = _placed(cluster(*nodes), job(device), ranks)
    assert (found, placed.device) == expected


def test_too_many_ranks_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 ranks need a core each, but the cluster has 2; lower --workers"):
        _cores(cluster((1, 0), (1, 0)), 3, "cpu")
    for ranks in (3, None):
        with pytest.raises(ConfigError, match=r"the cluster has [02]; lower --workers, or take --device cpu"):
            _placed(cluster((8, 2 if ranks else 0)), job("cuda"), ranks)
