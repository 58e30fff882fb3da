"""One step on given gradients: what a check and a step without one do to parameters and state."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_soaa import _state as keys
from lightning_soaa._gather import Entry, ensure_state, gather, gradient_sizes, share_left
from lightning_soaa._loss import evaluated, minimised, resolution, rounding
from lightning_soaa._proposal import Proposal, absorb, absorbs_first, propose
from lightning_soaa._state import Snapshot
from lightning_soaa._trust_region import follow, search
from lightning_soaa._unread import Unread
from lightning_soaa._walk import step_sizes, walk
from lightning_soaa.fisher import AbstractFisher
from lightning_soaa.radius import AbstractRadius, Evidence, Numbers

LossClosure = Callable[[], Any]
Outcome = tuple[Proposal, Numbers, dict[str, Any]]  # the step, the rule's new numbers, what is known for the report


@dataclass(frozen=True)
class Stepper:
    """Takes one step; parameters and state are modified in place, groups are only read.

    Args:
        groups: the optimizer's parameter groups.
        state: its state by parameter.
        defaults: its defaults.
        rule: its radius rule.
        fisher: its Fisher estimate.
        unread: what the host has not heard of.
        unclipped: sizes of the gradients before they were clipped, or None if they are not known.
        compiled: steps between checks are compiled.
    """

    groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]
    defaults: dict[str, Any]
    rule: AbstractRadius
    fisher: AbstractFisher
    unread: Unread
    unclipped: dict[Tensor, Tensor] | None = None
    compiled: bool = False

    def _propose(self, entries: list[Entry], base: Tensor | None, *, check: bool) -> Proposal:
        """Return what can be proposed; the moments may have absorbed the gradients, if nothing is wrong with them."""
        ensure_state(entries, self.state, self.fisher)
        head, home = self.groups[0], entries[0][1].device
        base = None if base is None else self._minimised(base, home)
        gate = self.unread.gate_of(head, home) if self.rule.gated else None
        left = None if self.unclipped is None else share_left(self.unclipped, gradient_sizes(entries)).to(home)
        buckets = gather(entries, self.groups, self.state)
        return propose(
            buckets,
            base,
            self.fisher,
            gate=gate,
            slope=head[keys.CHECKED_SLOPE],
            fisher_limits=self.rule.fisher_limits,
            unit=head[keys.GRADIENT_RMS],
            check=check,
            left=left,
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
        evidence = Evidence(base=0.0, predicted=0.0, beta1=self.defaults["betas"][0], eps=self.defaults["eps"])
        try:
            numbers, known = follow(proposal, self.rule, numbers, walk=self._walk, evidence=evidence)
        except BaseException:
            if not proposal.absorbed:
                self._uncount(entries)
            raise
        if known.get("skipped", False):
            self._uncount(entries)
        return proposal, numbers, known

    def _uncount(self, entries: list[Entry]) -> None:
        """Take back the gradient that the age of the parameters has counted."""
        for _, param in entries:
            self.state[param][keys.STEP] -= 1

    def checked(self, entries: list[Entry], base: Tensor, loss_closure: LossClosure, numbers: Numbers) -> Outcome:
        """Take a step whose trial loss is evaluated; an exception before it is decided undoes all of it."""
        moments = absorbs_first(self.fisher, fisher_limits=self.rule.fisher_limits, check=True)
        snapshot = Snapshot([param for _, param in entries], self.state, moments=moments)
        head = self.groups[0]
        try:
            proposal = self._propose(entries, base, check=True)
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
                    fresh=head[keys.FRESH_SLOPE],
                    schedule=keys.schedule(self.groups),
                    resolution=resolution([param for _, param in entries]),
                ),
                rounding=rounding(base, [param for _, param in entries]),
                gap=head[keys.REPEAT_GAP],
                pending=self.unread.beside(proposal).figures(),
            )
        except BaseException:
            snapshot.restore()
            raise
        if known["skipped"]:
            snapshot.restore()
        else:
            absorb(proposal, self.fisher)
        return proposal, numbers, known
