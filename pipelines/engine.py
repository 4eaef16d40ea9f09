"""Which engine joins, with which settings, and why: resolved before a join begins, and told to the user.

A join is one list of steps, whatever the engine: nodes in, sets of edges out.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

from curation import storage
from curation.errors import ConfigError
from curation.products import takes_int8
from pipelines.faiss_join import FaissStep, IndexSettings, IndexStep
from pipelines.flat import FlatStep, LeadsStep, bytes_flat
from pipelines.in_place import InPlaceStep
from pipelines.join import HUB_SAMPLE, ExactStep, HubsStep, Keep, SampleStep, block_rows
from pipelines.nodes import Nodes
from pipelines.partition import PartitionStep
from pipelines.partitioned import POINTS_PER_LIST, LayoutStep, ListsStep, QuantizersStep, ScatterStep
from pipelines.recipe import JoinSettings
from pipelines.unit import Step

EXACT_UP_TO = 1_000_000
"""Nodes up to which `auto` joins exactly: at dimension 512 that is less than half an hour of one core."""
EXACT_AT_MOST = 16_000_000
"""Nodes that the exact engine takes: its forest holds 128 bytes a node in every worker."""
OPERATIONS_PER_SECOND = 3.8e11
"""Of one core: n**2 d over the CPU seconds of the exact join of 200,000 vectors (docs/benchmarks.md)."""
VECTORS_PER_LIST = 512
"""Of lists this long a sieve drops most in a few cycles a pair; shorter ones take longer to rank than to compare."""
LISTS_JOINED = 24
LEAST_QUANTIZERS, QUANTIZERS_AT_A_MILLION, QUANTIZERS_PER_TENFOLD = 3, 5, 3
"""More nodes have more borders between those alike. More quantizers find more than more lists at the same cost
(docs/benchmarks.md)."""
MAX_LISTS = 65_536
SLOW = (
    "this machine multiplies codes in float32, several times slower than one with int8 instructions (VNNI, AMX), for "
    "which times are given"
)
TELLS_SLOW_FROM = 60.0
"""Seconds of work from which a user is told of a slow machine."""
CACHED = 0.75
"""Share of this machine's memory that vectors and codes may take to be joined in place."""


@dataclass(frozen=True)
class Engine:
    """An engine with all its settings resolved; `why` tells how it was chosen.

    All pairs would take one core about `seconds`, infinitely many where nobody estimated them.
    The `device` that multiplies is none of the values, since products of integers are the same on all; nor is whether
    a partitioned join is made `in_place`: the same pairs meet where they lie and where they travel to.
    """

    name: str
    values: dict[str, Any]
    why: str
    device: str = "auto"
    in_place: bool | None = None
    seconds: float = math.inf

    def notes(self) -> list[str]:
        """What the user is told before work begins, one line each."""
        is_told = self.name != "faiss" and self.seconds >= TELLS_SLOW_FROM
        return [self.why, SLOW] if is_told and self.resolved_device == "cpu" and not takes_int8() else [self.why]

    @property
    def resolved_device(self) -> str:
        """`cuda` where it is asked for, or where this machine has a GPU."""
        if self.device != "auto" or self.name == "faiss":
            return self.device
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"


def resolve(settings: JoinSettings, num_nodes: int, dim: int) -> Engine:
    """The engine for so many vectors of so many numbers. Raises ConfigError where there are too many for it."""
    name = settings.engine
    seconds = num_nodes**2 * dim / OPERATIONS_PER_SECOND
    told = f"{num_nodes:,} vectors (all pairs take one core about {spoken_time(seconds)}"
    if name == "auto":
        name = "exact" if num_nodes <= EXACT_UP_TO else "partitioned"
        told += f"; auto joins exactly up to {EXACT_UP_TO:,} vectors"
    told += ")"
    if not num_nodes:  # nothing to fit lists or an index on
        name = "exact"
    if name == "exact":
        if num_nodes > EXACT_AT_MOST:
            raise ConfigError(
                f"the exact join takes at most {EXACT_AT_MOST:,} vectors, but there are {num_nodes:,}: "
                "set dedup.join.engine to partitioned"
            )
        return Engine(
            name, {"block_rows": block_rows(num_nodes)}, f"exact join of {told}", settings.device, seconds=seconds
        )
    if name == "faiss":
        values = {key: getattr(settings, key) for key in ("index", "nprobe", "k", "slack")}
        return Engine(name, values, f"FAISS index {settings.index}, {settings.k} nearest, of {told}")
    values = _partitioned(settings, num_nodes)
    how = "{quantizers} quantizers of {num_lists:,} lists, {lists_joined} joined".format(**values)
    why = f"partitioned join, {how}, of {told}"
    return Engine(name, values, why, settings.device, settings.in_place, seconds)


def _partitioned(settings: JoinSettings, num_nodes: int) -> dict[str, Any]:
    near = 2 ** round(math.log2(max(1, num_nodes / VECTORS_PER_LIST)))
    num_lists = settings.num_lists or min(max(1, near), MAX_LISTS)
    tenfolds = math.log10(max(1, num_nodes) / 1e6)
    quantizers = max(LEAST_QUANTIZERS, round(QUANTIZERS_AT_A_MILLION + QUANTIZERS_PER_TENFOLD * tenfolds))
    return {
        "num_lists": num_lists,
        "lists_joined": min(settings.lists_joined or LISTS_JOINED, num_lists),
        "quantizers": settings.quantizers or quantizers,
        "partition_rows": settings.partition_rows,
    }


def spoken_time(seconds: float) -> str:
    """A time as one says it: `3 hours`, `40 seconds`, `a second`."""
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


def _is_in_place(engine: Engine, nodes: Nodes, out: str) -> bool:
    """Whether vectors are mapped where they lie: as asked, or where `out` is local and memory caches most of them."""
    if engine.in_place is not None:
        return engine.in_place
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return storage.is_local(out) and bytes_flat(len(nodes), nodes.vectors.dim) <= CACHED * memory


def plan_join(engine: Engine, nodes: Nodes, threshold: float, keep: Keep, seed: int, out: str, prefix: str) -> Planned:
    """The steps that join `nodes`; working sets lie below `out`, their names begin with `prefix`."""

    def at(name: str) -> tuple[str, str, dict[str, Any], bool]:
        return storage.join(out, f"_{prefix}{name}"), f"{prefix}{name}".replace("_", " "), {}, False

    device = engine.resolved_device
    size = HUB_SAMPLE
    if engine.name == "partitioned":
        size = max(size, POINTS_PER_LIST * engine.values["num_lists"] * engine.values["quantizers"])
    sample = SampleStep(*at("sample"), nodes, size, seed, "join")
    hubs = HubsStep(*at("hubs"), sample.out)
    if engine.name == "exact":
        # One block compares all that it holds anyway, and references are compared with every image.
        hubs_help = keep == "forest" and len(nodes) > block_rows(len(nodes))
        pairs = ExactStep(*at("pairs"), nodes, threshold, keep, hubs.out if hubs_help else None, device)
        return Planned([sample, hubs, pairs] if hubs_help else [pairs], [pairs.out], None)
    if engine.name == "faiss":
        index_settings = IndexSettings(*(engine.values[key] for key in ("index", "nprobe", "k", "slack")))
        index = IndexStep(*at("index"), nodes, sample.out, index_settings, keep)
        found = FaissStep(*at("pairs"), nodes, threshold, keep, index.out, index_settings)
        return Planned([sample, index, found], [found.out], None)
    values = engine.values
    m, count = values["lists_joined"], values["quantizers"]
    quantizers = QuantizersStep(*at("quantizers"), sample.out, values["num_lists"], count, seed, hubs.out)
    lists = ListsStep(*at("lists"), nodes, quantizers.out, m, device)
    steps: list[Step] = [sample, hubs, quantizers, lists]
    if _is_in_place(engine, nodes, out):
        flat = FlatStep(*at("flat"), nodes, threshold, hubs.out if keep == "forest" else None, device)
        leads = LeadsStep(*at("leads"), flat.out, threshold, keep == "forest")
        sets = hubs.out, flat.out, leads.out, lists.out
        met = InPlaceStep(*at("pairs"), nodes, threshold, keep, *sets, values["num_lists"], count, m, device)
        return Planned([*steps, flat, leads, met], [met.out], lists.out)
    layout = LayoutStep(*at("layout"), nodes, quantizers.out, lists.out, values["partition_rows"])
    steps.append(layout)
    edges = []
    for number in range(count):
        scatter = ScatterStep(*at(f"scatter_{number}"), nodes, lists.out, layout.out, number, m, keep)
        place = at(f"pairs_{number}")
        pairs_of = PartitionStep(*place, nodes, threshold, keep, hubs.out, layout.out, scatter.out, number, m, device)
        steps += [scatter, pairs_of]
        edges.append(pairs_of.out)
    return Planned(steps, edges, lists.out)
