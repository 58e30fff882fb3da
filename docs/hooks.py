"""What the pages take from the README, so that it is written once, and links that lead out of the pages.

``<!-- README: heading -->`` on a line of its own stands for the section of that heading, without the heading.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(r"^<!-- README: (.+) -->$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)?(benchmarks/[^)]+)\)")


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
    """Return `markdown` with links into the pages where README has them to docs/, and others as the name of a file."""
    return LINK.sub(r"\1 (`\2`)", markdown.replace("](docs/", "]("))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put in what pages take from the README."""
    readme = (ROOT / "README.md").read_text("utf-8")
    return within(INCLUDE.sub(lambda found: section(readme, found[1]), markdown))
