"""What the pages take from README and code, so that it is written once, and links that lead out of the pages.

``<!-- README: heading -->`` on a line of its own stands for the section of that heading, without the heading, and
``<!-- examples/README: heading -->`` for one of that file. A function or
class of the package in the last column of a table, as in ``| `fisher.box_direction` |``, gets its file and line.
"""

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(r"^<!-- ((?:\w+/)?README): (.+) -->$", re.MULTILINE)
CODE = re.compile(r"\| `(\w+)\.(\w+(?:\.\w+)*)` \|$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)?((?:benchmarks|examples)/[^)]+)\)")


def section(text: str, heading: str) -> str:
    """Return what is below a heading of the second level, up to the next one.

    Raises:
        ValueError: there is no such heading.
    """
    found = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"README.md has no heading `## {heading}`")
    return found[1].strip()


def within(markdown: str) -> str:
    """Return `markdown` with links into the pages where READMEs link to docs/, and others as the name of a file."""
    return LINK.sub(r"\1 (`\2`)", re.sub(r"\]\((\.\./)?docs/", "](", markdown))


def line_of(module: str, name: str) -> int:
    """Return the line of ``lightning_soaa/<module>.py`` that defines a function, a class or a method.

    Raises:
        ValueError: there is no such file or name.
    """
    path = ROOT / "lightning_soaa" / f"{module}.py"
    if not path.is_file():
        raise ValueError(f"no file lightning_soaa/{module}.py")
    node: Any = ast.parse(path.read_text("utf-8"))
    for part in name.split("."):
        node = next((inner for inner in node.body if getattr(inner, "name", None) == part), None)
        if node is None:
            raise ValueError(f"no `{name}` in lightning_soaa/{module}.py")
    return int(node.lineno)


def with_lines(markdown: str) -> str:
    """Return `markdown` with the file and line of what is named in the last column of tables."""
    where = "| `{0}.{1}`, {0}.py:{2} |"
    return CODE.sub(lambda found: where.format(found[1], found[2], line_of(found[1], found[2])), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what pages take from the README and from the code."""

    def included(found: re.Match[str]) -> str:
        return section((ROOT / f"{found[1]}.md").read_text("utf-8"), found[2])

    return within(with_lines(INCLUDE.sub(included, markdown)))
