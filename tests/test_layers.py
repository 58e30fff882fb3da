"""The layers of the package, read off its imports."""

import ast
from pathlib import Path

import pytest

import lightning_soaa

PACKAGE = Path(lightning_soaa.__file__).parent
TORCH = {"torch"}
FRONT = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "rich", "numpy"}

# module: (modules of the package it may import, third-party packages it may import)
LAYERS = {
    "_checks": (set(), TORCH),
    "_dist": (set(), TORCH),
    "_flat": ({"_dist"}, TORCH),
    "report": (set(), TORCH),
    "_sums": ({"_dist"}, TORCH),
    "_memory": (set(), TORCH),
    "_bucket": ({"_dist", "_memory", "_sums"}, TORCH),
    "_moments": ({"_sums"}, TORCH),
    "_stride": ({"_moments", "_sums"}, TORCH),
    "_estimate": ({"_bucket"}, TORCH),
    "fisher": ({"_bucket", "_estimate", "_memory", "_moments", "_stride", "_sums"}, TORCH),
    "_bases": (set(), TORCH),
    "_frames": ({"_bases", "_bucket", "_estimate", "_memory"}, TORCH),
    "kronecker": (
        {"_bases", "_bucket", "_checks", "_dist", "_estimate", "_frames", "_moments", "_sums", "fisher"},
        TORCH,
    ),
    "_fishers": ({"_checks", "_estimate"}, set()),
    "gate": (set(), TORCH),
    "radius": ({"_checks"}, set()),
    "_ratios": ({"radius"}, set()),
    "ratio": ({"_checks", "_ratios", "radius"}, set()),
    "portions": (set(), set()),
    "_state": ({"_checks", "_moments", "radius"}, TORCH),
    "_portions": ({"_state", "portions"}, TORCH),
    "_loss": ({"_checks", "_dist", "_sums"}, TORCH),
    "_checkpoint": ({"_checks", "_state", "_estimate", "gate", "radius"}, TORCH),
    "_gather": ({"_bucket", "_checks", "_dist", "_flat", "_portions", "_state", "_sums", "_estimate", "radius"}, TORCH),
    "_proposal": ({"_bucket", "_dist", "_sums", "_estimate", "gate"}, TORCH),
    "_walk": ({"_bucket", "_dist", "_moments", "_proposal", "_sums", "_estimate"}, TORCH),
    "_describe": ({"_bucket", "_dist", "_memory", "_proposal", "_sums", "_estimate"}, TORCH),
    "_unread": ({"_proposal", "_state", "_sums", "gate"}, TORCH),
    "_trust_region": ({"_checks", "_proposal", "_state", "_sums", "_walk", "radius"}, TORCH),
    "_step": (
        {
            *("_checks", "_gather", "_loss", "_portions", "_proposal", "_state", "_trust_region", "_unread", "_walk"),
            *("_estimate", "_flat", "radius"),
        },
        TORCH,
    ),
    "optimizer": (
        {
            *("_checks", "report", "fisher", "radius", "ratio", "_state", "_loss", "_checkpoint", "_proposal"),
            *("_describe", "_estimate", "_fishers", "_flat", "_gather", "_step", "_sums", "_unread", "gate"),
        },
        TORCH,
    ),
    "averaging": ({"_checks"}, TORCH),
    "_holdings": ({"_dist", "_flat"}, FRONT),
    "trial": ({"_checks", "_dist", "_flat", "_holdings"}, FRONT),
    "_compat": ({"_checks"}, FRONT),
    "_results": ({"_compat"}, FRONT),
    "_setup": ({"_checks", "_compat", "_dist", "_flat", "optimizer", "monitor"}, FRONT),
    "_log": ({"_compat"}, FRONT),
    "_closures": ({"_checks", "_compat", "optimizer", "trial"}, FRONT),
    "_automatic": ({"_compat", "_closures", "trial"}, FRONT),
    "_manual": ({"_checks", "_compat", "optimizer", "trial"}, FRONT),
    "_uneven": ({"_compat", "_dist", "_setup"}, FRONT),
    "_hooks": ({"_automatic", "_closures", "_compat", "_setup", "_uneven"}, FRONT),
    "module": ({"_closures", "_hooks", "_log", "_manual", "_uneven", "optimizer"}, FRONT),
    "metrics": ({"report"}, FRONT),
    "console": (set(), {"rich"}),
    "_watch": ({"ratio", "report"}, set()),
    "advice": ({"_watch", "ratio"}, set()),
    "_points": (set(), {"numpy"}),
    "_runs": ({"_points", "_watch", "advice", "report"}, {"numpy", "tensorboard"}),
    "_plots": ({"_points", "_runs"}, {"matplotlib", "numpy"}),
    "run_report": ({"_points", "_runs", "_plots"}, set()),
    "_clock": (set(), TORCH),
    "_rows": ({"_checks", "console", "report"}, set()),
    "_details": ({"_checks", "_rows", "_sums", "_estimate", "report"}, TORCH),
    "monitor": (
        {
            *("_checks", "report", "metrics", "console", "_watch", "advice", "_compat", "_results", "_clock", "_rows"),
            "_details",
        },
        FRONT,
    ),
    "report_callback": ({"_checks", "_compat", "_rows", "_runs", "run_report", "monitor"}, FRONT),
    "__init__": (
        {
            *("advice", "averaging", "fisher", "kronecker", "radius", "ratio", "report", "optimizer", "module"),
            *("monitor", "report_callback"),
        },
        set(),
    ),
}


def imports(path):
    """Return (modules of the package, third-party top-level names, full names) that a file imports anywhere."""
    own, foreign, full = set(), set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, *rest = name.split(".")
            full.add(name)
            if top == "lightning_soaa":
                own.add(rest[0])
            else:
                foreign.add(top)
    return own, foreign, full


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_module_imports_only_what_its_layer_may(path):
    import sys

    allowed_own, allowed_foreign = LAYERS[path.stem]
    own, foreign, _ = imports(path)
    assert own <= allowed_own
    assert foreign - set(sys.stdlib_module_names) <= allowed_foreign


def test_only_dist_knows_torch_distributed():
    users = {path.stem for path in PACKAGE.glob("*.py") if any("torch.distributed" in n for n in imports(path)[2])}
    assert users == {"_dist"}


def test_no_module_is_imported_by_a_module_below_it():
    order = list(LAYERS)
    for name, (own, _) in LAYERS.items():
        assert all(order.index(other) < order.index(name) or other in {"monitor"} for other in own), name


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_module_has_no_print_assert_or_bare_except(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Assert)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"print", "hasattr"}
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.id if isinstance(node.type, ast.Name) else None
            assert caught not in {None, "Exception"}
            assert caught != "BaseException" or isinstance(node.body[-1], ast.Raise)
