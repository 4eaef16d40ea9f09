"""What a user is shown of chaining: components by size, the largest of them, and what other thresholds would keep.

Components are transitive (DINOv2, appendix A.3), so a threshold that is too low shows as one component of images that
have nothing in common. Components are read from dedup's verdicts, one row group at a time. The curve is read from the
stored forest alone, without another join: it holds the edges, 20 bytes each, and what `curation.chaining.curve` holds
to sort and join them (50 bytes an edge and 4 a node).
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from curation import chaining
from curation.errors import ConfigError
from curation.forest import Edges
from curation.shards import GROUP_ROWS, ShardSet
from pipelines.join import stream_edges

Int64 = npt.NDArray[np.int64]

LAST_THRESHOLD = 0.98
THRESHOLD_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.025, 0.05, 0.1, 0.2)
MAX_STEPS = 16.5
"""Steps from the base threshold to the last: 16, and half a one for rounding."""
SHOWN_COMPONENTS = 5
SHOWN_MEMBERS = 5


class SizeClass(NamedTuple):
    """How many components have `low` to `high` images, and how many images those are."""

    low: int
    high: int
    components: int
    images: int


class Point(NamedTuple):
    """What dedup would keep at a threshold: images, and the size of its largest component."""

    threshold: float
    kept: int
    largest: int


class Member(NamedTuple):
    """An image of a component; `component` is the smallest number among its images, `size` how many they are."""

    component: int
    size: int
    source: str
    image_id: str


class _Piece(NamedTuple):
    """Some verdicts in a row, from row `row` of a part on, which is image `number` of all; int64 columns."""

    shard_set: ShardSet
    part: int
    row: int
    number: int
    component: Int64
    size: Int64

    @property
    def is_first(self) -> npt.NDArray[np.bool_]:
        """Whether the image is the first of its component: each component has one."""
        first: npt.NDArray[np.bool_] = self.component == np.arange(self.number, self.number + len(self.component))
        return first


def pool_sources(manifest: dict[str, Any]) -> list[str]:
    """Sources of the pools that a set of dedup was made from, in the order that numbers their images through."""
    return [name.split("/")[-1] for name in pool_names(manifest)]


def pool_names(manifest: dict[str, Any]) -> list[str]:
    """Names of the pools' embeddings (`embeddings/default/web`) that a set of dedup was made from, in that order."""
    names = [str(record["name"]) for record in manifest["inputs"]]
    num_pools = sum(name.startswith("images/") for name in names)  # of pools, unlike references, images are read too
    return [name for name in names if name.startswith("embeddings/")][:num_pools]


def check_curve(preset: str) -> None:
    """Refuse (ConfigError) a preset whose edges tell nothing of other thresholds."""
    if preset == "semdedup":
        raise ConfigError(
            "preset semdedup has no curve: it keeps one edge of each image it drops, which tells nothing of other "
            "thresholds; run dedup at each of them, or with preset paper"
        )


def thresholds(base: float) -> list[float]:
    """The base threshold and round ones above it up to LAST_THRESHOLD, about 10 to 17 in all, ascending."""
    if base >= LAST_THRESHOLD:
        return [base]
    step = next((s for s in THRESHOLD_STEPS if (LAST_THRESHOLD - base) / s <= MAX_STEPS), THRESHOLD_STEPS[-1])
    between = (round(n * step, 4) for n in range(math.floor(base / step), math.ceil(LAST_THRESHOLD / step)))
    return [base, *(t for t in between if base < t < LAST_THRESHOLD), LAST_THRESHOLD]


def curve(forest: ShardSet, num_images: int) -> list[Point]:
    """What dedup of the pools alone would keep at its own threshold and above, with the same `max_component`.

    Raises ConfigError for a forest of preset semdedup, LvdError where the forest names other images or is none.
    """
    config = forest.manifest["config"]
    check_curve(config["preset"])
    a, b, similarity = _edges(forest)
    if config["max_component"] is not None:
        # An edge is cut for the size of the component that stronger edges and it create: so at every threshold the
        # edges that stay are those that stay here.
        stays = chaining.capped(a, b, similarity, num_images, config["max_component"])
        a, b, similarity = a[stays], b[stays], similarity[stays]
    at = thresholds(config["threshold"])
    kept, largest = chaining.curve(a, b, similarity, num_images, at)
    return [Point(*values) for values in zip(at, kept.tolist(), largest.tolist(), strict=True)]


def _edges(forest: ShardSet) -> Edges:
    """All edges of a forest, in arrays that are filled piece by piece."""
    count = forest.num_rows
    a, b, similarity = np.empty(count, np.int64), np.empty(count, np.int64), np.empty(count, np.float32)
    start = 0
    for piece in stream_edges([forest.uri]):
        rows = slice(start, start + len(piece[0]))
        a[rows], b[rows], similarity[rows] = piece
        start = rows.stop
    return a, b, similarity


def num_components(duplicates: list[ShardSet]) -> int:
    """Components of all pools, from their verdicts in the pools' order."""
    return sum(int(piece.is_first.sum()) for piece in _pieces(duplicates, 0))


def components(duplicates: list[ShardSet]) -> tuple[list[SizeClass], list[Member]]:
    """Components by size, and the first members of the largest that have more than one image.

    Classes are 1, 2, 3-4, 5-8 and so on in powers of two, those that have components in them. Components come by
    (size descending, number). Holds a number for each size there is; reads the verdicts twice at most.

    Args:
        duplicates: the verdicts on all pools, in the order that numbers their images through.
    """
    images_of_size: Counter[int] = Counter()
    top: list[tuple[int, int]] = []
    for piece in _pieces(duplicates, 0):
        sizes, images = np.unique(piece.size, return_counts=True)
        for size, count in zip(sizes.tolist(), images.tolist(), strict=True):
            images_of_size[size] += count
        least = -top[-1][0] if len(top) == SHOWN_COMPONENTS else 1
        rows = np.flatnonzero(piece.is_first & (piece.size > least))  # of equals the first stays
        found = zip((-piece.size[rows]).tolist(), piece.component[rows].tolist(), strict=True)
        top = sorted([*top, *found])[:SHOWN_COMPONENTS]
    return _size_classes(images_of_size), _members(duplicates, {number: -size for size, number in top})


def _size_classes(images_of_size: Counter[int]) -> list[SizeClass]:
    classes: dict[int, SizeClass] = {}
    for size, images in sorted(images_of_size.items()):
        bits = (size - 1).bit_length()
        known = classes.get(bits, SizeClass(2**bits // 2 + 1, 2**bits, 0, 0))
        added = known.components + images // size, known.images + images
        classes[bits] = SizeClass(known.low, known.high, *added)
    return list(classes.values())


def _members(duplicates: list[ShardSet], sizes: dict[int, int]) -> list[Member]:
    """The first SHOWN_MEMBERS images of each component, `sizes` being theirs by number and in the order wanted."""
    found: dict[int, list[Member]] = {number: [] for number in sizes}
    missing = {number: min(size, SHOWN_MEMBERS) for number, size in sizes.items()}
    for piece in _pieces(duplicates, min(sizes, default=0)):
        if not missing:
            break
        for number, count in list(missing.items()):
            for row in np.flatnonzero(piece.component == number)[:count].tolist():
                found[number].append(Member(number, sizes[number], piece.shard_set.source, _image_id(piece, row)))
                missing[number] -= 1
            if not missing[number]:
                del missing[number]
    return [member for members in found.values() for member in members]


def _image_id(piece: _Piece, row: int) -> str:
    at = piece.row + row
    return str(piece.shard_set.read_rows(piece.part, at, at + 1, ["image_id"])["image_id"][0].as_py())


def _pieces(duplicates: list[ShardSet], first: int) -> Iterator[_Piece]:
    """All verdicts in order but for the parts that end before image `first`; one row group is held at a time."""
    number = 0
    for shard_set in duplicates:
        for part, rows in enumerate(shard_set.rows_per_part.tolist()):
            row = 0
            if number + rows > first:
                for table in shard_set.stream(part, ["component", "component_size"], GROUP_ROWS):
                    columns = (table[name].to_numpy() for name in ("component", "component_size"))
                    yield _Piece(shard_set, part, row, number + row, *columns)
                    row += table.num_rows
            number += rows
