"""What :class:`~lightning_soaa.SOAA` keeps: names of its state, options of groups, the copy a check restores."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._checks import check_between, check_nonnegative, check_positive, refuse
from lightning_soaa._moments import SMALLEST
from lightning_soaa.radius import AbstractRadius, Numbers

# Per parameter, always saved, beside the tensors of the Fisher. A plain int: gradients absorbed so far.
STEP = "step"

# Per parameter under a rule with portions, always saved, plain floats: what the parameter's steps are multiplied by,
# and were in the last check; what its part of the last accepted check promised, and what the next gradient found of
# that, -inf before; averages of both.
PORTION, LAST_PORTION, PROMISED, LEFT_OVER = "portion", "last_portion", "promised", "left_over"
PROMISED_MEAN, LEFT_OVER_MEAN = "promised_mean", "left_over_mean"
PORTIONS: Mapping[str, float] = {
    PORTION: 1.0,
    LAST_PORTION: 1.0,
    PROMISED: 0.0,
    LEFT_OVER: -inf,
    PROMISED_MEAN: 0.0,
    LEFT_OVER_MEAN: 0.0,
}

# Every group, options.
OPTIONS = ("lr", "betas", "eps", "weight_decay", "foreach", "fused", "maximize")
BASE_LR = "base_lr"  # lr the group came with; schedulers move lr away from it
GROUP_RADIUS = "group_radius"  # bound of the group's step in units of the parameters, of the last step

# Group 0, always saved: plain numbers. The radius rule's own numbers follow under RULE + name.
RADIUS = "radius"
RULE = "rule_"
RULE_NAME = "radius_rule"
LR_UNIT = "lr_unit"  # largest initial lr of all groups at the first step
STEPS = "steps"
CHECKS = "checks"
ACCEPTED_CHECKS = "accepted_checks"
SKIPPED_STEPS = "skipped_steps"  # loss or gradient not finite
OUTLIER_STEPS = "outlier_steps"  # left out by the gate
TOTAL_TRIALS = "total_trials"
UNCHECKED_STEPS = "unchecked_steps"
LAST_PREDICTED = "predicted_reduction"
LAST_ACTUAL = "actual_reduction"
REPEAT_GAP = "repeat_gap"  # None before the first check
CHECKED_SLOPE = "checked_slope"  # predicted reduction of the last step if the next gradient is held against it, else 0
FRESH_SLOPE = "fresh_slope"  # what that gradient found, in units of it; None once a check has used it
GATE = "gate"  # what the outlier gate knows
GRADIENT_RMS = "gradient_rms"  # of the last check, what eps is a multiple of; None before it
# Numbers of the rule that are the radius itself or its bounds; they carry no RULE.
RADII = (RADIUS, "radius_low", "radius_high")

# What group 0 starts with.
COUNTERS: Mapping[str, int | float | tuple[float, ...] | None] = {
    LR_UNIT: 0.0,
    STEPS: 0,
    CHECKS: 0,
    ACCEPTED_CHECKS: 0,
    SKIPPED_STEPS: 0,
    OUTLIER_STEPS: 0,
    TOTAL_TRIALS: 0,
    UNCHECKED_STEPS: 0,
    LAST_PREDICTED: 0.0,
    LAST_ACTUAL: 0.0,
    REPEAT_GAP: None,
    CHECKED_SLOPE: 0.0,
    FRESH_SLOPE: None,
    GATE: (),
    GRADIENT_RMS: None,
}
# Counters that a report repeats.
REPORTED = (CHECKS, ACCEPTED_CHECKS, SKIPPED_STEPS, OUTLIER_STEPS, TOTAL_TRIALS)


def check_options(group: Mapping[str, Any]) -> None:
    """Check the options of one parameter group.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range; the text names it.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            refuse("SOAA", "lr", "a number or a tensor of one element", tuple(lr.shape))
        lr = lr.item()
    check_nonnegative("SOAA", "lr", lr)
    betas = group["betas"]
    if not isinstance(betas, Sequence) or len(betas) != 2:
        refuse("SOAA", "betas", "a pair of numbers", betas, TypeError)
    for index, beta in enumerate(betas):
        check_between("SOAA", f"betas[{index}]", beta, -1e-300, 1, "in [0, 1)")
    if check_positive("SOAA", "eps", group["eps"]) < SMALLEST:
        refuse("SOAA", "eps", f">= {SMALLEST}, the smallest normal float32", group["eps"])
    check_nonnegative("SOAA", "weight_decay", group["weight_decay"])
    for name in ("foreach", "fused"):
        if not isinstance(group[name], bool | None):
            refuse("SOAA", name, "None, True or False", group[name], TypeError)
    if not isinstance(group["maximize"], bool):
        refuse("SOAA", "maximize", "a bool", group["maximize"], TypeError)


def initial_lr(group: Mapping[str, Any]) -> float:
    """Return the lr that a group's schedule starts from: what f = lr / initial_lr is relative to.

    A scheduler that announces its peak (``max_lr``, OneCycleLR) is read relative to the peak. CyclicLR keeps its peak
    to itself: its schedule starts from its own `base_lr`, and f exceeds 1.
    """
    return float(group.get("max_lr", group.get("initial_lr", group[BASE_LR])))


def lr_unit(groups: Sequence[Mapping[str, Any]]) -> float:
    """Return the lr that counts as 1 under a rule that folds it: the largest initial one at the first step."""
    return float(groups[0][LR_UNIT] or max(initial_lr(group) for group in groups))


def schedule(groups: Sequence[Mapping[str, Any]]) -> float:
    """Return what the schedulers multiply the step of the group with the largest one by."""
    unit = lr_unit(groups)
    return max(float(group["lr"]) for group in groups) / unit if unit else 0.0


def host_lr(lr: float | Tensor) -> float | Tensor:
    """Return an lr that can be read without waiting for a device: a tensor elsewhere than on the CPU as a number."""
    return float(lr) if isinstance(lr, Tensor) and lr.device.type != "cpu" else lr


def fresh_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group without the numbers that an optimizer keeps in it, as it may come from another SOAA."""
    own = {BASE_LR, GROUP_RADIUS, RULE_NAME, *RADII, *COUNTERS}
    return {key: value for key, value in group.items() if key not in own and not key.startswith(RULE)}


def new_group(
    param_group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a parameter group to be added to `groups`, complete; what it does not name is `defaults`.

    Raises:
        TypeError: `param_group` is no dict, or an option has the wrong type.
        ValueError: an option is out of range, or `maximize` differs from the other groups'.
    """
    if not isinstance(param_group, dict):
        refuse("SOAA", "param_group", "a dict with `params`", type(param_group).__name__, TypeError)
    if "params" not in param_group:
        refuse("SOAA", "param_group", "a dict with `params`", sorted(param_group))
    merged = {**defaults, **fresh_options(param_group)}
    check_options(merged)
    if groups and merged["maximize"] != groups[0]["maximize"]:
        refuse("SOAA", "maximize", "the same in all groups", merged["maximize"])
    lr = host_lr(merged["lr"])
    return {**merged, "lr": lr, BASE_LR: float(lr), GROUP_RADIUS: 0.0}


@cache
def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of moments for parameters of `dtype`: float32 at least."""
    real = dtype.to_real() if dtype.is_complex else dtype
    return torch.promote_types(real, torch.float32)


def as_real(tensor: Tensor) -> Tensor:
    """Return `tensor`, or a view of a complex one with a last dimension of (real, imaginary)."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def numbers_of(head: Mapping[str, Any]) -> Numbers:
    """Return the radius rule's running numbers from group 0."""
    return {name: head[key] for name, key in _rule_keys(tuple(head))}


@lru_cache(maxsize=64)
def _rule_keys(head: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return the rule's own names, and the keys they have in a group with the given keys."""
    own = [(key.removeprefix(RULE), key) for key in head if key.startswith(RULE)]
    return (*((name, name) for name in RADII if name in head), *own)


def store_numbers(head: dict[str, Any], numbers: Mapping[str, float]) -> None:
    """Keep the radius rule's running numbers in group 0 (`head`, modified in place)."""
    for name, value in numbers.items():
        head[name if name in RADII else RULE + name] = value


def remember(
    groups: Sequence[dict[str, Any]],
    bounds: Sequence[float],
    known: Mapping[str, Any],
    rule: AbstractRadius,
    *,
    unit: float | None,
) -> None:
    """Keep what later steps need of one that was taken: its bounds, and of a check its promise and its `unit`.

    (`groups` modified in place.)
    """
    for group, bound in zip(groups, bounds, strict=True):
        group[GROUP_RADIUS] = bound
    head = groups[0]
    head[CHECKED_SLOPE] = 0.0
    if known["checked"]:
        head[FRESH_SLOPE], head[GRADIENT_RMS] = None, unit
        if rule.fresh_slopes and known["accepted"]:
            head[CHECKED_SLOPE] = max(0.0, known["reductions"][0])


def count(head: dict[str, Any], known: dict[str, Any]) -> None:
    """Count a step in group 0 and complete what is known of it for its report (both modified in place).

    `known` holds ``checked``, ``accepted``, ``trials``, ``skipped`` and ``outlier`` if they have been read, the
    ``reductions`` that the decision rests on, if there was one, and the ``repeat_gap`` of a check. A step that is an
    outlier is skipped, too; it is counted as an outlier alone.
    """
    outlier = known.pop("outlier", False)
    skipped = known.get("skipped", False) and not outlier
    accepted = int(known["checked"] and known["accepted"])
    added = {STEPS: 1, TOTAL_TRIALS: known["trials"], CHECKS: int(known["checked"])}
    added |= {SKIPPED_STEPS: int(skipped), OUTLIER_STEPS: int(outlier)}
    for name, number in {**added, ACCEPTED_CHECKS: accepted}.items():
        head[name] += number
    head[UNCHECKED_STEPS] = 0 if known["checked"] else head[UNCHECKED_STEPS] + 1
    head[REPEAT_GAP] = known.pop("repeat_gap", head[REPEAT_GAP])
    reductions = known.pop("reductions", None)
    if reductions is not None:
        head[LAST_PREDICTED], head[LAST_ACTUAL] = reductions
    known |= {"step": head[STEPS], "radius": float(head[RADIUS]), **{name: head[name] for name in REPORTED}}
    if head[REPEAT_GAP] is not None:
        known["repeat_gap"] = head[REPEAT_GAP]
    predicted, actual = head[LAST_PREDICTED], head[LAST_ACTUAL]
    if predicted != 0:
        known |= {"predicted_reduction": predicted, "actual_reduction": actual}
        known["acceptance_ratio"] = actual / predicted if isfinite(actual) else actual


def fill_missing(groups: Sequence[dict[str, Any]], defaults: Mapping[str, Any], rule: AbstractRadius) -> None:
    """Give groups the options and numbers that they lack: new ones all, loaded ones what an older state dict had not.

    (`groups` modified in place.)
    """
    for group in groups:
        group.setdefault(BASE_LR, float(group["lr"]))
        group.setdefault(GROUP_RADIUS, 0.0)
        for name in OPTIONS:
            group.setdefault(name, defaults[name])
    head = groups[0]
    for name, value in {**COUNTERS, RULE_NAME: type(rule).__name__}.items():
        head.setdefault(name, value)
    for name, value in rule.init(max(initial_lr(group) for group in groups)).items():
        head.setdefault(name if name in RADII else RULE + name, value)


class Snapshot:
    """A copy of all that a check may have to put back, bit for bit: parameters, moments, ages.

    Args:
        params: the parameters as given to the optimizer.
        state: the optimizer's per-parameter state; parameters without one lose theirs on :meth:`restore`.
        moments: copy the state's tensors too; False where they are not modified before the decision.

    Holds as many bytes as what it copies, and is to be dropped before the step returns.
    """

    def __init__(self, params: Iterable[Tensor], state: dict[Tensor, dict[str, Any]], *, moments: bool = True) -> None:
        self._state = state
        self._params = [(param, param.detach().clone()) for param in params]
        self._entries = {
            param: {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in state[param].items()
                if moments or not isinstance(value, Tensor)
            }
            for param, _ in self._params
            if param in state
        }

    def restore_params(self) -> None:
        """Put back the parameters alone."""
        for param, kept in self._params:
            param.copy_(kept)

    def restore(self) -> None:
        """Put back parameters and per-parameter state, in place where tensors exist."""
        self.restore_params()
        for param, _ in self._params:
            if param not in self._entries:
                self._state.pop(param, None)
                continue
            for key, value in self._entries[param].items():
                if isinstance(value, Tensor):
                    self._state[param][key].copy_(value)
                else:
                    self._state[param][key] = value
