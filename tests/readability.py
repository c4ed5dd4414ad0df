"""How dense Python code is, in figures: `python tests/readability.py FOLDER...`.

They stand for habits that make code hard to read at first sight: lines past 100 columns, tuple
assignments that put unrelated things on one line, conditional expressions, and lambdas with a name.
Well-read code has few (nanodo: 0 %, 0.6, 4.6 and 0 per 1000 lines; see tests/README.md).
"""

from __future__ import annotations

import ast
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

COLUMNS = 100


@dataclasses.dataclass(frozen=True)
class Density:
    """Counts over some files."""

    lines: int = 0  # that are not blank
    long_lines: int = 0  # past COLUMNS
    tuple_assignments: int = 0  # `a, b = x, y`
    conditional_expressions: int = 0  # `x if c else y`
    named_lambdas: int = 0  # `f = lambda ...`

    def __add__(self, other: Density) -> Density:
        sums = {}
        for field in dataclasses.fields(self):
            sums[field.name] = getattr(self, field.name) + getattr(other, field.name)
        return Density(**sums)

    def per_1000(self, count: int) -> float:
        return 1000 * count / max(self.lines, 1)

    @property
    def long_line_percent(self) -> float:
        return 100 * self.long_lines / max(self.lines, 1)


def density_of(source: str) -> Density:
    lines = [line for line in source.splitlines() if line.strip()]
    tuple_assignments = 0
    conditional_expressions = 0
    named_lambdas = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.IfExp):
            conditional_expressions += 1
        if isinstance(node, ast.Assign):
            if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
                tuple_assignments += 1
            if isinstance(node.value, ast.Lambda):
                named_lambdas += 1
    return Density(
        lines=len(lines),
        long_lines=sum(len(line) > COLUMNS for line in lines),
        tuple_assignments=tuple_assignments,
        conditional_expressions=conditional_expressions,
        named_lambdas=named_lambdas,
    )


def density_of_files(paths: Iterable[Path]) -> Density:
    total = Density()
    for path in paths:
        total += density_of(path.read_text(encoding="utf-8"))
    return total


def table(folder: Path) -> str:
    """A row for each folder in it that has Python files, for the files beside them, and for all."""
    rows = {}
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            rows[child.name] = density_of_files(child.rglob("*.py"))
    rows["files"] = density_of_files(folder.glob("*.py"))
    rows["all"] = density_of_files(folder.rglob("*.py"))
    lines = [f"{'':16}{'lines':>8}{'long %':>8}{'tuples':>8}{'choices':>8}{'lambdas':>8}"]
    for name, density in rows.items():
        if density.lines:
            lines.append(
                f"{name:16}{density.lines:>8}{density.long_line_percent:>8.1f}"
                f"{density.per_1000(density.tuple_assignments):>8.1f}"
                f"{density.per_1000(density.conditional_expressions):>8.1f}"
                f"{density.per_1000(density.named_lambdas):>8.1f}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: per 1000 lines, but for long lines\n{table(Path(argument))}")
