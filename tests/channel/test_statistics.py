from __future__ import annotations

import random

import pytest

from vfsmount.channel.statistics import LatencyHistogram, OpcodeCounter


@pytest.mark.parametrize("nanoseconds", [0, 255, 256, 4096, 15_800, 1_000_000, 10**10])
def test_one_duration_is_its_own_percentile(nanoseconds: int) -> None:
    histogram = LatencyHistogram()
    histogram.add(nanoseconds)

    for fraction in (0.01, 0.5, 0.99, 1.0):
        assert histogram.percentile(fraction) == pytest.approx(nanoseconds, rel=0.07, abs=256)


def test_percentiles_are_near_the_true_ones() -> None:
    chance = random.Random(7)
    values = sorted(int(chance.lognormvariate(10, 1)) for _ in range(5000))
    histogram = LatencyHistogram()
    for value in values:
        histogram.add(value)

    assert histogram.percentile(0.5) == pytest.approx(values[2500], rel=0.1)
    assert histogram.percentile(0.99) == pytest.approx(values[4950], rel=0.1)


def test_absurd_durations_do_not_fall_out() -> None:
    histogram = LatencyHistogram()
    histogram.add(10**18)

    assert histogram.percentile(0.5) > 10**11


def test_nothing_counted() -> None:
    assert OpcodeCounter().snapshot().p99_us == 0


def test_counter() -> None:
    counter = OpcodeCounter()
    for nanoseconds in (10_000, 20_000, 30_000):
        counter.add(nanoseconds)

    snapshot = counter.snapshot()

    assert (snapshot.count, snapshot.mean_us) == (3, 20.0)
    assert snapshot.p50_us == pytest.approx(20, rel=0.07)
