"""What determines a run, its key, and the file of finished runs."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders import contender_version
from benchmarks.fingerprint import ROOT, short, source_hash
from benchmarks.tasks import family_of

RESULTS = ROOT / "benchmarks" / "results"
HARNESS = 1  # raise when a change of the training loop changes numbers


@dataclass(frozen=True)
class RunSpec:
    """One training run.

    Args:
        task: name of the task.
        contender: name of the contender, with options after a colon.
        lr: learning rate handed to the contender.
        seed: seed of the initial weights, the batches and dropout.
        steps: optimizer steps; the schedule ends with them.
        batch_size: rows of a batch.
        schedule: name of the learning-rate schedule.
        poison: kind of poisoned batches, or empty.
        restart: whether everything goes through a checkpoint half-way.
    """

    task: str
    contender: str
    lr: float
    seed: int
    steps: int
    batch_size: int
    schedule: str
    poison: str = ""
    restart: bool = False

    @property
    def versions(self) -> dict[str, str]:
        """Return what else determines the run: the code of task, contender and harness."""
        return {
            "task": task_version(self.task),
            "contender": contender_version(self.contender),
            "harness": str(HARNESS),
        }

    @property
    def key(self) -> str:
        """Return the hash that names the run in the result files."""
        return short(json.dumps([asdict(self), self.versions], sort_keys=True), 16)


def task_version(name: str) -> str:
    """Return the hash of the files that define the task's family, the data and the shared losses."""
    folder = ROOT / "benchmarks"
    return source_hash(folder / "data.py", folder / "tasks" / "base.py", folder / "tasks" / f"{family_of(name)}.py")


class Store:
    """The finished runs of every ``*.jsonl`` file in a folder, by key.

    A torn last line, left by a run that was killed while writing, counts as a run that has not finished.
    """

    def __init__(self, folder: Path = RESULTS):
        self.folder = folder
        self.records: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_text().splitlines():
                if line.endswith("}"):
                    record = json.loads(line)
                    self.records[record["key"]] = record

    def __contains__(self, spec: RunSpec) -> bool:
        return spec.key in self.records

    def get(self, spec: RunSpec) -> dict[str, Any] | None:
        """Return the record of `spec`, or None if it has not run yet."""
        return self.records.get(spec.key)

    def add(self, record: dict[str, Any], name: str) -> None:
        """Append `record` to the file of experiment `name`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records[record["key"]] = record

    def missing(self, specs: Iterable[RunSpec]) -> list[RunSpec]:
        """Return the specs without a record, each once, in order."""
        return [spec for spec in dict.fromkeys(specs) if spec not in self]

    def prune(self) -> int:
        """Drop the runs of tasks and contenders that have changed since, or are gone; return how many."""
        dropped = 0
        for path in sorted(self.folder.glob("*.jsonl")):
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("}\n") and _is_current(json.loads(line))]
            path.write_text("".join(kept))
            dropped += len(lines) - len(kept)
        return dropped


def _is_current(record: dict[str, Any]) -> bool:
    try:
        return bool(RunSpec(**record["spec"]).key == record["key"])
    except ValueError:  # a task or contender that is no longer known
        return False
