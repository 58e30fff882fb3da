"""Write docs/compatibility.md from the table of flags: python tests/compatibility.py > docs/compatibility.md."""

from trainer_flags import REFUSED, SAME, TABLE, Row

HEAD = """\
# Trainer flags, in each mode

Written by `python tests/compatibility.py > docs/compatibility.md` from the rows of `tests/trainer_flags.py`.
`tests/test_trainer_flags.py` tests every row, and that this file is what the rows say.

*Default*: `automatic_optimization` is not set. *Automatic*: the module sets it to True. A module that sets it to False
runs its own loop and calls `soaa_step`; to that Lightning's rules of manual optimization apply.

**bit for bit**: the run is the stock run of the same optimizer under `FixedRadius()`, without the mixin: parameters,
buffers, moments, logged rows, hooks and their order, schedulers, checkpoints, what callbacks decide, random streams. It
stays so when every step is checked and accepted: a trial leaves no trace. **refused**: an error at the start of `fit`
that names the flag and the remedy. One process on the CPU.

With several processes, the same holds under DDP (`tests/test_ddp.py`), under FSDP2 (`tests/test_fsdp.py`, on a mesh of
two dimensions `tests/test_hsdp.py`), under FSDP1 (`tests/test_fsdp1.py`, with what is refused there) and for modules
with a loop of their own (`tests/test_manual_ddp.py`). Different numbers of batches, and `Join`, are refused
(`tests/test_uneven.py`).
"""


def outcome(row: Row, mode: str) -> str:
    """Return what a row's cell says."""
    word = {"default": row.default, "automatic": row.automatic}[mode]
    apart = row.apart_automatic if mode == "automatic" else row.apart
    return f"{SAME}, {row.note}" if word == SAME and apart else word


def document() -> str:
    """Return the whole file."""
    counts = [cell for rows in TABLE.values() for row in rows for cell in (row.default, row.automatic)]
    parts = [HEAD, f"{len(counts) // 2} rows; {counts.count(REFUSED)} of {len(counts)} cells are refused.\n"]
    for area, rows in TABLE.items():
        lines = [f"## {area}\n", "| | default | automatic | |", "|---|---|---|---|"]
        lines += [
            f"| {r.flag} | {outcome(r, 'default')} | {outcome(r, 'automatic')} | {'' if r.apart else r.note} |"
            for r in rows
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
