"""The rounds: in each, every series; in each, every operation on every subject in turn.

All subjects of a series are mounted at once, each on a tree of its own, and all of them do one
operation before the first does the next. A busy neighbour makes a whole machine slower for seconds
(1.6 times, for an interpreter that loses its share of the caches); like this it slows all subjects
down alike, and the ratios stand. Each round mounts anew and lets another subject begin.

One that fails says why in `Results.problems` and is not tried again.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.operations import (
    CHURN,
    CHURN_FILES,
    CROWD,
    CROWD_FILES,
    FIRST_READ,
    OPERATIONS,
    RSS_CHURN,
    RSS_CROWD,
    RSS_IDLE,
    WIDE,
    lay_out_tree,
    make_crowd,
)
from benchmarks.peers import Unavailable
from benchmarks.processes import Failure, Hung, Mounted, Timing, mounted, pin, run_load
from benchmarks.subjects import SUBJECTS, Stage, Subject
from benchmarks.trees import WORKLOADS, Workload, lay_out_trees, run_workload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.series import Series

__all__ = ["Plan", "Results", "run"]


#: Seconds after a command until all that a subject does later is done, and cannot slow the next one
#: down: the relay gives the handles of 5,000 files back a second after opens, which takes 0.1 s.
SETTLING = 1.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run.

    Attributes:
        series: The tables to fill.
        subjects: Names of the subjects that may take part.
        operations: Names of the operations that may be run.
        rounds: How often each is measured.
        cpu: The processor for pinned series.
        unpinned: Pin nothing at all, whatever the series say.
        share: The part of each operation's count to run, 0 to 1.
        churn: Whether to run the thousands of files.
    """

    series: Sequence[Series]
    subjects: frozenset[str]
    operations: frozenset[str]
    rounds: int
    cpu: int
    unpinned: bool = False
    share: float = 1.0
    churn: bool = True

    def is_pinned(self, series: Series) -> bool:
        return series.pinned and not self.unpinned


@dataclass(slots=True)
class Results:
    """What came out; keys are (series, subject, quantity) or (series, subject).

    Attributes:
        values: One number per round, in the quantity's unit.
        timings: The load generator's words behind those that it measured.
        memory: All lines about memory, by the moment of looking.
        problems: Why something is missing. The quantity is empty where all of a subject is.
    """

    values: dict[tuple[str, str, str], list[float]] = field(default_factory=dict)
    timings: dict[tuple[str, str, str], list[Timing]] = field(default_factory=dict)
    memory: dict[tuple[str, str, str], dict[str, float]] = field(default_factory=dict)
    problems: dict[tuple[str, str, str], str] = field(default_factory=dict)

    def add(self, series: str, subject: str, quantity: str, value: float) -> None:
        self.values.setdefault((series, subject, quantity), []).append(value)

    def median(self, series: str, subject: str, quantity: str) -> float | None:
        values = self.values.get((series, subject, quantity))
        return median(values) if values else None

    def ratio(
        self, series: str, subject: str, peer: str, quantity: str, other: str = ""
    ) -> float | None:
        """How many times the peer's value: the median of the rounds' ratios.

        Of the same quantity, or of the ``other`` one.

        Not the ratio of the medians: what slows one round down slows both of its values.
        """
        own = self.values.get((series, subject, quantity), [])
        others = self.values.get((series, peer, other or quantity), [])
        # One that fails is not tried again, so the shorter list has the first rounds.
        ratios = [value / other for value, other in zip(own, others, strict=False)]
        return median(ratios) if ratios else None


@dataclass(frozen=True, slots=True)
class Actor:
    """A subject on its stage.

    Attributes:
        subject: Who it is.
        root: Where its tree is to be seen.
        source: Where it really is.
        mount: Its process; None for the native one.
    """

    subject: Subject
    root: Path
    source: Path
    mount: Mounted | None


def run(plan: Plan, results: Results, work: Path) -> None:
    """Fill in ``results``; what is there when this is interrupted is whole and may be reported.

    Args:
        plan: What to do.
        results: Filled in as numbers come.
        work: An empty folder for trees and mounts; best on a tmpfs.
    """
    cast = {series.name: _prepare(plan, results, series) for series in plan.series}
    for number in range(1, plan.rounds + 1):
        for series in plan.series:
            begun = time.monotonic()
            subjects = cast[series.name]
            first = (number - 1) % max(1, len(subjects))
            if series.commands:
                _command(plan, results, series, subjects[first:] + subjects[:first], work)
                _say(
                    f"round {number}/{plan.rounds}, {series.name}: {time.monotonic() - begun:.0f} s"
                )
                continue
            with _acting(
                plan, results, series, subjects[first:] + subjects[:first], work
            ) as actors:
                _measure(plan, results, series, actors)
                if number == plan.rounds and plan.churn and series.churn:
                    _crowd(results, series, actors)
                    _churn(results, series, actors)
            _say(
                f"round {number}/{plan.rounds}, {series.name}: {len(actors)} subjects, "
                f"{time.monotonic() - begun:.0f} s"
            )


def _prepare(plan: Plan, results: Results, series: Series) -> list[Subject]:
    """Bring what each subject needs; who takes part, in order."""
    cast = []
    for subject in (SUBJECTS[name] for name in series.subjects if name in plan.subjects):
        try:
            subject.prepare()
        except Unavailable as reason:
            _problem(results, (series.name, subject.name, ""), f"skipped: {reason}")
        else:
            cast.append(subject)
    return cast


@contextmanager
def _acting(
    plan: Plan, results: Results, series: Series, subjects: Sequence[Subject], work: Path
) -> Iterator[list[Actor]]:
    """All subjects on stage, each on a fresh tree; gone with their trees at the end."""
    pin(plan.cpu if plan.is_pinned(series) else None)
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(dir=work, ignore_cleanup_errors=True)
        )
        shown = lay_out_trees(work) if series.commands else None
        entered = [
            _enter(stack.enter_context(ExitStack()), plan, results, series, subject, folder, shown)
            for subject in subjects
            if (series.name, subject.name, "") not in results.problems
        ]
        yield [actor for actor in entered if actor]


def _enter(
    stack: ExitStack,
    plan: Plan,
    results: Results,
    series: Series,
    subject: Subject,
    folder: str,
    shown: Path | None,
) -> Actor | None:
    home = Path(folder, subject.name)
    cpu = plan.cpu if plan.is_pinned(series) else None
    stage = Stage(shown or home / "source", home / "mount", series.cache, cpu)
    stage.mountpoint.mkdir(parents=True)
    if shown is None:
        stage.source.mkdir()
        lay_out_tree(stage.source, wide=WIDE in plan.operations.intersection(series.operations))
    try:
        command = stack.enter_context(subject.command(stage))
        if not command:
            return Actor(subject, stage.source, stage.source, None)
        mount = stack.enter_context(mounted(command, stage.mountpoint, home / "log"))
        memory = mount.resident()
    # AssertionError: a daemon that did not come up.
    except (Failure, AssertionError) as failure:
        lines = str(failure).splitlines()  # with a traceback in between, perhaps
        words = " ... ".join(dict.fromkeys((lines[0], lines[-1])))
        _problem(results, (series.name, subject.name, ""), f"failed: {words}")
        stack.close()
        return None
    if series.commands:  # mounted several times a round
        return Actor(subject, stage.mountpoint, stage.source, mount)
    results.add(series.name, subject.name, FIRST_READ.name, mount.first_read_ms)
    results.add(series.name, subject.name, RSS_IDLE.name, memory["VmRSS"])
    results.memory[series.name, subject.name, RSS_IDLE.name] = memory
    return Actor(subject, stage.mountpoint, stage.source, mount)


def _measure(plan: Plan, results: Results, series: Series, actors: Sequence[Actor]) -> None:
    for name in series.operations:
        if name not in plan.operations:
            continue
        operation = OPERATIONS[name]
        count = max(1, int(operation.count * plan.share))
        for actor in actors:
            timing = _load(results, series, actor, name, count)
            if timing is not None:
                mean = timing.mean_us
                value = 1e6 / mean if operation.quantity.more_is_better else mean
                results.add(series.name, actor.subject.name, name, value)


def _command(
    plan: Plan, results: Results, series: Series, subjects: Sequence[Subject], work: Path
) -> None:
    """Each command on each subject in turn, on mounts of its own: cold and, right after, warm."""
    for workload in WORKLOADS.values():
        if plan.operations.intersection(series.operations).intersection(workload.rows):
            with _acting(plan, results, series, subjects, work) as actors:
                for actor in actors:
                    _run_command(results, series, actor, workload, work)
                    time.sleep(SETTLING)


def _run_command(
    results: Results, series: Series, actor: Actor, workload: Workload, work: Path
) -> None:
    name = actor.subject.name
    if (series.name, name, next(iter(workload.rows))) in results.problems:
        return
    try:
        took = run_workload(workload, work, actor.root, name)
    except Failure as failure:
        for row in [""] if isinstance(failure, Hung) else workload.rows:
            _problem(results, (series.name, name, row), f"failed: {failure}")
        _check_alive(results, (series.name, name, ""), actor)
        return
    for row, milliseconds in took.items():
        results.add(series.name, name, row, milliseconds)


def _churn(results: Results, series: Series, actors: Sequence[Actor]) -> None:
    """Thousands of files come and go; the process's memory is looked at after each step."""
    for actor in actors:
        if actor.mount is None or not actor.subject.churn:
            continue
        name = actor.subject.name
        try:
            looks = [
                actor.mount.resident()
                for step in CHURN
                if _load(results, series, actor, step, CHURN_FILES)
            ]
        except Failure as failure:
            _problem(results, (series.name, name, RSS_CHURN.name), f"failed: {failure}")
            continue
        if len(looks) == len(CHURN):
            for step, memory in zip(CHURN, looks, strict=True):
                results.memory[series.name, name, step] = memory
            highest = max(memory["VmRSS"] for memory in looks)
            results.add(series.name, name, RSS_CHURN.name, highest)


def _crowd(results: Results, series: Series, actors: Sequence[Actor]) -> None:
    """A hundred thousand files are listed; memory is looked at before anything else happens."""
    for actor in actors:
        if actor.mount is None or not actor.subject.crowd:
            continue
        name = actor.subject.name
        make_crowd(actor.source)
        try:
            if _load(results, series, actor, CROWD, CROWD_FILES):
                memory = actor.mount.resident()
                results.memory[series.name, name, CROWD] = memory
                results.add(series.name, name, RSS_CROWD.name, memory["VmRSS"])
        except Failure as failure:
            _problem(results, (series.name, name, RSS_CROWD.name), f"failed: {failure}")


def _load(
    results: Results, series: Series, actor: Actor, operation: str, count: int
) -> Timing | None:
    """Run one operation; None when it failed now or earlier, or its subject did."""
    whole = (series.name, actor.subject.name, "")
    key = (series.name, actor.subject.name, operation)
    if whole in results.problems or key in results.problems:
        return None
    try:
        timing = run_load(operation, series.warm, count, actor.root)
    except Failure as failure:
        # After a hang, its other operations would only take as long, one after the other.
        _problem(results, whole if isinstance(failure, Hung) else key, f"failed: {failure}")
        _check_alive(results, whole, actor)
    else:
        results.timings.setdefault(key, []).append(timing)
        return timing
    return None


def _check_alive(results: Results, whole: tuple[str, str, str], actor: Actor) -> None:
    try:
        if actor.mount is not None:
            actor.mount.check()
    except Failure as failure:
        _problem(results, whole, f"failed: {failure}")


def _problem(results: Results, key: tuple[str, str, str], reason: str) -> None:
    results.problems[key] = reason
    _say(f"{' '.join(word for word in key if word)}: {reason}")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
