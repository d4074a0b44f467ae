"""Extended attributes that are known to be absent."""

from __future__ import annotations

from vfsmount.cache.xattrs import AbsentXattrs

CAPABILITY, ACL = b"security.capability", b"system.posix_acl_access"


def test_absence_is_remembered_for_a_while() -> None:
    memory = AbsentXattrs(1.5)
    memory.note_absent(42, CAPABILITY, 10.0, 0)
    assert memory.is_absent(42, CAPABILITY, 11.4)
    assert not memory.is_absent(43, CAPABILITY, 11.4)
    assert not memory.is_absent(42, CAPABILITY, 11.5)
    assert len(memory) == 0


def test_names_are_whole() -> None:
    memory = AbsentXattrs(1.5)
    memory.note_absent(42, CAPABILITY, 10.0, 0)
    memory.note_absent(42, ACL, 10.5, 0)
    assert memory.is_absent(42, CAPABILITY, 11.0)
    assert memory.is_absent(42, ACL, 11.0)
    for other in (b"security", b"capability", b"security.capability2", b""):
        assert not memory.is_absent(42, other, 11.0)


def test_the_oldest_answer_decides() -> None:
    memory = AbsentXattrs(1.0)
    memory.note_absent(42, CAPABILITY, 10.0, 0)
    memory.note_absent(42, ACL, 10.9, 0)
    assert not memory.is_absent(42, CAPABILITY, 11.1)


def test_names_of_one_node_are_bounded() -> None:
    memory = AbsentXattrs(1e9)
    for number in range(1000):
        memory.note_absent(42, b"user.name-%d" % number, 10.0, 0)
        assert memory.is_absent(42, b"user.name-%d" % number, 10.0)
    known = sum(memory.is_absent(42, b"user.name-%d" % number, 10.0) for number in range(1000))
    assert known < 20


def test_a_change_ends_it() -> None:
    memory = AbsentXattrs(1e9)
    memory.note_absent(42, CAPABILITY, 10.0, 0)
    memory.changed(42)
    assert not memory.is_absent(42, CAPABILITY, 10.0)


def test_an_answer_that_a_change_overtook_is_not_kept() -> None:
    memory = AbsentXattrs(1e9)
    asked = memory.changes
    memory.changed(42)
    memory.note_absent(42, CAPABILITY, 10.0, asked)
    assert not memory.is_absent(42, CAPABILITY, 10.0)


def test_nothing_is_remembered_where_attributes_are_never_valid() -> None:
    memory = AbsentXattrs(0.0)
    memory.note_absent(42, CAPABILITY, 10.0, 0)
    assert len(memory) == 0


def test_nodes_are_bounded() -> None:
    memory = AbsentXattrs(1e9, limit=100)
    for nodeid in range(1000):
        memory.note_absent(nodeid, ACL, 10.0, 0)
        assert len(memory) <= 100
        assert memory.is_absent(nodeid, ACL, 10.0)
