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

SRC = Path(gramlip.__file__).parent
FILES = sorted(SRC.rglob("*.py"))
MODULES = {".".join(("gramlip", *file.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__"): file for file in FILES}
PACKAGES = sorted(name for name, file in MODULES.items() if file.name == "__init__.py")
LONGEST = 600

# From the ground up: nothing reaches, directly or through others, what stands after it. New modules may stand anywhere
# between these; what holds for all of them is that no circle of imports exists.
GROUND = ["errors", "gram", "rounding", "bound", "operators", "padding", "blocks", "conv_gram"]
ENGINE = ["search", "certify", "published", "methods", "layers", "norm"]
NETWORKS = ["report", "steps", "compose", "rules", "network"]
USES = ["checkpoint", "weights", "targets", "distributed", "nn", "demo", "commands", "cli"]
ORDER = GROUND + ENGINE + NETWORKS + USES


def imported(file: Path, name: str) -> set[str]:
    """The modules of gramlip that a file imports anywhere, inside functions too; its own package root aside."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & set(MODULES) or {node.module or ""}
    return {module for module in found if module in MODULES} - {name, "gramlip"}


@cache
def graph() -> dict[str, set[str]]:
    return {name: imported(file, name) for name, file in MODULES.items() if name != "gramlip"}


@cache
def reached(name: str) -> frozenset[str]:
    """All that a module's imports lead to."""
    seen: set[str] = set()
    ahead = set(graph()[name])
    while ahead:
        module = ahead.pop()
        if module not in seen:
            seen.add(module)
            ahead |= graph()[module]
    return frozenset(seen)


@pytest.mark.parametrize("name", sorted(graph()))
def test_no_circle_of_imports(name):
    assert name not in reached(name)


@pytest.mark.parametrize("storey", ORDER)
def test_imports_go_downward(storey):
    above = {f"gramlip.{later}" for later in ORDER[ORDER.index(storey) + 1 :]}
    inside = [name for name in graph() if name == f"gramlip.{storey}" or name.startswith(f"gramlip.{storey}.")]
    assert inside, f"{storey} stands in ORDER but not in src"
    for name in inside:
        upward = {target for target in reached(name) if any(target == a or target.startswith(f"{a}.") for a in above)}
        assert not upward, f"{name} reaches up to {sorted(upward)}"


@pytest.mark.parametrize("name", PACKAGES)
def test_all_is_true(name):
    module = importlib.import_module(name)
    listed = getattr(module, "__all__", [])
    assert len(set(listed)) == len(listed)
    for entry in listed:
        assert hasattr(module, entry), f"{name}.__all__ names {entry}, which does not exist"
        assert not entry.startswith("_")
    bound = {node.asname or node.name for statement in ast.parse(MODULES[name].read_text()).body for node in named(statement)}
    public = {n for n in bound if not n.startswith("_") and not isinstance(getattr(module, n), types.ModuleType)} - {"annotations"}
    assert public <= set(listed), f"{name} offers names that __all__ does not list"


def named(statement: ast.stmt) -> list[ast.alias]:
    return statement.names if isinstance(statement, ast.ImportFrom) else []


def test_nothing_else_is_public_at_the_top():
    modules = {name.removeprefix("gramlip.") for name in MODULES}
    others = {name for name in vars(gramlip) if not name.startswith("_")} - set(gramlip.__all__) - modules - {"annotations"}
    assert not others


def test_every_module_can_be_imported_on_its_own():
    found = {module.name for module in pkgutil.walk_packages(gramlip.__path__, "gramlip.")}
    assert found == set(graph())
    for name in found:
        if not name.endswith("__main__"):
            importlib.import_module(name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(SRC).as_posix())
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) < LONGEST


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_private_name_of_another_module(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gramlip"):
            private = [alias.name for alias in node.names if alias.name.startswith("_") and not alias.name.startswith("__")]
            assert not private, f"{name} imports {private} from {node.module}"
