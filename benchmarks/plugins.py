"""Contenders from a file outside the package: ``--plugin FILE``, which defines a list `CONTENDERS`."""

import runpy
from dataclasses import replace
from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.fingerprint import soaa_hash, source_hash


def load(path: str) -> None:
    """Add the contenders of the python file at `path`; hashes of it and of SOAA's sources become their version."""
    file = Path(path).resolve()
    mark = f"plugin {source_hash(file)} {soaa_hash()}"
    for contender in runpy.run_path(str(file))["CONTENDERS"]:
        known = CONTENDERS.get(contender.name)
        if known is not None and not known.package.startswith("plugin"):
            raise ValueError(f"benchmarks: plugin {path} redefines the contender {contender.name!r}")
        CONTENDERS[contender.name] = replace(contender, package=mark)
