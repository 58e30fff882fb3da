"""Several processes in a test: started together, bounded in time, gone when it ends."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

QUIET_LINES = ("[Gloo]", "[W")
# torch 2.6 shards (fully_shard) on accelerators alone.
SHARDS_ON_CPU = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6 has no CPU streams")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**variables):
    """Return this process's environment, with the search path of this interpreter and `variables`."""
    path = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", **variables}


def start(script, *args, log, **variables):
    """Start `script` as a process of its own session, with its output in the file `log`."""
    command = [sys.executable, str(script), *map(str, args)]
    with Path(log).open("w") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment(**variables), start_new_session=True
        )


def stop(process):
    """Kill a process and all that it started."""
    if process.poll() is None or group_lives(process):
        os.killpg(process.pid, 9)
    process.wait()


def group_lives(process):
    """Return whether anything that `process` started is still there."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait(processes, seconds):
    """Wait for all; the first that fails, or the end of the time, ends all. Return their exit statuses."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            stop(process)
    return codes


def run_ranks(script, *args, folder, ranks=2, seconds=150):
    """Run `script` once a rank, as torchrun would; each is given its rank, then `args`. What fails, fails here."""
    port = str(free_port())
    logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
    variables = {"MASTER_PORT": port, "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    processes = [
        start(script, rank, *args, log=log, LOCAL_RANK=str(rank), RANK=str(rank), **variables)
        for rank, log in enumerate(logs)
    ]
    codes = wait(processes, seconds)
    assert codes == [0] * ranks, "\n".join(f"{log.name}:\n{log.read_text()[-4000:]}" for log in logs)


def of_ranks(script, folder, *args, ranks=2, seconds=150):
    """Run `script` once a rank with `folder` and `args`; return what each has saved there as ``<rank>.pt``."""
    run_ranks(script, folder, *args, folder=folder, ranks=ranks, seconds=seconds)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
