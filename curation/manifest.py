"""What is written beside a set's parts: what it is made from, what each task made, and what follows for the whole.

A set's `fingerprint` says what it is made from; its `content` says what came out. Plain records and their hashes;
where they lie is for `curation.shards`.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from curation import storage
from curation.errors import ConfigError
from curation.hashing import digest

FORMAT = 1


def part_name(part: int) -> str:
    """`part-00042`."""
    return f"part-{part:05d}"


@dataclass(frozen=True)
class Input:
    """One thing a set was made from.

    Attributes:
        name: what it is; in the fingerprint.
        content: its hash; in the fingerprint.
        uri: where it lay, for shard sets.
        stat: sizes and times of raw files, so that they need not be read again to be known.
    """

    name: str
    content: str
    uri: str = ""
    stat: str = ""


@dataclass(frozen=True)
class Origin:
    """What a set is made from. Everything here but `labels` and the inputs' places is in the fingerprint.

    Attributes:
        kind: what the rows are: `images`, `embeddings`, ...
        stage: the stage that makes it.
        version: raised whenever the stage's code changes what comes out.
        config: the resolved settings that can change its bytes.
        inputs: what was read.
        labels: what the set is of: source, role, embedder.
    """

    kind: str
    stage: str
    version: int
    config: dict[str, Any]
    inputs: tuple[Input, ...]
    labels: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over what can change the set's bytes."""
        inputs = [[i.name, i.content] for i in self.inputs]
        return digest([FORMAT, self.kind, self.stage, self.version, self.config, inputs])

    def record(self, directory: str) -> dict[str, Any]:
        """This as JSON, places of inputs written relative to `directory`, so that a run can be moved."""
        inputs = [asdict(replace(i, uri=storage.relative(i.uri, directory) if i.uri else "")) for i in self.inputs]
        return {
            "format": FORMAT,
            "kind": self.kind,
            "stage": self.stage,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "labels": self.labels,
            "config": self.config,
            "inputs": inputs,
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Origin":
        """The origin a manifest or `_begun.json` tells of; places of inputs stay as written."""
        inputs = tuple(Input(**i) for i in record["inputs"])
        return cls(record["kind"], record["stage"], record["version"], record["config"], inputs, record["labels"])


@dataclass(frozen=True)
class Commit:
    """What one task made: the proof that its part is whole."""

    part: int
    fingerprint: str
    rows: int
    bytes: int
    sha256: str
    rejects: int
    rejects_bytes: int
    rejects_sha256: str | None
    reasons: dict[str, int]
    retryable: int
    seconds: float

    @property
    def line(self) -> str:
        """The part's share of the set's content."""
        return f"{self.part} {self.sha256} {self.rejects_sha256}\n"


def checksum(record: dict[str, Any]) -> str:
    """What a manifest's `checksum` must be: the digest of all the rest of it."""
    return digest({key: value for key, value in record.items() if key != "checksum"})


def totals(uri: str, num_parts: int, commit_of: Callable[[int], Commit | None]) -> dict[str, Any]:
    """The manifest's figures from the commits of parts 0 to num_parts - 1: rows, rejects by reason, bytes, content.

    Raises ConfigError where a commit is missing. Holds one number a part.
    """
    content = hashlib.sha256()
    rows_per_part: list[int] = []
    reasons: dict[str, int] = {}
    sums = {"bytes": 0, "rejects": 0, "retryable": 0}
    seconds = 0.0
    for part in range(num_parts):
        commit = commit_of(part)
        if commit is None:
            raise ConfigError(f"{uri}: {part_name(part)} has no commit")
        content.update(commit.line.encode())
        rows_per_part.append(commit.rows)
        sums["bytes"] += commit.bytes + commit.rejects_bytes
        sums["rejects"] += commit.rejects
        sums["retryable"] += commit.retryable
        seconds += commit.seconds
        for reason, count in commit.reasons.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return {
        **sums,
        "rows": sum(rows_per_part),
        "rows_per_part": rows_per_part,
        "reasons": dict(sorted(reasons.items())),
        "seconds": round(seconds, 3),
        "content": content.hexdigest(),
    }
