"""Tables of the README."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Columns = Mapping[str, tuple[str, Callable[[Any], str]]]


def table(corner: str, columns: Columns, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each of ``rows``; ``columns`` maps keys of theirs to a title and a way to write the value."""
    cells = [[corner, *(title for title, _ in columns.values())]]
    for name, row in rows.items():
        cells.append([name, *(f(row[k]) if k in row else "" for k, (_, f) in columns.items())])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    lines = ((c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
