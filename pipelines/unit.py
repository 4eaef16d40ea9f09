"""Units and steps: how a stage is made into shard sets, resumed, refused or skipped.

A **unit** is a stage at work on given inputs (`filter` of one source, `dedup` of all pools). It is a short list of
**steps**; each step makes one shard set, one task a part. Some of the sets are the unit's outputs, the others are
working sets that are deleted once the outputs are complete. All of a unit's sets carry the fingerprint of the same
origin: what was read and how, never who did it or where.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pyarrow as pa

from curation import storage
from curation.errors import ConfigError, LvdError, PartialError
from curation.manifest import Commit, Input, Origin, part_name
from curation.shards import PartWriter, ShardSet
from pipelines.executor import Executor, Needs
from pipelines.progress import Progress

MAX_FAILURES = 20
"""Failed parts after which a step is given up: what fails this often fails for all."""


@dataclass
class Step(ABC):
    """Makes one shard set. Travels to the workers, so it holds settings and places, never data.

    Attributes:
        out: the URI of the set.
        kind: what its rows are.
        labels: what it is of: source, role, embedder.
        keep: whether it is an output of its unit, or deleted once the outputs are complete.
    """

    out: str
    kind: str
    labels: dict[str, Any]
    keep: bool

    @property
    def needs(self) -> Needs:
        """What a worker needs to make parts."""
        return Needs()

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The columns of the set."""

    @abstractmethod
    def num_parts(self) -> int:
        """How many parts it has; asked once the steps before it are complete."""

    @abstractmethod
    def write_part(self, part: int, writer: PartWriter) -> None:
        """Do the work of one part."""

    def info(self) -> dict[str, Any]:
        """What the manifest should tell a reader besides; no hash depends on it."""
        return {}

    def frees(self) -> list[str]:
        """URIs of working sets that no later step reads: deleted once this step is complete, to free their space."""
        return []

    def check(self) -> None:
        """Raise LvdError where what was made is not good enough for what follows; asked once it is complete."""
        return


class Unit(ABC):
    """A stage at work on given inputs."""

    stage: ClassVar[str]
    version: ClassVar[int] = 1

    @property
    @abstractmethod
    def title(self) -> str:
        """What to call it: `filter web`."""

    @abstractmethod
    def inputs(self) -> list[Input]:
        """What it reads, with the content; raises ConfigError for what is not complete."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The resolved settings that can change what comes out; JSON values."""

    @abstractmethod
    def steps(self) -> list[Step]:
        """The steps in order. Asked once the inputs are complete; must do no work of its own."""

    def notes(self) -> list[str]:
        """What was chosen for the user and why, one line each; told before the work begins."""
        return []

    def origin(self, step: Step, inputs: tuple[Input, ...]) -> Origin:
        """What the set of `step` is made from."""
        return Origin(step.kind, self.stage, self.version, self.config(), inputs, step.labels)


@dataclass(frozen=True)
class _Task:
    """The work of one part of one step, as the executor runs it."""

    step: Step
    fingerprint: str

    def __call__(self, part: int) -> Commit:
        done = _done(ShardSet(self.step.out), part, self.fingerprint)
        if done is not None:  # by a worker that was lost before it could say so
            return done
        with PartWriter(self.step.out, part, self.step.schema(), self.fingerprint) as writer:
            self.step.write_part(part, writer)
        assert writer.commit is not None
        return writer.commit


def set_input(uri: str, kind: str) -> Input:
    """A complete shard set as an input. Raises ConfigError when it is not complete or of another kind."""
    shard_set = ShardSet(uri).require(kind)
    labels = [str(shard_set.labels[key]) for key in ("embedder", "source") if key in shard_set.labels]
    return Input("/".join([kind, *labels]), shard_set.content, shard_set.uri)


def run_unit(unit: Unit, executor: Executor, progress: Progress, overwrite: bool = False) -> bool:
    """Bring the unit's outputs up to date; returns whether there was anything to do.

    Resumes what the same origin has begun. Raises ConfigError, with the difference, when another origin has made
    or begun the outputs and `overwrite` is not set; LvdError or PartialError when parts fail.
    """
    inputs = tuple(unit.inputs())
    steps = unit.steps()
    kept = [step for step in steps if step.keep]
    overwrite = overwrite or not any(_has_results(ShardSet(step.out)) for step in steps)
    for step in kept:
        check_origin(ShardSet(step.out), unit.origin(step, inputs), overwrite)
    if all(ShardSet(step.out).is_complete for step in kept):
        for step in kept:
            _relabel(ShardSet(step.out), step.labels)
        _delete_working_sets(steps)
        return False
    for step in kept:
        if ShardSet(step.out).begun() is None:
            ShardSet(step.out).begin(unit.origin(step, inputs))
    for note in unit.notes():
        progress.say(f"{unit.title}: {note}")
    for place, step in enumerate(steps):
        origin = unit.origin(step, inputs)
        check_origin(ShardSet(step.out), origin, overwrite=overwrite or not step.keep)
        if not ShardSet(step.out).is_complete and not _is_spent(step, steps[place + 1 :], unit, inputs):
            run_step(step, origin, unit.title, executor, progress)
        for uri in step.frees():
            ShardSet(uri).delete()
        step.check()
    _delete_working_sets(steps)
    return True


def _is_spent(step: Step, later: list[Step], unit: Unit, inputs: tuple[Input, ...]) -> bool:
    """Whether the step that frees this one's set is complete already, so that nothing will read it."""
    for other in later:
        if step.out in other.frees() and ShardSet(other.out).is_complete:
            return bool(ShardSet(other.out).manifest["fingerprint"] == unit.origin(other, inputs).fingerprint)
    return False


def _has_results(shard_set: ShardSet) -> bool:
    """Whether there is anything to lose: an attempt with a wrong setting that made no part is no hindrance."""
    return shard_set.is_complete or bool(shard_set.committed())


def _delete_working_sets(steps: list[Step]) -> None:
    for step in steps:
        if not step.keep:
            ShardSet(step.out).delete()


def _relabel(shard_set: ShardSet, labels: dict[str, Any]) -> None:
    """Labels are no part of the fingerprint: a source that has become a query set keeps its images."""
    if shard_set.labels != labels:
        shard_set.write_manifest({**shard_set.manifest, "labels": labels})


def check_origin(shard_set: ShardSet, origin: Origin, overwrite: bool) -> None:
    """Make way for a set of this origin: nothing there, or made from the same. Else delete it, or refuse."""
    if not storage.names(shard_set.uri):
        return
    begun = shard_set.begun()
    if begun is None:
        raise ConfigError(f"{shard_set.uri} is not empty and holds no shard set of ours; choose another place")
    if begun["fingerprint"] == origin.fingerprint:
        return
    if not overwrite:
        changes = "; ".join(differences(Origin.from_record(begun), origin))
        raise ConfigError(
            f"{shard_set.uri} was made from something else ({changes}); "
            "pass --overwrite to make it and what follows from it again"
        )
    shard_set.delete()


def differences(old: Origin, new: Origin) -> Iterator[str]:
    """What tells two origins apart, one phrase each."""
    if (old.stage, old.version) != (new.stage, new.version):
        yield f"{old.stage} version {old.version} -> {new.version}"
    before, after = dict(_flat("", old.config)), dict(_flat("", new.config))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}"
    was, now = {i.name: i.content for i in old.inputs}, {i.name: i.content for i in new.inputs}
    for name in sorted(was.keys() | now.keys()):
        if name not in now:
            yield f"input {name} is gone"
        elif name not in was:
            yield f"input {name} is new"
        elif was[name] != now[name]:
            yield f"input {name} has changed"


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else str(key), inner)
    else:
        yield prefix, value


def run_step(step: Step, origin: Origin, title: str, executor: Executor, progress: Progress) -> None:
    """Make the parts that are not there yet, then the manifest."""
    shard_set = ShardSet(step.out)
    if shard_set.begun() is None:
        shard_set.begin(origin)
    fingerprint = origin.fingerprint
    num_parts = step.num_parts()
    done = {part for part in shard_set.committed() if part < num_parts and _done(shard_set, part, fingerprint)}
    missing = (part for part in range(num_parts) if part not in done)
    failures: list[tuple[int, Exception]] = []
    made = 0
    progress.begin(title if step.keep else f"{title}: {step.kind}", num_parts, len(done))
    try:
        # What parts load and keep lies in the copy, so that it goes when they are done, as it does with a worker.
        for part, outcome in executor.map(_Task(copy(step), fingerprint), missing, step.needs):
            if isinstance(outcome, Exception):
                failures.append((part, outcome))
                if len(failures) >= MAX_FAILURES or _is_hopeless(outcome):
                    break
                continue
            made += 1
            progress.advance(outcome.rows + outcome.rejects)
    finally:
        progress.end()
    if failures:
        raise _failure(title, shard_set.uri, failures, len(done) + made, num_parts)
    shard_set.finish(origin, num_parts, step.info())


def _done(shard_set: ShardSet, part: int, fingerprint: str) -> Commit | None:
    """A part's commit if it is of this origin: a worker of an earlier run may have outlived its driver."""
    commit = shard_set.commit(part)
    return commit if commit is not None and commit.fingerprint == fingerprint else None


def _is_hopeless(error: Exception) -> bool:
    """Whether the other parts will meet the same: a full disk, a wrong setting, missing weights."""
    return isinstance(error, ConfigError | storage.StorageFullError | ImportError)


def _failure(title: str, uri: str, failures: list[tuple[int, Exception]], done: int, num_parts: int) -> LvdError:
    part, error = failures[0]
    what = str(error) if isinstance(error, LvdError) else f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, ConfigError):
        return ConfigError(f"{title}: {what}")
    line = f"{title}: {part_name(part)} of {uri} failed: {what}"
    if done:
        return PartialError(f"{line} ({done} of {num_parts} parts are done and kept; run again to resume)")
    return LvdError(line)
