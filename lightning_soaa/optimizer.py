"""SOAA: collects gradients, lets the Fisher propose a step and the radius rule judge it, and owns every mutation."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from lightning_soaa import _state as keys
from lightning_soaa._checkpoint import loading
from lightning_soaa._checks import refuse
from lightning_soaa._describe import describe
from lightning_soaa._estimate import AbstractFisher, Fishers
from lightning_soaa._fishers import check_fisher, joint_fisher
from lightning_soaa._flat import Parts
from lightning_soaa._gather import (
    Entry,
    complete_state,
    ensure_state,
    find_gradients,
    gradient_sizes,
    lay_out,
    no_gradients,
)
from lightning_soaa._loss import scalar_loss
from lightning_soaa._proposal import Proposal
from lightning_soaa._step import LossClosure, Stepper, check_rules
from lightning_soaa._sums import read
from lightning_soaa._unread import Unread
from lightning_soaa.fisher import DiagonalFisher
from lightning_soaa.radius import AbstractRadius
from lightning_soaa.ratio import RatioRadius
from lightning_soaa.report import StepReport


class SOAA(Optimizer):
    r"""SecondOrderAdaptiveAdam (arXiv 2410.02293): Adam's moments, a diagonal Fisher, a trust region.

    .. code-block:: text

        m <- b1 m + (1-b1) g          v <- b2 v + (1-b2) g*g           mh, vh: corrected for their start at zero
        F = (1 + sum(mh^2)/sum(vh+eps)) vh                             sums over all parameters of all groups
        u = d mh / (max(d F, sqrt(vh)) + eps)                          model minimiser in a box of radius d
        theta <- theta - lr wd theta - lr u

    The radius rule moves d. Under :class:`~lightning_soaa.RatioRadius` the learning rate is folded into the radius:
    lr is 1 in the step, ``d = radius (lr / largest initial lr)`` for each group, and decay is ``d wd theta``.

    A step whose loss or gradient is not finite is skipped: parameters and moments stay as they are. Between checks
    the host does not wait for the device to learn of it, so the age of the parameters (``state[p]["step"]``) counts
    such a step there; on a check it does not.

    Args:
        params: parameters, or dicts of parameter groups with their own ``lr``, ``betas``, ``eps``, ``weight_decay`` or
            ``fisher``. A group's Fisher is configuration: it is kept by the position of the group, not in
            ``param_groups`` and not in ``state_dict``; an optimizer that loads one is built with the same.
        lr: learning rate (default: 1e-3). Under RatioRadius only the groups' proportions count, and schedulers, which
            multiply the step as everywhere.
        betas: decays of the two moments, each in [0, 1) (default: None, which is (0.9, 0.99) under RatioRadius and
            Adam's (0.9, 0.999) under the other rules).
        eps: constant in the denominators, > 0 (default: 1e-8).
        weight_decay: decoupled weight decay, >= 0 (default: 0).
        radius: the radius rule (default: ``RatioRadius()``).
        fisher: the Fisher estimate (default: ``DiagonalFisher()``).
        foreach: multi-tensor operations; None picks them (default: None).
        fused: torch's fused AdamW kernel for moments and step, where only the radius limits it; None picks it where the
            device has it and `foreach` is None (default: None).
        maximize: maximise the loss (default: False).
        compile: have torch.compile make one pass of the steps between checks, for large tensors; equal up to rounding.
            Under RatioRadius with DiagonalFisher only (default: False).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range; the text names argument, rule and value.

    Example::

        >>> import torch
        >>> from lightning_soaa import SOAA
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = SOAA([x])
        >>> loss_closure = lambda: (x * x).sum()
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = loss_closure()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(200):
        ...     loss = optimizer.step(closure, loss_closure=loss_closure)
        >>> bool(loss < 0.1)
        True

    Does not support sparse gradients.
    """

    _compiled = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        radius: AbstractRadius = RatioRadius(),  # noqa: B008  (frozen)
        fisher: AbstractFisher = DiagonalFisher(),  # noqa: B008  (frozen)
        foreach: bool | None = None,
        fused: bool | None = None,
        maximize: bool = False,
        compile: bool = False,
    ) -> None:
        check_rules(radius, compile=compile)
        check_fisher(fisher, compiled=compile)
        defaults: dict[str, Any] = {
            "lr": keys.host_lr(lr),
            "betas": radius.betas if betas is None else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "fused": fused,
            "maximize": maximize,
        }
        keys.check_options(defaults)
        if not isinstance(params, Tensor):
            params = cast("ParamsT", list(params))
            if not params:
                refuse("SOAA", "params", "a non-empty iterable of parameters", params)
        self.radius_rule, self.fisher_rule, self._compiled = radius, fisher, compile
        self._own_fishers: list[AbstractFisher | None] = []
        self._parts: Parts = {}
        self._forget()
        super().__init__(params, defaults)
        keys.fill_missing(self.param_groups, self.defaults, radius)

    def _forget(self) -> None:
        """Drop all that lives for one step only."""
        self._bound: tuple[LossClosure, Tensor | None] | None = None
        self._pending: tuple[Proposal, dict[str, Any]] | None = None
        self._report: StepReport | None = None
        self._unclipped: dict[Tensor, Tensor] | None = None
        self._unread = Unread()

    def _note_parts(self, parts: Parts) -> None:
        """Take note of parameters of which each process holds a part, those of FullyShardedDataParallel."""
        self._parts = parts

    @property
    def radius(self) -> float:
        """Return the trust-region radius that the next step starts from."""
        return float(self.param_groups[0][keys.RADIUS])

    @property
    def rotates(self) -> bool:
        """Return whether a Fisher works in coordinates of its own, as KroneckerFisher does."""
        return self._fisher.rotates

    @property
    def _fisher(self) -> Fishers:
        """Return the Fisher of all groups."""
        return joint_fisher(self.fisher_rule, self._own_fishers, len(self.param_groups))

    @property
    def check_due(self) -> bool:
        """Return whether the next step is a check, for which a loss closure has to be at hand. Waits for no device."""
        rule, head = self.radius_rule, self.param_groups[0]
        return rule.needs_trial and rule.check_due(keys.numbers_of(head), head[keys.UNCHECKED_STEPS])

    @property
    def last_step(self) -> StepReport | None:
        """Return what the last step did, None before the first.

        The statistics are computed when first read, which waits for the device once and takes a pass over the state.
        Where parameters are sharded, read it on all ranks or on none: it sums over them.
        """
        if self._pending is not None:
            (proposal, known), head = self._pending, self.param_groups[0]
            if "skipped" not in known:  # the host has not heard of it yet
                ok, *heard = read([proposal.ok, *self._unread.figures()], proposal.home)
                self._settle(heard)
                known |= {"skipped": not ok, "accepted": bool(ok)}
                known |= {name: head[name] for name in (keys.SKIPPED_STEPS, keys.OUTLIER_STEPS)}
            moved, skipped = known["accepted"], known["skipped"]
            known |= describe(proposal, self._fisher, moved=moved, skipped=skipped)
            known["base_loss"] *= -1 if head["maximize"] else 1
            self._pending, self._report = None, StepReport(**known)
        return self._report

    def bind_loss_closure(self, loss_closure: LossClosure, *, base_loss: Tensor | float | None = None) -> None:
        """Hand over a loss closure for the next step only, where ``step`` can take no keyword.

        Args:
            loss_closure: as in :meth:`step`.
            base_loss: the loss at the current point, if no closure returns it.

        Raises:
            TypeError: `loss_closure` is not callable, or `base_loss` is no scalar.
        """
        if not callable(loss_closure):
            refuse("SOAA", "loss_closure", "callable", loss_closure, TypeError)
        self._bound = (loss_closure, None if base_loss is None else scalar_loss("base_loss", base_loss))

    @torch.no_grad()
    def before_clipping(self, *, scale: Tensor | float = 1.0) -> None:
        """Note the size of the gradients of the next step, after their backward pass, before they are clipped.

        Predicted reductions rest on the slope of the loss, which is that of gradients before they are clipped. They are
        divided by the share of the gradients' 1-norm that clipping leaves: exact where it scales all of them, an
        estimate where it cuts off values. A parameter whose gradient is dropped or zeroed afterwards does not count;
        one of which a part is zeroed counts as clipped. Costs a pass over the gradients on a check and the step after.

        Args:
            scale: what a gradient scaler has multiplied the gradients by, if it divides them before the step.
        """
        asked = self.check_due or self.param_groups[0][keys.CHECKED_SLOPE]
        self._unclipped = gradient_sizes(find_gradients(self.param_groups, self._parts), scale) if asked else None

    @torch.no_grad()
    def step(self, closure: LossClosure | None = None, *, loss_closure: LossClosure | None = None) -> Any:
        """Take one step.

        Args:
            closure: zeroes gradients, computes the loss and its gradients, returns the loss. Called once, with
                gradients enabled. Without it, gradients are taken as they are.
            loss_closure: computes the loss of the same batch, forward only, and returns it. Called as often as the
                radius rule asks for, without gradients. It must be deterministic and free of side effects.

        Returns:
            What `closure` returned.

        Raises:
            TypeError: a closure is not callable or returns no real scalar, or a gradient is sparse.
            ValueError: the radius rule needs a loss or a loss closure and was given none, or its radius is not finite.

        An exception in either closure leaves parameters and state as they were before the step. So does one in the
        radius rule on a check; elsewhere parameters and radius stay, but the moments may have absorbed the gradient.

        The first check evaluates the loss closure once more, before anything moves: what it differs by from the loss
        of the gradients (``last_step.repeat_gap``) is forgiven in all checks, as rounding is.

        A step without a closure that finds nothing but zero gradients before there is any state creates the state and
        is not counted, as torch's distributed checkpoint wants it.
        """
        for name, value in (("closure", closure), ("loss_closure", loss_closure)):
            if value is not None and not callable(value):
                refuse("SOAA", name, "callable", value, TypeError)
        bound, self._bound = self._bound, None
        base: Tensor | None = None
        if loss_closure is None and bound is not None:
            loss_closure, base = bound
        look = self.radius_rule.needs_trial or self.radius_rule.needs_loss or not self.state
        blind = closure is None and loss_closure is None and no_gradients(self.param_groups, self._parts, look=look)
        if self.radius_rule.needs_trial and loss_closure is None and not blind:
            raise ValueError(
                f"SOAA: `loss_closure` must be given under {type(self.radius_rule).__name__}, got None; pass "
                "step(closure, loss_closure=...), a forward pass on the same batch, or choose FixedRadius()"
            )
        returned = None
        if closure is not None:
            with torch.enable_grad():
                returned = closure()
            base = base if returned is None else scalar_loss("closure", returned)
        if blind:
            every = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"] if p.requires_grad]
            ensure_state(every, self.state, self._fisher, self.radius_rule, self._parts)
        # a closure that returns nothing may have found no loss to differentiate
        elif entries := find_gradients(self.param_groups, {} if closure and returned is None else self._parts):
            self._take(entries, base, loss_closure)
        return returned

    def _take(self, entries: list[Entry], base: Tensor | None, loss_closure: LossClosure | None) -> None:
        """Take a step on the given gradients; `base` is the loss they belong to, if known."""
        unclipped, self._unclipped = self._unclipped, None
        rules = (self.defaults, self.radius_rule, self._fisher)
        stepper = Stepper(self.param_groups, self.state, *rules, self._unread, self._parts, unclipped, self._compiled)
        check = self.check_due
        proposal, known, self._unread = stepper.take(entries, base, loss_closure, lambda: self._unread, check=check)
        self._pending, self._report = (proposal, known), None

    def _settle(self, heard: Sequence[float] | None = None) -> None:
        """Enter what the host had not heard of into first group and state; `heard` if it has just been read."""
        self._unread.settle(self.param_groups[0], self.state, self._unread.read() if heard is None else heard)
        self._unread = Unread(gate=self._unread.gate)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, also in mid-training; options it does not name are those of the defaults.

        A group of another SOAA brings its options and the user's keys, not the numbers of the run it comes from.

        Raises:
            TypeError: `param_group` is no dict, or an option has the wrong type.
            ValueError: an option is out of range, or `maximize` differs from the other groups'.
        """
        fisher = param_group.get("fisher") if isinstance(param_group, dict) else None
        check_fisher(self.fisher_rule if fisher is None else fisher, compiled=self._compiled)
        group = keys.new_group(param_group, self.param_groups, self.defaults)
        group.pop("fisher", None)
        super().add_param_group(group)
        self._own_fishers.append(fisher)

    def state_dict(self) -> dict[str, Any]:
        """Return state and groups as tensors and plain numbers; radius and counters are in group 0."""
        self._settle()
        state: dict[str, Any] = super().state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned; float32 moments stay float32 whatever the parameters are.

        Raises:
            TypeError: it or a part of it has the wrong type; the optimizer is as before.
            ValueError: it is not SOAA's, belongs to another radius rule, or groups, parameters and moments do not
                match; the optimizer is as before.
        """
        with loading(self, state_dict, self.radius_rule, self._fisher):
            super().load_state_dict(state_dict)
        if any(part.shards for part in self._parts.values()):
            complete_state(self.param_groups, self.state, self._fisher, self._parts)
        every = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"] if self.state.get(p)]
        lay_out(every, self.state, self._fisher)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        self._settle()
        own = ("radius_rule", "fisher_rule", "_own_fishers", "_compiled")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults = {"fused": None, **self.defaults}  # of a pickle from before there was one
        self._parts = vars(self).get("_parts", {})  # a copy's parameters are its own
        self._forget()
        keys.fill_missing(self.param_groups, self.defaults, self.radius_rule)
