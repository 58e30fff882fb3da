"""A table of text: how numbers, ratios and rows are written."""

from dataclasses import dataclass
from math import inf

from benchmarks.summary import geometric_mean


@dataclass(frozen=True)
class Grid:
    """A table: title, a line under it, header and rows of text."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Return the table as Markdown with padded columns."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[index]) for line in lines) for index in range(len(self.header))]
        text = ["| " + " | ".join(word.ljust(w) for word, w in zip(line, widths, strict=True)) + " |" for line in lines]
        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([f"## {self.title}", "", self.note, "", text[0], rule, *text[1:]])


def number(value: float | None, digits: int = 4) -> str:
    """Return `value` in few characters; "-" for nothing and "diverged" for infinity."""
    if value is None:
        return "-"
    return "diverged" if value == inf else f"{value:.{digits}g}"


def ratio(value: float | None) -> str:
    """Return a ratio with two decimals."""
    return number(value) if value is None or value == inf or value >= 100 else f"{value:.2f}"


def ratio_grid(title: str, note: str, columns: dict[str, dict[str, float]], tasks: list[str]) -> Grid:
    """Return ratios, one row a task, then geometric mean, worst and the number of tasks."""
    rows = [[task, *(ratio(column.get(task)) for column in columns.values())] for task in tasks]
    some = [list(column.values()) for column in columns.values()]
    rows.append(["**geometric mean**", *(ratio(geometric_mean(v)) if v else "-" for v in some)])
    rows.append(["**worst**", *(ratio(max(v)) if v else "-" for v in some)])
    rows.append(["tasks", *(str(len(v)) for v in some)])
    return Grid(title, note, ["task", *columns], rows)
