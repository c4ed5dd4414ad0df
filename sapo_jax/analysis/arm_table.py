"""The form of the tables that `sapo-jax report` prints: a row for each arm."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def arm_table(title: str, headings: Sequence[str]) -> Table:
    """A table without rows: a column for the arm's label, then one for each heading.

    A label that is too long is folded; numbers never are.
    """
    table = Table(
        title=Text(title, style="bold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
    )
    table.add_column("arm", justify="left", overflow="fold", no_wrap=False)
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold", no_wrap=True)
    return table
