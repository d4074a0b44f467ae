"""From results to a page of text and to a JSON file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from benchmarks.operations import (
    CHURN,
    CROWD,
    FIRST_READ,
    OPERATIONS,
    QUANTITIES,
    RSS_CHURN,
    RSS_CROWD,
    RSS_IDLE,
)
from benchmarks.series import BARS
from benchmarks.subjects import SUBJECTS
from benchmarks.trees import TREE_QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.operations import Quantity
    from benchmarks.rounds import Plan, Results
    from benchmarks.series import Bar, Series

__all__ = ["as_json", "as_text", "verdict"]

ABSENT = "-"
ALL_QUANTITIES = QUANTITIES | TREE_QUANTITIES
PROCESS = (FIRST_READ, RSS_IDLE, RSS_CHURN, RSS_CROWD)


def verdict(bar: Bar, results: Results) -> tuple[float | None, str]:
    """A bar's figure (a ratio, or an absolute value) and ``pass``, ``MISS`` or ``not measured``."""
    if bar.peer:
        value = results.ratio(bar.series, bar.subject, bar.peer, bar.quantity, bar.other)
    else:
        value = results.median(bar.series, bar.subject, bar.quantity)
    if value is None:
        return None, "not measured"
    more = ALL_QUANTITIES[bar.quantity].more_is_better
    return value, "pass" if (value >= bar.limit if more else value <= bar.limit) else "MISS"


def as_text(plan: Plan, results: Results, machine: Mapping[str, object]) -> str:
    """The whole report, for a screen of some 150 columns."""
    parts = [_heading(results, machine)]
    for series in plan.series:
        parts.append(_main_table(plan, results, series))
        parts.append(_process_table(plan, results, series))
    parts += [_subject_notes(plan), _problem_list(results), _bar_table(plan, results)]
    return "\n\n".join(part for part in parts if part)


def as_json(plan: Plan, results: Results, machine: Mapping[str, object]) -> dict[str, object]:
    """Everything, for a later comparison; figures per round, in the unit that is given."""
    return {
        "machine": dict(machine),
        "rounds": plan.rounds,
        "share": plan.share,
        "cpu": plan.cpu,
        "series": {
            series.name: {
                "cache": series.cache,
                "warm": series.warm,
                "pinned": plan.is_pinned(series),
                "peer": series.peer,
                "subjects": {
                    name: _subject_json(results, series.name, name) for name in series.subjects
                },
            }
            for series in plan.series
        },
        "bars": [_bar_json(bar, results) for bar in BARS],
    }


def _subject_json(results: Results, series: str, subject: str) -> dict[str, object]:
    measured = {
        quantity: {
            "unit": ALL_QUANTITIES[quantity].unit,
            "median": results.median(series, subject, quantity),
            "rounds": results.values[series, subject, quantity],
        }
        for quantity in ALL_QUANTITIES
        if (series, subject, quantity) in results.values
    }
    return {
        "what": SUBJECTS[subject].what,
        "problems": {
            key[2] or "subject": reason
            for key, reason in results.problems.items()
            if key[:2] == (series, subject)
        },
        "measured": measured,
        "timings": {
            name: [dataclasses.asdict(timing) for timing in results.timings[series, subject, name]]
            for name in (*OPERATIONS, *CHURN, CROWD)
            if (series, subject, name) in results.timings
        },
        "memory": {
            name: results.memory[series, subject, name]
            for name in (RSS_IDLE.name, *CHURN, CROWD)
            if (series, subject, name) in results.memory
        },
    }


def _bar_json(bar: Bar, results: Results) -> dict[str, object]:
    figure, word = verdict(bar, results)
    return {**dataclasses.asdict(bar), "figure": figure, "verdict": word}


# ---- text ----


def _heading(results: Results, machine: Mapping[str, object]) -> str:
    rounds = max(map(len, results.values.values()))
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs, kernel {machine['kernel']}, "
        f"{machine['system']}\n"
        f"medians of {rounds} rounds of mean times; tree on tmpfs; "
        f"root: {'yes' if machine['root'] else 'no'}; load average before: {machine['load']}"
    )


def _main_table(plan: Plan, results: Results, series: Series) -> str:
    where = f"pinned to CPU {plan.cpu}" if plan.is_pinned(series) else "not pinned"
    columns = [name for name in series.subjects if name in plan.subjects]
    unit = "ms" if series.commands else "us"
    rows = [[f"{unit} per {'command' if series.commands else 'operation'}", *columns]]
    for name in series.operations:
        if name in plan.operations:
            quantity = ALL_QUANTITIES[name]
            cells = [_cell(results, series, subject, quantity) for subject in columns]
            rows.append([_label(quantity, unit), *cells])
    title = f"{series.name} (--cache {series.cache}), {where}; in brackets: times {series.peer}"
    return f"{title}\n{_aligned(rows)}"


def _process_table(plan: Plan, results: Results, series: Series) -> str:
    """The figures of the process itself, for the subjects that are one."""
    columns = [name for name in series.subjects if name in plan.subjects and SUBJECTS[name].mounts]
    rows = [[series.name, *columns]]
    for quantity in PROCESS:
        cells = [_plain(results.median(series.name, name, quantity.name)) for name in columns]
        if any(cell != ABSENT for cell in cells):
            rows.append([_label(quantity), *cells])
    return _aligned(rows) if len(rows) > 1 else ""


def _bar_table(plan: Plan, results: Results) -> str:
    shown = {series.name for series in plan.series}
    rows = [["to reach", "by", "bar", "measured", ""]]
    for bar in BARS:
        if bar.series in shown and bar.subject in plan.subjects:
            quantity = ALL_QUANTITIES[bar.quantity]
            figure, word = verdict(bar, results)
            sign = ">=" if quantity.more_is_better else "<="
            of = f" {QUANTITIES[bar.other].title}" if bar.other else ""
            unit = f"x {bar.peer}{of}" if bar.peer else f" {quantity.unit}"
            limit = f"{sign} {bar.limit:.3g}{unit}"
            measured = ABSENT if figure is None else f"{figure:.2f}"
            rows.append([f"{bar.series} {quantity.title}", bar.subject, limit, measured, word])
    return _aligned(rows) if len(rows) > 1 else ""


def _subject_notes(plan: Plan) -> str:
    return "\n".join(
        f"{name}: {subject.what}" for name, subject in SUBJECTS.items() if name in plan.subjects
    )


def _problem_list(results: Results) -> str:
    lines = [
        f"  {' '.join(word for word in key if word)}: {reason}"
        for key, reason in results.problems.items()
    ]
    return "\n".join(["NOT MEASURED", *lines]) if lines else ""


def _cell(results: Results, series: Series, subject: str, quantity: Quantity) -> str:
    value = results.median(series.name, subject, quantity.name)
    ratio = results.ratio(series.name, subject, series.peer, quantity.name)
    if value is None:
        return ABSENT
    bracket = f"({ratio:.2f})" if ratio is not None else ""
    return f"{_plain(value)} {bracket:>7}"


def _plain(value: float | None) -> str:
    if value is None:
        return ABSENT
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _label(quantity: Quantity, usual: str = "") -> str:
    return quantity.title if quantity.unit == usual else f"{quantity.title}, {quantity.unit}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns two blanks apart, all but the first and verdicts to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)
