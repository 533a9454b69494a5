"""The house's one direction: no module needs, at its import or when its functions run, one that needs it; and
what a file keeps to itself, no other file names."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What the modules of these rooms may import of the package when they are imported, beside their own room.
ROOMS = {
    "formats": {"runtime"},
    "runtime": set(),
    "ops": {"runtime", "formats", "files"},
    "functional": {"ops", "formats", "runtime"},
    "patching": {"functional", "merging", "ops", "formats", "runtime"},
    "memory": {"patching", "functional", "ops", "formats", "runtime", "errors", "files"},
}
EXTENSIONS = {"_C", "_C_cuda"}  # compiled modules of the package


def names(root: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted((root / "peftkern").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def statements(body: list[ast.stmt], lazy: bool = False) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when the module is imported, and with `lazy` those of its functions; not those for
    type checkers."""
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        elif lazy or isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from statements(getattr(node, part, []), lazy)
            for handler in getattr(node, "handlers", []):
                yield from statements(handler.body, lazy)


def source_of(node: ast.ImportFrom, name: str, modules: dict[str, Path]) -> str:
    """The dotted name behind `from`, for an import in the module `name`."""
    if not node.level:
        return node.module or ""
    package = name if modules[name].name == "__init__.py" else name.rpartition(".")[0]
    above = package.split(".")[: len(package.split(".")) - node.level + 1]
    return ".".join([*above, *([node.module] if node.module else [])])


def imported(name: str, modules: dict[str, Path], lazy: bool = False) -> set[str]:
    """The package's modules that this one imports, by name."""
    found = set()
    for node in statements(parsed(modules[name]).body, lazy):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = source_of(node, name, modules)
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            found.add(inner if inner in modules else base)
    return {other for other in found if other in modules} - {name}


def graph(root: Path, lazy: bool = False) -> dict[str, set[str]]:
    modules = names(root)
    return {name: imported(name, modules, lazy) for name in modules}


@pytest.mark.parametrize("lazy", [False, True], ids=["at import", "in functions too"])
def test_no_import_circle(lazy: bool) -> None:
    TopologicalSorter(graph(ROOT, lazy)).prepare()


@pytest.mark.parametrize("text", ["from .a import x", "def f():\n    if x:\n        from .a import x"])
def test_a_circle_is_found(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "peftkern" / "room"
    folder.mkdir(parents=True)
    for path, source in (("__init__.py", ""), ("a.py", "from . import b"), ("b.py", text)):
        (folder / path).write_text(source)
    with pytest.raises(CycleError):
        TopologicalSorter(graph(tmp_path, lazy=True)).prepare()


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards(room: str) -> None:
    allowed = ROOMS[room] | {room}
    upwards = {
        f"{name} imports {other}"
        for name, others in graph(ROOT).items()
        if name.split(".")[1:2] == [room]
        for other in others
        if (other.split(".")[1:2] or [""])[0] not in allowed
    }
    assert not upwards


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def borrowed(name: str, modules: dict[str, Path]) -> set[str]:
    """What this module uses of another one's private names: imported, or read off the imported module."""
    tree, found, aliases = parsed(modules[name]), set(), {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom):
            continue
        base = source_of(node, name, modules)
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            if whole in modules:
                aliases[alias.asname or alias.name] = whole
            elif base in modules and is_private(alias.name) and alias.name not in EXTENSIONS:
                found.add(whole)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and is_private(node.attr):
            found |= {f"{aliases[node.value.id]}.{node.attr}"} if node.value.id in aliases else set()
    return {f"{name} uses {other}" for other in found}


def test_no_private_name_crosses_files() -> None:
    modules = names(ROOT)
    assert not set().union(*(borrowed(name, modules) for name in modules))


@pytest.mark.parametrize("text", ["from .b import _x", "from . import b\ny = b._x"])
def test_a_borrowed_name_is_found(tmp_path: Path, text: str) -> None:
    folder = tmp_path / "peftkern"
    folder.mkdir()
    for path, source in (("__init__.py", ""), ("a.py", text), ("b.py", "_x = 1")):
        (folder / path).write_text(source)
    assert borrowed("peftkern.a", names(tmp_path)) == {"peftkern.a uses peftkern.b._x"}
