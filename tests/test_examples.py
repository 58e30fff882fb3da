"""Every example runs from top to bottom in its fast form, without a warning, and is in the index."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import SHARDS_ON_CPU

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
INDEX = (ROOT / "examples" / "README.md").read_text("utf-8")
# What an example says at its end.
RESULTS = {
    "bring_your_own": r"training loss: [34]\.\d{4} nats",
    "char_gpt": r"validation loss: [12]\.\d{4} nats a character\nThe ",
    "cli": r"validation accuracy: 0\.[89]",
    "cnn_accumulation": r"test accuracy: 0\.[89]",
    "ddp": r"test accuracy: 0\.[89]",
    "digits": r"test accuracy: 0\.9",
    "fabric_digits": r"test accuracy: 0\.9",
    "fsdp2": r"test accuracy: 0\.[89]",
    "gan": r"\n[ .:=+*#%@-]{16}  [ .:=+*#%@-]{16}  .*\n",
    "huggingface": r"test loss: [234]\.\d{4} nats",
    "resume_after_kill": r"same parameters as without the kill, bit for bit: True",
}
EXTRA = {"huggingface": "transformers"}  # package, of examples that need more than the tests do
TWO_PROCESSES = {"ddp", "fsdp2"}  # each of them prints a line
MARKS = {"fsdp2": SHARDS_ON_CPU}
MARKED = [pytest.param(path, marks=MARKS.get(path.stem, ()), id=path.stem) for path in EXAMPLES]


def run(path, folder):
    """Return what an example prints in its fast form; its warnings are errors, in the processes it starts as well."""
    environment = {**os.environ, "PYTHONWARNINGS": "error", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(path), "--fast"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=200, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", MARKED)
def test_example_runs_fast_and_says_what_came_of_it(path, tmp_path):
    if path.stem in EXTRA:
        pytest.importorskip(EXTRA[path.stem], reason=f"{EXTRA[path.stem]} is not installed")
    printed = run(path, tmp_path)
    assert re.search(RESULTS[path.stem], printed), printed
    if path.stem in TWO_PROCESSES:
        assert {"process 0", "process 1"} <= set(re.findall(r"process \d", printed))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_says_how_to_run_it_and_reads_no_other(path):
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 150
    assert f"python examples/{path.name}" in ast.get_docstring(tree)
    assert '"--fast"' in text
    names = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & {other.stem for other in EXAMPLES}
    assert not [name for name in names if name.startswith("lightning_soaa.")]  # the public names are enough


def test_index_has_each_example_with_a_command_and_an_extra_that_there_is():
    rows = [row.strip("|").split("|") for row in re.findall(r"^\| `.*\|$", INDEX, re.MULTILINE)]
    rows = [[cell.strip() for cell in row] for row in rows]
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    assert {name.strip("`") for name, *_ in rows} == {path.name for path in EXAMPLES}
    for name, shows, command, extra, time in rows:
        assert command.startswith(f"`python examples/{name.strip('`')}")
        assert shows
        assert time
        assert extra.strip("`") in extras
