"""Which part of the package may import which, read from the source with ast.

Rooms are the folders of the package, the folders of ``client``, and single modules. Pure modules
are values in, values out: they do no I/O and know no event loop, so their tests need neither.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).resolve().parent.parent / "vfsmount"

#: What the client joins.
BELOW = {"wire", "errors", "channel", "cache", "dax_shm"}

#: Room -> rooms that it may import; each may import itself. "" is ``vfsmount/__init__.py``.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "closer": set(),
    "wire": {"errors"},
    "channel": {"wire", "closer", "errors"},
    "cache": {"wire", "errors"},
    "dax_shm": {"wire", "errors"},
    "client": BELOW | {""},
    "client.relay": BELOW | {"client"},
    "client.pyfuse": BELOW | {"client"},
    "client.mount": BELOW | {"client", "client.relay", "client.pyfuse", ""},
    "hostd": {"wire", "closer", "errors"},
    "testing": {"wire", "errors", "channel", "hostd"},
    "cli": {"client", "client.mount", "hostd", "errors", ""},
    "__main__": {"cli"},
    "": {"channel", "cache", "client"},
}

#: Modules, and folders of them, that are pure.
PURE = [
    "wire/",
    "cache/",
    "channel/arena.py",
    "channel/inflight.py",
    "channel/negotiation.py",
    "channel/statistics.py",
    "channel/virtqueue.py",
    "dax_shm/benefit.py",
    "dax_shm/mappings.py",
    "dax_shm/ranges.py",
    "client/relay/passed_nodes.py",
]
#: What a pure module may not import.
IMPURE = {"asyncio", "mmap", "os", "pyfuse3", "select", "selectors", "socket", "threading", "trio"}

#: Only these talk to the event loop or to pyfuse3; the daemon has neither.
HOSTD_BANS = {"asyncio", "pyfuse3", "trio"}


class Import(NamedTuple):
    """One imported module and the line that imports it."""

    module: str
    line: int


def modules() -> list[Path]:
    """Return every module of the package, relative to it."""
    return sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def tree_of(module: Path) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse((PACKAGE / module).read_text(), str(module))


def imports(tree: ast.Module) -> Iterator[Import]:
    """Yield what a module imports, anywhere in it; ``from a import b`` counts as both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            assert node.module is not None
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno)


def room_of(module: Path) -> str:
    """Return the room that a module belongs to."""
    name = "" if module.name == "__init__.py" and len(module.parts) == 1 else module.parts[0]
    known = room_named(".".join(("vfsmount", *module.with_suffix("").parts)))
    return known or name.removesuffix(".py")


def room_named(imported: str) -> str | None:
    """Return the room that an import reaches, or None where it leaves the package."""
    package, *rest = imported.split(".")
    if package != "vfsmount":
        return None
    within = (".".join(rest[:depth]) for depth in (2, 1))
    return next((room for room in within if room in MAY_IMPORT), "")


def is_pure(module: Path) -> bool:
    """Whether a module is on the list of pure ones."""
    return any(
        str(module).startswith(entry) if entry.endswith("/") else str(module) == entry
        for entry in PURE
    )


def test_there_is_something_to_look_at() -> None:
    rooms = {room_of(module) for module in modules()}

    assert {"errors", "wire", "channel", "cache", "dax_shm", "client", "hostd", "cli"} <= rooms
    assert rooms <= set(MAY_IMPORT), "a new room needs a row in MAY_IMPORT"


def test_the_relay_says_what_each_of_its_files_is_for() -> None:
    page = ast.get_docstring(tree_of(Path("client/relay/__init__.py"))) or ""
    named = set(re.findall(r"[a-z_]+", page))
    files = {path.stem for path in (PACKAGE / "client" / "relay").glob("*.py")} - {"__init__"}

    assert files - named == set()


@pytest.mark.parametrize("module", modules(), ids=str)
def test_imports_stay_in_their_rooms(module: Path) -> None:
    allowed = MAY_IMPORT[room_of(module)] | {room_of(module)}

    for imported in imports(tree_of(module)):
        room = room_named(imported.module)
        assert room is None or room in allowed, f"line {imported.line} imports {imported.module}"


@pytest.mark.parametrize("module", [module for module in modules() if is_pure(module)], ids=str)
def test_pure_modules_do_no_io(module: Path) -> None:
    tree = tree_of(module)

    for imported in imports(tree):
        assert imported.module.split(".")[0] not in IMPURE, f"line {imported.line}"
    for node in ast.walk(tree):
        assert not isinstance(node, ast.AsyncFunctionDef | ast.Await), "no async in a pure module"


@pytest.mark.parametrize(
    "module", [module for module in modules() if room_of(module) == "hostd"], ids=str
)
def test_hostd_needs_no_event_loop(module: Path) -> None:
    for imported in imports(tree_of(module)):
        assert imported.module.split(".")[0] not in HOSTD_BANS, f"line {imported.line}"
