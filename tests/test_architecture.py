"""The shape of the package: imports go downward, `__all__` is true, files are short, nothing private is borrowed."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import types
from functools import cache
from pathlib import Path

import pytest

import gramlip
from architecture import DOCUMENT, children, contracts, drawn, imports, modules, room_of

MODULES = modules()
PACKAGES = sorted(name for name, file in MODULES.items() if file.name == "__init__.py")
LONGEST = 600
CONTRACTS = {contract.name: contract for contract in contracts()}


def test_the_package_under_test_is_the_one_that_is_read():
    assert Path(gramlip.__file__).samefile(MODULES["gramlip"])


@cache
def reached(name: str) -> frozenset[str]:
    """All that a module's imports lead to."""
    seen: set[str] = set()
    ahead = set(imports()[name])
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead |= imports()[module]
    return frozenset(seen)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"gramlip"}))
def test_no_circle_of_imports(name):
    assert name not in reached(name)


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_room_has_a_floor(name):
    contract = CONTRACTS[name]
    there = children(contract.container) - contract.left_out
    assert there == set(contract.rooms), f"pyproject.toml, contract {name!r}: expected a floor for each room of {contract.container}"


@pytest.mark.parametrize("name", CONTRACTS)
def test_imports_go_downward(name):
    contract = CONTRACTS[name]
    upward = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if (above := room_of(module, contract.container)) in contract.rooms
        and (below := room_of(target, contract.container)) in contract.rooms
        and above != below
        and not contract.may_import(above, below)
    ]
    assert not upward, f"{upward}: expected imports from lower floors alone (pyproject.toml, contract {name!r})"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_room_says_what_is_in_it(name):
    assert ast.get_docstring(ast.parse(MODULES[name].read_text()))


def test_the_picture_is_that_of_the_code():
    assert drawn(DOCUMENT.read_text()) == DOCUMENT.read_text(), "docs/architecture.md is old: type python tools/architecture.py"


def statements(name: str) -> list[ast.stmt]:
    return ast.parse(MODULES[name].read_text()).body


def defines(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef | ast.ClassDef)


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_true(name):
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert len(set(listed)) == len(listed)
    for entry in listed:
        assert hasattr(module, entry), f"{name}.__all__ names {entry}, which does not exist"
        assert not entry.startswith("_")
    if any(map(defines, statements(name))):
        return  # a room whose __init__ does something itself imports what it needs
    bound = {alias.asname or alias.name for s in statements(name) if isinstance(s, ast.ImportFrom) for alias in s.names}
    ours = {n for n in bound if getattr(getattr(module, n), "__module__", "").startswith("gramlip")}
    public = {n for n in ours if not n.startswith("_") and not isinstance(getattr(module, n), types.ModuleType)}
    assert public <= set(listed), f"{name} offers names that __all__ does not list"


def test_nothing_else_is_public_at_the_top():
    rooms = children("gramlip")
    others = {name for name in vars(gramlip) if not name.startswith("_")} - set(gramlip.__all__) - rooms - {"annotations", "gramlip"}
    assert not others


def test_every_module_can_be_imported_on_its_own():
    found = {module.name for module in pkgutil.walk_packages(gramlip.__path__, "gramlip.")}
    assert found == set(MODULES) - {"gramlip"}
    for name in found:
        if not name.endswith("__main__"):
            importlib.import_module(name)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_files_are_short(name):
    assert len(MODULES[name].read_text().splitlines()) < LONGEST


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_private_name_of_another_module(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gramlip"):
            private = [alias.name for alias in node.names if alias.name.startswith("_") and not alias.name.startswith("__")]
            assert not private, f"{name} imports {private} from {node.module}"
