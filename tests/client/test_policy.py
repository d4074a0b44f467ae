"""Each cache mode as numbers."""

from __future__ import annotations

import pytest

from vfsmount.cache.policy import FOREVER, MODES, CachePolicy


def test_none_believes_nothing() -> None:
    policy = CachePolicy.for_mode("none", 5.0, writeback=True)
    assert (policy.entry_timeout, policy.attr_timeout, policy.negative_timeout) == (0, 0, 0)
    assert policy.direct_io
    assert not policy.writeback


def test_auto_believes_for_the_timeout() -> None:
    policy = CachePolicy.for_mode("auto", 0.25)
    assert (policy.entry_timeout, policy.attr_timeout, policy.negative_timeout) == (0.25,) * 3
    assert not policy.direct_io
    assert not policy.keep_cache


def test_always_believes_for_ever() -> None:
    policy = CachePolicy.for_mode("always", 1.0, writeback=True)
    assert policy.attr_timeout == FOREVER
    assert policy.keep_cache
    assert policy.writeback


def test_unknown_mode_names_the_known() -> None:
    with pytest.raises(ValueError, match="auto, none, always"):
        CachePolicy.for_mode("sometimes")


def test_modes_all_build() -> None:
    assert [CachePolicy.for_mode(mode).name for mode in MODES] == list(MODES)
