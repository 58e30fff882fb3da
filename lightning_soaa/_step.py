"""One step on given gradients: what a check and a step without one do to parameters and state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_soaa import _state as keys
from lightning_soaa._checks import refuse
from lightning_soaa._estimate import Fishers
from lightning_soaa._flat import Parts
from lightning_soaa._gather import Entry, ensure_state, gather, gradient_sizes, share_left
from lightning_soaa._loss import evaluated, minimised, resolution, rounding
from lightning_soaa._portions import keep_portions, portions_of
from lightning_soaa._proposal import Proposal, absorb, mark, propose, turn
from lightning_soaa._state import Snapshot
from lightning_soaa._trust_region import follow, search
from lightning_soaa._unread import Unread, fresh_slope
from lightning_soaa._walk import step_sizes, walk
from lightning_soaa.radius import AbstractRadius, Evidence, Numbers

LossClosure = Callable[[], Any]
Outcome = tuple[Proposal, Numbers, dict[str, Any]]  # the step, the rule's new numbers, what is known for the report


def check_rules(radius: AbstractRadius, *, compile: bool) -> None:
    """Check the rule that a step goes by, and whether it can be compiled.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `compile` is asked for where there is no compiled step.
    """
    if not isinstance(radius, AbstractRadius):
        refuse("SOAA", "radius", "a radius rule such as RatioRadius()", radius, TypeError)
    if not isinstance(compile, bool):
        refuse("SOAA", "compile", "a bool", compile, TypeError)
    if compile and radius.fisher_limits:
        refuse("SOAA", "compile", f"False with {type(radius).__name__}", compile)


@dataclass(frozen=True)
class Stepper:
    """Takes one step; parameters, state and the numbers in groups are modified in place.

    Args:
        groups: the optimizer's parameter groups.
        state: its state by parameter.
        defaults: its defaults.
        rule: its radius rule.
        fisher: its Fisher estimate.
        unread: what the host has not heard of.
        parts: parameters of which this process holds parts.
        unclipped: sizes of the gradients before they were clipped, or None if they are not known.
        compiled: steps between checks are compiled.
    """

    groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]
    defaults: dict[str, Any]
    rule: AbstractRadius
    fisher: Fishers
    unread: Unread
    parts: Parts
    unclipped: dict[Tensor, Tensor] | None = None
    compiled: bool = False

    def take(
        self,
        entries: list[Entry],
        base: Tensor | None,
        loss_closure: LossClosure | None,
        unread: Callable[[], Unread],
        *,
        check: bool,
    ) -> tuple[Proposal, dict[str, Any], Unread]:
        """Take a step on the given gradients, and count it.

        Args:
            entries: parameters that have a gradient.
            base: the loss the gradients belong to, if known.
            loss_closure: the loss at the current parameters.
            unread: what the host has not heard of by then; a loss closure that saves the optimizer has it counted.
            check: whether the step is a check.

        Returns:
            The step, what is known of it, and what the host has not heard of after it.

        Raises:
            ValueError: the rule needs a loss and there is none.
        """
        head, rule, trials, numbers = self.groups[0], self.rule, 0, keys.numbers_of(self.groups[0])
        params = [param for _, param in entries]
        if base is None and (check or rule.needs_loss):
            if loss_closure is None:
                raise ValueError(f"SOAA: `closure` must return the loss under {type(rule).__name__}, got None")
            base, trials = evaluated(loss_closure), 1
        if check and base is not None and loss_closure is not None:
            proposal, numbers, known = self.checked(entries, base, loss_closure, numbers)
            heard, slopes, now = known.pop("heard"), known.pop("slopes", ()), unread()
            if now is not self.unread:  # by saving or reading a report
                heard[:2] = (0, 0)
            self.unread.beside(proposal, params).settle(head, self.state, heard)
            after = Unread(gate=now.gate if proposal.gate is None else proposal.gate)
            if known["checked"] and rule.fresh_slopes:
                moved = known["accepted"]
                keep_portions(params if moved else (), self.state, slopes if moved else (), moves=rule.portions)
        else:
            proposal, numbers, known = self.plain(entries, base, numbers)
            after = unread() if "skipped" in known else self.unread.after(proposal, params)
        known["trials"] += trials
        proposal.release()
        head[keys.LR_UNIT] = keys.lr_unit(self.groups)
        if not known.get("skipped", False):
            unit = proposal.unit if isinstance(proposal.unit, float) else None
            keys.remember(self.groups, [size.bound for size in proposal.sizes], known, rule, unit=unit)
        keys.store_numbers(head, numbers)
        keys.count(head, known)
        return proposal, known, after

    def _propose(self, entries: list[Entry], base: Tensor | None, *, check: bool) -> Proposal:
        """Return what can be proposed; the moments may have absorbed the gradients, if nothing is wrong with them."""
        ensure_state(entries, self.state, self.fisher, self.rule, self.parts)
        head, home = self.groups[0], entries[0][1].device
        base = None if base is None else self._minimised(base, home)
        gate = self.unread.gate_of(head, home) if self.rule.gated else None
        left = None
        if self.unclipped is not None:
            left = share_left(self.unclipped, gradient_sizes(entries), self.parts).to(home)
        slope = head[keys.CHECKED_SLOPE] > 0
        last = portions_of([param for _, param in entries], self.state, last=True) if slope else []
        buckets = gather(entries, self.groups, self.state, self.parts)
        return propose(
            buckets,
            base,
            self.fisher,
            gate=gate,
            slope=slope,
            fisher_limits=self.rule.fisher_limits,
            cautious=self.rule.cautious,
            unit=head[keys.GRADIENT_RMS],
            check=check,
            left=left,
            last_portions=last,
            compiled=self.compiled,
        )

    def _minimised(self, loss: Tensor, home: torch.device) -> Tensor:
        """Return a loss as it is minimised, mean over ranks."""
        return minimised(loss, home, maximize=self.groups[0]["maximize"])

    def _walk(self, proposal: Proposal, radius: float, **how: Any) -> Tensor | None:
        """Take the proposal's step at `radius`."""
        sizes = step_sizes(self.groups, radius, keys.lr_unit(self.groups), folds_lr=self.rule.folds_lr)
        return walk(proposal, sizes, self.fisher, cautious=self.rule.cautious, **how)

    def plain(self, entries: list[Entry], base: Tensor | None, numbers: Numbers) -> Outcome:
        """Take a step without a trial. Reads nothing on the host unless the rule needs the loss."""
        proposal = self._propose(entries, base, check=False)
        (beta1, _), eps = self.defaults["betas"], self.defaults["eps"]
        try:
            numbers, known = follow(proposal, self.rule, numbers, walk=self._walk, beta1=beta1, eps=eps)
        except BaseException:
            if not proposal.absorbed:
                self._uncount(entries)
            raise
        if known.get("skipped", False):
            self._uncount(entries)
        else:
            turn(proposal, self.fisher)
        return proposal, numbers, known

    def _uncount(self, entries: list[Entry]) -> None:
        """Take back the gradient that the age of the parameters has counted."""
        for _, param in entries:
            self.state[param][keys.STEP] -= 1

    def checked(self, entries: list[Entry], base: Tensor, loss_closure: LossClosure, numbers: Numbers) -> Outcome:
        """Take a step whose trial loss is evaluated; an exception before it is decided undoes all of it."""
        snapshot = Snapshot([param for _, param in entries], self.state, moments=self.rule.fisher_limits)
        head, params = self.groups[0], [param for _, param in entries]
        try:
            proposal = self._propose(entries, base, check=True)
            unread = self.unread.beside(proposal, params)
            numbers, known = search(
                proposal,
                snapshot,
                self.rule,
                numbers,
                walk=self._walk,
                trial_loss=lambda: self._minimised(evaluated(loss_closure), proposal.home),
                evidence=Evidence(
                    base=0.0,
                    predicted=0.0,
                    schedule=keys.schedule(self.groups),
                    resolution=resolution([param for _, param in entries]),
                ),
                rounding=rounding(base, [param for _, param in entries]),
                gap=head[keys.REPEAT_GAP],
                pending=unread.figures(),
                fresh=lambda heard: fresh_slope(unread.found(heard), self.state, head[keys.FRESH_SLOPE]),
            )
        except BaseException:
            snapshot.restore()
            raise
        if known["skipped"]:
            snapshot.restore()
        else:
            absorb(proposal, self.fisher)
            if known["accepted"] and self.rule.fresh_slopes and self.rule.cautious:
                mark(proposal, self.fisher)
            turn(proposal, self.fisher)
        return proposal, numbers, known
