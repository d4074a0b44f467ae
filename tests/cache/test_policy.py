"""Times that are set apart from the mode."""

from __future__ import annotations

import pytest

from vfsmount.cache.policy import FOREVER, CachePolicy
from vfsmount.client.mount.options import parse_mount
from vfsmount.errors import UsageError

TIMES = ("entry", "attr", "negative", "dir")


@pytest.mark.parametrize("which", TIMES)
@pytest.mark.parametrize("mode", ["none", "auto", "always"])
def test_each_time_is_set_alone(mode: str, which: str) -> None:
    plain = CachePolicy.for_mode(mode)
    given = {f"{which}_timeout": 7.5}
    policy = CachePolicy.for_mode(mode, **given)  # type: ignore[arg-type]
    for name in TIMES:
        expected = 7.5 if name == which else getattr(plain, f"{name}_timeout")
        assert getattr(policy, f"{name}_timeout") == expected


def test_host_has_no_times_of_ours() -> None:
    policy = CachePolicy.for_mode("host", 5.0, attr_timeout=3.0, writeback=True)
    assert policy.from_host
    assert policy.attr_timeout == 0
    assert policy.writeback


def test_a_listing_is_kept_for_its_time() -> None:
    policy = CachePolicy.for_mode("auto", dir_timeout=10)
    assert [policy.keeps_listing(age) for age in (None, 0.0, 9.9, 10.0)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert CachePolicy.for_mode("always").keeps_listing(FOREVER / 2)
    assert not CachePolicy.for_mode("auto").keeps_listing(0.0)


def test_options_reach_the_settings() -> None:
    words = ["/m", "--socket", "/s", "--attr-timeout", "0.5", "-o", "dir_timeout=3"]
    settings = parse_mount(words)
    assert (settings.attr_timeout, settings.dir_timeout) == (0.5, 3.0)
    assert settings.entry_timeout is None


def test_host_refuses_times() -> None:
    with pytest.raises(UsageError, match="attr-timeout"):
        parse_mount(["/m", "--socket", "/s", "--cache", "host", "--attr-timeout", "1"])
