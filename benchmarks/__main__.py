"""The command line of the benchmark: what to run, and where the results go."""

from __future__ import annotations

import argparse
import compileall
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import vfsmount
from benchmarks import million
from benchmarks.machine import describe
from benchmarks.operations import OPERATIONS, TREE_MEBIBYTES, WIDE, WIDE_MEBIBYTES
from benchmarks.peers import Unavailable, load_generator
from benchmarks.processes import enter_private_mounts, sweep
from benchmarks.report import as_json, as_text
from benchmarks.rounds import Plan, Results, run
from benchmarks.series import DEFAULT, SERIES
from benchmarks.subjects import SUBJECTS
from benchmarks.trees import TREE_QUANTITIES, TREES_MEBIBYTES

if TYPE_CHECKING:
    from collections.abc import Iterable

RESULTS = Path(__file__).with_name("results")
TMPFS = Path("/dev/shm")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

ABOUT = "Measure vfsmount beside its nearest relatives; benchmarks/README.md says what and how."
ROWS = frozenset(OPERATIONS) | frozenset(TREE_QUANTITIES)
#: Has nothing to compare, and a table of its own.
MILLION = "million"
ALL_SERIES = (*SERIES, MILLION)
QUICK_ROUNDS = 1
QUICK_SHARE = 0.2


def main() -> int:
    """Measure, print, write; 130 when interrupted (what was measured is reported all the same)."""
    options = _options()
    enter_private_mounts()
    # passthrough_ll keeps a descriptor for each file, and does not raise the limit by itself.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    plan = _plan(options)
    machine = describe()
    trees = any(series.commands for series in plan.series)
    wide = any(WIDE in series.operations for series in plan.series) and WIDE in plan.operations
    each = TREE_MEBIBYTES + wide * WIDE_MEBIBYTES
    _check_room(len(options.subjects) * each + trees * TREES_MEBIBYTES)
    work = Path(tempfile.mkdtemp(prefix="vfsmount-bench-", dir=TMPFS))
    results = Results()
    status = 0
    try:
        # As pip installs it: without bytecode, half of a mount's start is compiling.
        compileall.compile_dir(vfsmount.__path__[0], quiet=2)
        load_generator()
        _raise_on_signals()
        run(plan, results, work)
    except Unavailable as reason:
        sys.exit(f"benchmarks: {reason}")
    except KeyboardInterrupt:
        print("interrupted: reporting what there is", file=sys.stderr)
        status = 130
    finally:
        _ignore_signals()
        sweep(work)
        shutil.rmtree(work, ignore_errors=True)
    if MILLION in options.series and not status:
        million.measure(200_000 if options.quick else 1_000_000, TMPFS)
    if results.values:
        _publish(plan, results, machine, options.json)
    return status


def _check_room(needed: int) -> None:
    """End here rather than with a full tmpfs: containers often have one of 64 MiB."""
    if not TMPFS.is_dir():
        sys.exit(f"benchmarks: there is no {TMPFS} to work in")
    space = os.statvfs(TMPFS)
    free = space.f_bavail * space.f_frsize >> 20
    if free < needed:
        sys.exit(f"benchmarks: {TMPFS} has {free} MiB free, {needed} MiB are needed")


def _publish(plan: Plan, results: Results, machine: dict[str, object], path: Path) -> None:
    print(as_text(plan, results, machine))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(as_json(plan, results, machine), indent=1) + "\n")
    print(f"\neverything is in {path}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=ABOUT)
    add = parser.add_argument
    add("--rounds", type=_positive, metavar="N", help="rounds (default 5)")
    add("--subjects", type=_names(SUBJECTS), default=frozenset(SUBJECTS), metavar="A,B",
        help=f"of {', '.join(SUBJECTS)}")  # fmt: skip
    add("--ops", type=_names(ROWS), default=ROWS, metavar="A,B",
        help=f"of {', '.join([*OPERATIONS, *TREE_QUANTITIES])}")  # fmt: skip
    add("--series", type=_names(ALL_SERIES), default=DEFAULT, metavar="A,B",
        help=f"of {', '.join(ALL_SERIES)} (default: {', '.join(sorted(DEFAULT))})")  # fmt: skip
    add("--quick", action="store_true", help="one round of a fifth of the calls: does it work?")
    add("--cpu", type=int, default=max(os.sched_getaffinity(0)), metavar="N",
        help="processor for everything (default: the last)")  # fmt: skip
    add("--unpinned", action="store_true", help="leave the choice of processors to the kernel")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    add("--json", type=Path, default=RESULTS / f"{stamp}.json", metavar="PATH",
        help="where to write all figures (default: benchmarks/results/TIME.json)")  # fmt: skip
    options = parser.parse_args()
    if options.cpu not in os.sched_getaffinity(0):
        parser.error(f"there is no CPU {options.cpu} for us")
    return options


def _plan(options: argparse.Namespace) -> Plan:
    return Plan(
        series=[series for series in SERIES.values() if series.name in options.series],
        subjects=options.subjects,
        operations=options.ops,
        rounds=options.rounds or (QUICK_ROUNDS if options.quick else 5),
        cpu=options.cpu,
        unpinned=options.unpinned,
        share=QUICK_SHARE if options.quick else 1.0,
        churn=not options.quick,
    )


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


class _names:
    """An argument type: names of a table, with commas in between."""

    def __init__(self, known: Iterable[str]) -> None:
        self._known = frozenset(known)

    def __call__(self, text: str) -> frozenset[str]:
        names = frozenset(filter(None, text.split(",")))
        if unknown := sorted(names - self._known):
            raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}")
        return names


def _raise_on_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: object) -> NoReturn:
    # Once: nothing may interrupt the unmounting that follows.
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main())
