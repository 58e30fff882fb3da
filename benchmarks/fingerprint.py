"""Short hashes of source files, blind to comments, docstrings and formatting."""

import ast
from collections.abc import Iterable
from functools import cache
from hashlib import sha1
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _meaning(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                del body[0]
    return ast.dump(tree)


@cache
def source_hash(*paths: Path) -> str:
    """Return eight hexadecimal digits of what the python files at `paths` do; missing files count as empty."""
    return short("\n".join(_meaning(path) for path in paths if path.exists()))


def short(text: str, digits: int = 8) -> str:
    """Return the first hexadecimal digits of the SHA-1 of `text`."""
    return sha1(text.encode()).hexdigest()[:digits]


def _module(name: str) -> Path:
    return ROOT / "lightning_soaa" / f"{name}.py"


def module_hash(*names: str) -> str:
    """Return the hash of modules of lightning_soaa."""
    return source_hash(*map(_module, names))


@cache
def soaa_hash(*others: str) -> str:
    """Return the hash of the files that decide where SOAA steps: optimizer, rules and the modules they import.

    Args:
        others: modules of the package that only some contenders use.
    """
    found: set[str] = set()
    waiting = ["optimizer", "radius", "ratio", "fisher", *others]
    while waiting:
        name = waiting.pop()
        path = _module(name)
        if name in found or name == "report" or not path.exists():
            continue
        found.add(name)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_soaa."):
                waiting.append(str(node.module).split(".")[1])
    return module_hash(*sorted(found))


@cache
def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the installed version of each package, or "missing"."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found
