"""The structure of the package: rooms whose imports point down, no circles, and readable code."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.readability import density_of_files

PACKAGE = Path(__file__).parents[1] / "sapo_jax"

# From the top floor to the bottom. A room may import what stands below it.
FLOORS = (
    ("cli", "notebook"),
    ("training",),
    ("plan",),
    ("analysis",),
    ("sweeps",),
    ("learner",),
    ("rollout",),
    ("hub",),
    ("models",),
    ("ops",),
    ("diagnostics",),
    ("objectives",),
    ("data",),
    ("io",),
    ("distributed",),
    ("config",),
    ("rewards",),
    ("batch", "errors", "murmur", "text", "types"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def module_name(path: Path) -> str:
    """For example `training.step`, or `training` for its __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                is_submodule = submodule.partition(".")[2] in MODULES
                names.append(submodule if is_submodule else node.module)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, module = name.partition(".")
            if package == "sapo_jax" and module in MODULES:
                imported.add(module)
    return imported - {""}


def test_imports_point_down():
    upward = []
    for module, path in MODULES.items():
        room = module.split(".")[0]
        if not room:
            continue
        for imported in imports_of(path):
            other = imported.split(".")[0]
            if other != room and FLOOR_OF[other] <= FLOOR_OF[room]:
                upward.append(f"{module} -> {imported}")
    assert not upward, "these imports do not point down: " + ", ".join(sorted(upward))


def test_no_circle_of_modules():
    graph = {module: imports_of(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for imported in graph[module]:
            # A folder's __init__ names its modules; its modules do not count as importing it.
            if imported != module:
                visit(imported, [*path, module])
        done.add(module)

    for module in graph:
        visit(module, [])


def test_a_circle_would_be_found(tmp_path):
    source = tmp_path / "a.py"
    source.write_text("def f():\n    from sapo_jax.training import step, run\n")
    assert imports_of(source) == {"training.step", "training.run"}


@pytest.mark.parametrize("folder", ["sapo_jax", "experiments"])
def test_code_stays_as_readable_as_it_is(folder):
    """Limits a little above what the code has; see tests/README.md for the figures."""
    density = density_of_files((PACKAGE.parent / folder).rglob("*.py"))
    assert density.long_lines == 0
    assert density.per_1000(density.tuple_assignments) < 2
    assert density.per_1000(density.conditional_expressions) < 6
    assert density.named_lambdas == 0
