"""The pages: their code runs, what they show is there, and what they take from the README is in it."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def load(name):
    """Return a module of the documentation, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_code_of_a_page_runs_from_top_to_bottom(page, capsys):
    names = {}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_of_a_page_are_there_and_small(page):
    for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text("utf-8")):
        content = (DOCS / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 100_000


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = set(re.findall(r"^  - .+: (\w[\w-]*\.md)$", config, re.MULTILINE))
    assert listed <= {page.name for page in PAGES}
    assert {page.name for page in PAGES} - listed <= {"compatibility.md"}


def test_what_a_page_takes_from_the_readme_is_put_in_with_links_that_stay_inside():
    hooks = load("hooks")
    for page in PAGES:
        markdown = hooks.on_page_markdown(page.read_text("utf-8"))
        assert "<!-- README" not in markdown
        assert not re.search(r"\]\((\.\./)?(benchmarks|docs)/", markdown)


def test_a_section_ends_at_the_next_heading_and_a_missing_one_is_named():
    hooks = load("hooks")
    text = "# T\n\n## A\n\none\n\n### B\n\ntwo\n\n## C\n\nthree\n"
    assert hooks.section(text, "A") == "one\n\n### B\n\ntwo"
    assert hooks.section(text, "C") == "three"
    with pytest.raises(ValueError) as error:
        hooks.section(text, "B")
    assert str(error.value) == "README.md has no heading `## B`"


def test_links_out_of_the_pages_become_the_name_of_a_file():
    assert load("hooks").within("[a](../benchmarks/README.md) [b](docs/c.md) [d](e.md)") == (
        "a (`benchmarks/README.md`) [b](c.md) [d](e.md)"
    )


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    text = "A :class:`~a.b.C` and :func:`d`.\n\n.. code-block:: text\n\n    x\n\nE::\n\n    y\n\n"
    text += "== ==\na  b\n== ==\nc  d\n== =="
    assert load("docstrings").as_markdown(text) == (
        "A `C` and `d`.\n\n\n    x\n\nE:\n\n    y\n\n```text\na  b\n== ==\nc  d\n```"
    )
