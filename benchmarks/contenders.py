"""The optimizers that are compared, behind one uniform step."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.drivers import Averaged, Driver, checked_step, clipped_step, joint_step
from benchmarks.fingerprint import module_hash, package_versions, soaa_hash

Options = dict[str, Any]

DECAY = 0.01
SOAP_SIDE, MUON_SIDE = 256, 128  # longest side of a matrix that SOAP and Muon treat as one
HALF_DECADES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)


def _adamw(model: nn.Module, lr: float, total: int, options: Options, clip: bool = False) -> Driver:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **{"weight_decay": DECAY, "fused": True, **options})
    return Driver(optimizer, step=clipped_step if clip else None)


def _prodigy(model: nn.Module, lr: float, total: int, options: Options) -> Driver:
    from prodigyopt import Prodigy

    return Driver(Prodigy(model.parameters(), lr=lr, **{"weight_decay": DECAY, **options}))


def _schedule_free(model: nn.Module, lr: float, total: int, options: Options) -> Driver:
    from schedulefree import AdamWScheduleFree

    fixed = {"weight_decay": DECAY, "warmup_steps": total // 10}
    return Driver(AdamWScheduleFree(model.parameters(), lr=lr, **{**fixed, **options}), modes=True)


def _momo(model: nn.Module, lr: float, total: int, options: Options) -> Driver:
    from momo import MomoAdam

    return Driver(MomoAdam(model.parameters(), lr=lr, **{"weight_decay": DECAY, **options}))


def _dadapt(model: nn.Module, lr: float, total: int, options: Options) -> Driver:
    """D-Adapt-Adam under AdamW's own schedule, as its authors advise; without a warm-up it fails on two tasks."""
    from dadaptation import DAdaptAdam

    return Driver(DAdaptAdam(model.parameters(), lr=lr, **{"weight_decay": DECAY, "decouple": True, **options}))


def _soap(model: nn.Module, lr: float, total: int, options: Options) -> Driver:
    from pytorch_optimizer import SOAP

    fixed = {"weight_decay": DECAY, "max_precondition_dim": SOAP_SIDE}
    return Driver(SOAP(model.parameters(), lr=lr, **{**fixed, **options}))


def _muon(model: nn.Module, lr: float, total: int, options: Options) -> Driver:
    """Muon on the hidden matrices, AdamW on embeddings, the last matrix and everything that is not a matrix.

    Matrices with a side over `MUON_SIDE` go to AdamW too: torch's Muon works in bfloat16, which takes seconds a step
    for them on a CPU without such instructions.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = [param for param in model.parameters() if param.ndim == 2]
    hidden = [param for param in matrices[:-1] if id(param) not in tables and max(param.shape) <= MUON_SIDE]
    ids = {id(param) for param in hidden}
    rest = torch.optim.AdamW([p for p in model.parameters() if id(p) not in ids], lr=lr, weight_decay=DECAY, fused=True)
    if not hidden:
        return Driver(rest)
    fixed = {"weight_decay": DECAY, "adjust_lr_fn": "match_rms_adamw"}
    return Driver(torch.optim.Muon(hidden, lr=lr, **{**fixed, **options}), rest, step=joint_step)


def _lbfgs(model: nn.Module, lr: float, total: int, options: Options) -> Driver:
    fixed = {"max_iter": 4, "history_size": 10, "line_search_fn": "strong_wolfe"}
    return Driver(torch.optim.LBFGS(model.parameters(), lr=lr, **{**fixed, **options}))


def _soaa(
    model: nn.Module, lr: float, total: int, options: Options, radius: str, fisher: str, changes: Options
) -> Driver:
    """SOAA; options ``radius.x`` and ``fisher.x`` go to the two rules, all others to the optimizer.

    `changes` replace class attributes of the radius rule, to show what each of them is worth.
    """
    parts: dict[str, Options] = {"radius": {}, "fisher": {}, "": {"weight_decay": DECAY}}
    if radius == "PublishedRadius":
        parts["radius"]["total_steps"] = total
    for name, value in options.items():
        owner, _, key = name.rpartition(".")
        parts[owner][key] = value
    package = importlib.import_module("lightning_soaa")
    rule = getattr(package, radius)
    rules = {
        "radius": (type(radius, (rule,), changes) if changes else rule)(**parts["radius"]),
        "fisher": getattr(package, fisher)(**parts["fisher"]),
    }
    optimizer = package.SOAA(model.parameters(), lr=lr, **parts[""], **rules)
    return Driver(optimizer, step=checked_step)


def _averaged(model: nn.Module, lr: float, total: int, options: Options, build: Callable[..., Driver]) -> Driver:
    return Averaged(build(model, lr, total, options), model)


@dataclass(frozen=True)
class Contender:
    """A named optimizer with the settings its authors advertise.

    Args:
        name: unique name, also the column of every table.
        build: takes model, learning rate, number of steps and options, and returns a `Driver`.
        rates: the learning rates to try; with more than one, the best of them is reported per task.
        schedule: the learning-rate schedule if an experiment does not set another.
        package: the distribution it comes from; its version is part of every key.
        reach: if not 0, only the rates within this many places of AdamW's best rate on the task are tried.
        refine: whether rates between the best and its neighbours are tried too.
        reschedule: whether other schedules make sense for it.
        revision: raised when the code here changes what it does.
        modules: modules of lightning_soaa that only this one uses.
    """

    name: str
    build: Callable[[nn.Module, float, int, Options], Driver]
    rates: tuple[float, ...]
    schedule: str = "cosine"
    package: str = "torch"
    reach: int = 0
    refine: bool = False
    reschedule: bool = True
    revision: int = 1
    modules: tuple[str, ...] = ()


def _ours(
    name: str,
    radius: str,
    fisher: str = "DiagonalFisher",
    reach: int = 0,
    schedule: str = "cosine",
    **changes: object,
) -> Contender:
    build, package = partial(_soaa, radius=radius, fisher=fisher, changes=changes), "lightning_soaa"
    if reach:
        return Contender(name, build, HALF_DECADES, "warmup_cosine", package, reach)
    modules = ("kronecker",) if fisher == "KroneckerFisher" else ()
    return Contender(name, build, (1e-3,), schedule, package, modules=modules)


_ALL = [
    Contender("adamw", _adamw, HALF_DECADES, "warmup_cosine", refine=True),
    Contender("adamw_unscheduled", _adamw, HALF_DECADES, "constant", reach=1),
    Contender("adamw_clip", partial(_adamw, clip=True), HALF_DECADES, "warmup_cosine", reach=1),
    Contender("prodigy", _prodigy, (1.0,), package="prodigyopt"),
    Contender("schedule_free", _schedule_free, (2.5e-3,), "constant", package="schedulefree", reschedule=False),
    Contender(
        "schedule_free_tuned",
        _schedule_free,
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        "constant",
        package="schedulefree",
        reschedule=False,
    ),
    Contender("momo", _momo, (1e-2,), package="momo-opt"),
    Contender("dadapt", _dadapt, (1.0,), "warmup_cosine", package="dadaptation"),
    Contender("soap", _soap, HALF_DECADES, "warmup_cosine", package="pytorch_optimizer", reach=2),
    Contender("muon", _muon, HALF_DECADES, "warmup_cosine", reach=1),
    Contender("lbfgs", _lbfgs, (1.0,), "constant", reschedule=False),
    _ours("soaa_ratio", "RatioRadius"),
    _ours("soaa_ratio_unmasked", "RatioRadius", cautious=False),
    _ours("soaa_ratio_adams_betas", "RatioRadius", betas=(0.9, 0.999)),
    _ours("soaa_ratio_fisher", "RatioRadius", fisher_limits=True),
    _ours("soaa_ratio_ungated", "RatioRadius", gated=False),
    _ours("soaa_ratio_no_fresh_slopes", "RatioRadius", fresh_slopes=False, portions=False),
    _ours("soaa_ratio_no_portions", "RatioRadius", portions=False),
    _ours("soaa_ratio_no_doubts", "RatioRadius", doubts=False),
    _ours("soaa_ratio_unscheduled", "RatioRadius", schedule="constant"),
    _ours("soaa_ratio_unannealed", "RatioRadius", schedule="constant", anneals=False),
    _ours("soaa_kronecker", "RatioRadius", "KroneckerFisher"),
    _ours("soaa_kronecker_unscheduled", "RatioRadius", "KroneckerFisher", schedule="constant"),
    _ours("soaa_published", "PublishedRadius"),
    _ours("soaa_published_tuned", "PublishedRadius", reach=1),
    _ours("soaa_fixed", "FixedRadius", reach=1),
]
_ALL += [
    replace(
        each,
        name=each.name.replace("unscheduled", "averaged"),
        build=partial(_averaged, build=each.build),
        modules=(*each.modules, "averaging"),
    )
    for each in _ALL
    if each.name.endswith("_unscheduled")
]
CONTENDERS: dict[str, Contender] = {contender.name: contender for contender in _ALL}


def parse(text: str) -> tuple[Contender, Options]:
    """Return contender and options of ``name:key=value,key=value``; values are numbers, words, or a/b for tuples."""
    name, _, rest = text.partition(":")
    if name not in CONTENDERS:
        raise ValueError(f"benchmarks: no contender {name!r}; there are {', '.join(CONTENDERS)}")
    pairs = [item.split("=", 1) for item in rest.split(",") if item]
    return CONTENDERS[name], {key: _value(value) for key, value in pairs}


def _value(text: str) -> Any:
    if "/" in text:
        return tuple(_value(part) for part in text.split("/"))
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text


def contender_version(text: str) -> str:
    """Return what identifies the code behind a contender: a package version, or a hash of sources."""
    contender, _ = parse(text)
    if contender.package == "lightning_soaa":
        return f"{soaa_hash(*contender.modules)}.{contender.revision}"
    if contender.package == "torch" or contender.package.startswith("plugin"):
        return ".".join([contender.package, str(contender.revision), *map(module_hash, contender.modules)])
    return f"{package_versions((contender.package,))[contender.package]}.{contender.revision}"
