"""Every example runs from top to bottom in its fast form."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_fast(path, tmp_path):
    command = [sys.executable, str(path), "--fast"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "test accuracy: 0." in done.stdout
    assert len(path.read_text().splitlines()) <= 120
