"""Which engine joins, with which settings, and why: resolved before a join begins, and told to the user.

A join is one list of steps, whatever the engine: nodes in, sets of edges out.
"""

import math
from dataclasses import dataclass
from typing import Any

from curation import storage
from curation.errors import ConfigError
from pipelines.faiss_join import FaissStep, IndexSettings, IndexStep
from pipelines.join import HUB_SAMPLE, ExactStep, HubsStep, Keep, SampleStep, block_rows
from pipelines.nodes import Nodes
from pipelines.partition import PartitionStep
from pipelines.partitioned import LayoutStep, ListsStep, QuantizersStep, ScatterStep
from pipelines.recipe import JoinSettings
from pipelines.unit import Step

EXACT_UP_TO = 1_000_000
"""Nodes up to which `auto` joins exactly: at dimension 512 that is less than half an hour of one core."""
EXACT_AT_MOST = 16_000_000
"""Nodes that the exact engine takes: its forest holds 128 bytes a node in every worker."""
OPERATIONS_PER_SECOND = 3.8e11
"""Of one core: n**2 d over the CPU seconds of the exact join of 200,000 vectors (docs/benchmarks.md)."""
VECTORS_PER_LIST = 64
POINTS_PER_LIST = 10
MAX_LISTS = 65_536


@dataclass(frozen=True)
class Engine:
    """An engine with all its settings resolved; `why` tells how it was chosen.

    The `device` that multiplies is none of the values: products of integers are the same on all.
    """

    name: str
    values: dict[str, Any]
    why: str
    device: str = "auto"


def resolve(settings: JoinSettings, num_nodes: int, dim: int) -> Engine:
    """The engine for so many vectors of so many numbers. Raises ConfigError where there are too many for it."""
    name = settings.engine
    seconds = num_nodes**2 * dim / OPERATIONS_PER_SECOND
    told = f"{num_nodes:,} vectors (all pairs take one core about {_time(seconds)}"
    if name == "auto":
        name = "exact" if num_nodes <= EXACT_UP_TO else "partitioned"
        told += f"; auto joins exactly up to {EXACT_UP_TO:,} vectors"
    told += ")"
    if name == "exact":
        if num_nodes > EXACT_AT_MOST:
            raise ConfigError(
                f"the exact join takes at most {EXACT_AT_MOST:,} vectors, but there are {num_nodes:,}: "
                "set dedup.join.engine to partitioned"
            )
        return Engine(name, {"block_rows": block_rows(num_nodes)}, f"exact join of {told}", settings.device)
    if name == "faiss":
        values = {key: getattr(settings, key) for key in ("index", "nprobe", "k", "slack")}
        return Engine(name, values, f"FAISS index {settings.index}, {settings.k} nearest, of {told}")
    values = _partitioned(settings, num_nodes)
    how = "{quantizers} quantizers of {num_lists:,} lists, {lists_joined} joined".format(**values)
    return Engine(name, values, f"partitioned join, {how}, of {told}", settings.device)


def _partitioned(settings: JoinSettings, num_nodes: int) -> dict[str, Any]:
    near = 2 ** round(math.log2(max(1, num_nodes / VECTORS_PER_LIST)))
    num_lists = settings.num_lists or min(max(1, near), MAX_LISTS)
    return {
        "num_lists": num_lists,
        "lists_joined": min(settings.lists_joined, num_lists),
        "quantizers": settings.quantizers,
        "partition_rows": settings.partition_rows,
    }


def _time(seconds: float) -> str:
    for unit, size in (("days", 86_400.0), ("hours", 3_600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.0f} {unit}"
    return "a second" if seconds <= 1 else f"{math.ceil(seconds)} seconds"


@dataclass(frozen=True)
class Planned:
    """The steps of a join, and where what it leaves lies: sets of edges, and lists if it is partitioned."""

    steps: list[Step]
    edges: list[str]
    lists: str | None


def _device(engine: Engine) -> str:
    """`cuda` where it is asked for, or where this machine has a GPU."""
    if engine.device != "auto" or engine.name == "faiss":
        return engine.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def plan_join(engine: Engine, nodes: Nodes, threshold: float, keep: Keep, seed: int, out: str, prefix: str) -> Planned:
    """The steps that join `nodes`; working sets lie below `out`, their names begin with `prefix`."""

    def at(name: str) -> tuple[str, str, dict[str, Any], bool]:
        return storage.join(out, f"_{prefix}{name}"), f"{prefix}{name}".replace("_", " "), {}, False

    device = _device(engine)
    size = HUB_SAMPLE
    if engine.name == "partitioned":
        size = max(size, POINTS_PER_LIST * engine.values["num_lists"])
    sample = SampleStep(*at("sample"), nodes, size, seed, "join")
    hubs = HubsStep(*at("hubs"), sample.out)
    if engine.name == "exact":
        pairs = ExactStep(*at("pairs"), nodes, threshold, keep, hubs.out, device)
        return Planned([sample, hubs, pairs], [pairs.out], None)
    if engine.name == "faiss":
        index_settings = IndexSettings(*(engine.values[key] for key in ("index", "nprobe", "k", "slack")))
        index = IndexStep(*at("index"), nodes, sample.out, index_settings, keep)
        found = FaissStep(*at("pairs"), nodes, threshold, keep, index.out, index_settings)
        return Planned([sample, index, found], [found.out], None)
    values = engine.values
    m, count = values["lists_joined"], values["quantizers"]
    quantizers = QuantizersStep(*at("quantizers"), sample.out, values["num_lists"], count, seed, hubs.out)
    lists = ListsStep(*at("lists"), nodes, quantizers.out, m, device)
    layout = LayoutStep(*at("layout"), nodes, quantizers.out, lists.out, m, values["partition_rows"])
    steps: list[Step] = [sample, hubs, quantizers, lists, layout]

    def pairs_step(name: str, scattered: str | None, numbers: list[int]) -> PartitionStep:
        place = at(name)
        return PartitionStep(
            *place, nodes, threshold, keep, hubs.out, lists.out, layout.out, scattered, numbers, m, device
        )

    if len(nodes) <= values["partition_rows"]:
        pairs_of = pairs_step("pairs", None, list(range(count)))
        return Planned([*steps, pairs_of], [pairs_of.out], lists.out)
    edges = []
    for number in range(count):
        scatter = ScatterStep(*at(f"scatter_{number}"), nodes, lists.out, layout.out, number, m, keep)
        pairs_of = pairs_step(f"pairs_{number}", scatter.out, [number])
        steps += [scatter, pairs_of]
        edges.append(pairs_of.out)
    return Planned(steps, edges, lists.out)
