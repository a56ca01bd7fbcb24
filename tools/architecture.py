"""Draws the rooms of src/gramlip and their imports into docs/architecture.md: from the code, on the floors that pyproject.toml gives them.

    python tools/architecture.py            writes the pictures and tables
    python tools/architecture.py --check    exits 1 where the document and the code differ

The floors are import-linter's contracts, which tests/test_architecture.py holds with what stands here.
"""

from __future__ import annotations

import ast
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

try:
    import tomllib
except ImportError:  # Python 3.10, where pytest brings the same under this name
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"
PACKAGE = "gramlip"
DOCUMENT = ROOT / "docs" / "architecture.md"
PART = re.compile(r"(<!-- rooms: (?P<name>[^>]+) -->\n).*?(<!-- end -->)", re.S)


@dataclass(frozen=True)
class Contract:
    """Floors of the rooms in one package, from high to low; rooms of a floor are independent where it says so."""

    name: str
    container: str
    floors: tuple[tuple[str, ...], ...]
    independent: tuple[bool, ...]
    left_out: frozenset[str]

    @property
    def rooms(self) -> list[str]:
        return [room for floor in self.floors for room in floor]

    def may_import(self, importer: str, imported: str) -> bool:
        """Whether a room may import another one: from a lower floor, or from its own where its rooms may know each other."""
        above, below = (next(i for i, floor in enumerate(self.floors) if room in floor) for room in (importer, imported))
        return above < below or (above == below and not self.independent[above])


def contracts() -> list[Contract]:
    """The layers contracts of pyproject.toml."""
    found = []
    for raw in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]:
        floors = tuple(tuple(room.strip() for room in re.split(r"[|:]", floor)) for floor in raw["layers"])
        independent = tuple(":" not in floor for floor in raw["layers"])
        left_out = frozenset(raw.get("exhaustive_ignores", ()))
        found += [Contract(raw["name"], container, floors, independent, left_out) for container in raw["containers"]]
    return found


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    files = sorted((SRC / PACKAGE).rglob("*.py"))
    return {".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> modules of the package that it imports anywhere, inside functions too; the package's root and itself aside."""
    found = {}
    for name, file in modules().items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    msg = f"{file.relative_to(ROOT)}:{node.lineno} has a relative import; expected from {PACKAGE}.room import name"
                    raise SystemExit(msg)
                parts = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {part if part in modules() else node.module or "" for part in parts}
        found[name] = frozenset(targets & modules().keys() - {name, PACKAGE})
    return found


def room_of(module: str, container: str) -> str | None:
    """The room of a package that a module stands in."""
    rest = module.removeprefix(f"{container}.")
    return rest.split(".")[0] if rest != module else None


def children(container: str) -> set[str]:
    """What stands in a package: its modules and packages, by their last name."""
    return {room for module in modules() if (room := room_of(module, container))}


def edges(container: str) -> dict[str, set[str]]:
    """Room -> rooms of the same package that its modules import."""
    found: dict[str, set[str]] = {room: set() for room in children(container)}
    for module, targets in imports().items():
        room = room_of(module, container)
        if room:
            found[room] |= {other for target in targets if (other := room_of(target, container)) and other != room}
    return found


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer way implies."""

    def reached(room: str) -> set[str]:
        seen: set[str] = set()
        ahead = set(graph[room])
        while ahead:
            other = ahead.pop()
            if other not in seen:
                seen.add(other)
                ahead |= graph[other]
        return seen

    return {room: {t for t in targets if not any(t in reached(other) for other in targets - {t})} for room, targets in graph.items()}


def sentence(module: str) -> str:
    """The first sentence of a module's docstring."""
    text = (ast.get_docstring(ast.parse(modules()[module].read_text())) or "").split("\n\n")[0].replace("\n", " ")
    return re.split(r"(?<=\.)\s", text)[0]


def picture(contract: Contract) -> str:
    """The floors as a Mermaid picture."""
    container, graph = contract.container, reduced(edges(contract.container))

    def node(room: str) -> str:
        return f"{container}.{room}".replace(".", "_")

    lines = ["```mermaid", "flowchart TB"]
    for i, floor in enumerate(contract.floors):
        lines += [f'    subgraph floor{i}[" "]', "        direction LR"]
        lines += [f'        {node(room)}["{room}"]' for room in floor]
        lines += ["    end"]
    for room in contract.rooms:
        lines += [f"    {node(room)} --> {node(target)}" for target in contract.rooms if target in graph[room]]
    return "\n".join([*lines, "```"])


def table(contract: Contract) -> str:
    """Room, what is in it, and what it imports."""
    graph = edges(contract.container)
    lines = ["| room | what is in it | imports |", "|---|---|---|"]
    for room in contract.rooms:
        name = f"{contract.container}.{room}"
        targets = ", ".join(f"`{target}`" for target in contract.rooms if target in graph[room])
        lines.append(f"| `{room}` | {sentence(name)} | {targets} |")
    return "\n".join(lines)


def drawn(text: str) -> str:
    """The document with its parts between the markers as the code is now."""
    parts = {contract.name: f"{picture(contract)}\n\n{table(contract)}\n" for contract in contracts()}
    return PART.sub(lambda match: f"{match[1]}{parts[match['name']]}{match[3]}", text)


def main() -> int:
    text = DOCUMENT.read_text()
    new = drawn(text)
    if "--check" in sys.argv[1:]:
        if new != text:
            print("docs/architecture.md differs from the code; expected the same: type python tools/architecture.py", file=sys.stderr)
        return int(new != text)
    DOCUMENT.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
