"""Docstrings are written for ``help()`` and Sphinx; this makes Markdown of the few marks that they use."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|attr|mod):`~?(?:[\w.]+\.)?(\w+)`")
DIRECTIVE = re.compile(r"^\.\. code-block:: \w+\n", re.MULTILINE)
RULE = re.compile(r"=+( +=+)+")
COLON = re.compile(r"::$", re.MULTILINE)


def as_markdown(text: str) -> str:
    """Return a docstring with roles as code, blocks by their indent alone, and simple tables as they stand."""
    text = COLON.sub(":", DIRECTIVE.sub("", ROLE.sub(r"`\1`", text)))
    lines = text.split("\n")
    rules = [index for index, line in enumerate(lines) if RULE.fullmatch(line.strip())]
    if rules:
        lines[rules[0]], lines[rules[-1]] = "```text", "```"
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Rewrites each docstring as it is found."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of one object, if it has one."""
        if not obj.is_alias and obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
