"""Names and draws: the id of an image, digests of settings, and keyed hashes in the place of random streams.

A draw depends on (seed, purpose, image_id) alone, so it is the same whoever makes it, in whatever order, on
however many machines; "random" means lowest keyed hash.
"""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

ID_HEX = 32
"""Length of an image_id: the first 128 bits of a SHA-256 as lower-case hex."""

_U64 = np.uint64


def image_id(data: bytes) -> str:
    """Name of an image: the first 128 bits of the SHA-256 of its bytes as fetched, lower-case hex."""
    return hashlib.sha256(data).hexdigest()[:ID_HEX]


def digest(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of `value`; raises TypeError for what JSON cannot hold."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def id_words(ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """Image ids as numbers: uint64 [n, 2], most significant word first. Raises ValueError for anything but hex."""
    raw = bytes.fromhex("".join(ids))
    return np.frombuffer(raw, dtype=">u8").astype(_U64).reshape(-1, 2)


def id_sum(words: npt.NDArray[np.uint64]) -> int:
    """Sum of ids modulo 2**128: equal for equal multisets of rows, whatever their order."""
    high = int(words[:, 0].sum(dtype=object)) if len(words) else 0
    low = int(words[:, 1].sum(dtype=object)) if len(words) else 0
    return ((high << 64) + low) % (1 << 128)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of SplitMix64: a bijection on 64 bits in which every input bit reaches every output bit."""
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def keyed_hash(
    seed: int, purpose: str, words: npt.NDArray[np.uint64], copy: int | npt.NDArray[np.integer] = 0
) -> npt.NDArray[np.uint64]:
    """One 64-bit draw per image.

    Args:
        seed: the recipe's seed.
        purpose: what the draw is for; draws for different purposes are independent.
        words: ids as `id_words` gives them, uint64 [n, 2].
        copy: number of the copy of an image, one for all or one each, int [n].

    Returns:
        uint64 [n], uniform over 64 bits.
    """
    key = hashlib.blake2b(purpose.encode(), digest_size=16, salt=(seed % (1 << 64)).to_bytes(8, "big")).digest()
    first, second = (_U64(int.from_bytes(key[i : i + 8], "big")) for i in (0, 8))
    copies = np.asarray(copy, dtype=np.int64).astype(_U64)
    mixed = _mix(words[:, 0] ^ first)
    mixed = _mix(mixed ^ words[:, 1])
    return _mix((mixed + copies) ^ second)


def bucket_of(values: npt.NDArray[np.uint64], num_buckets: int) -> npt.NDArray[np.int64]:
    """The range of equal width over 64 bits, int64 [n], that each value lies in; keeps order. num_buckets < 2**31."""
    return (((values >> _U64(32)) * _U64(num_buckets)) >> _U64(32)).astype(np.int64)
