"""What a report says of a step and of the state, which takes a pass over the state."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, nan

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket
from lightning_soaa._dist import over_shards
from lightning_soaa._estimate import Fishers
from lightning_soaa._memory import runs
from lightning_soaa._proposal import Proposal, fisher_scale
from lightning_soaa._sums import on_host, read


def statistics(bucket: Bucket, scale: Tensor, limit: float, fisher: Fishers) -> Tensor:
    """Return the Fisher's statistics of a bucket over all shards, of which this rank may hold none, shape (4,)."""
    if bucket.numel:
        here = fisher.of(bucket.group).statistics(bucket, scale, limit)
    else:
        here = torch.tensor([inf, -inf, 0, 0], dtype=scale.dtype, device=scale.device)
    least, most = over_shards(here[:1], bucket.shards, "MIN"), over_shards(here[1:2], bucket.shards, "MAX")
    return torch.cat((least, most, over_shards(here[2:], bucket.shards)))


def merged(bucket: Bucket, fisher: Fishers) -> Bucket:
    """Return a bucket with the same state in fewer tensors, where each costs the host more than its work."""
    if not (on_host(bucket.device) and fisher.of(bucket.group).elementwise):
        return bucket
    return replace(bucket, state={name: runs(tensors) for name, tensors in bucket.state.items()})


def rotation(buckets: Sequence[Bucket], fisher: Fishers, home: torch.device) -> dict[str, Tensor | float]:
    """Return what a report says of the Fisher's own coordinates; nothing if it has none."""
    if not (fisher.rotates and buckets):
        return {}
    found = [fisher.of(bucket.group).rotation(bucket) for bucket in buckets]
    ages = [age.max().to(home) for _, tensors in found for age in tensors]
    share = sum(count for count, _ in found) / sum(bucket.coordinates for bucket in buckets)
    return {"rotated_fraction": share, "basis_age": torch.stack(ages).max() if ages else nan}


def describe(proposal: Proposal, fisher: Fishers, *, moved: bool, skipped: bool) -> dict[str, float]:
    """Return what a :class:`StepReport` says of loss, step and state, which needs a pass over the state."""
    base = torch.tensor(nan) if proposal.base is None else proposal.base
    buckets = proposal.buckets
    if skipped:  # the moments have not absorbed the gradient that the age counts
        buckets = [replace(bucket, step=bucket.step - 1) for bucket in buckets if bucket.step > 1]
    buckets = [bucket for bucket in buckets if bucket.coordinates]
    turned = rotation(buckets, fisher, proposal.home)
    buckets = [merged(bucket, fisher) for bucket in buckets]
    if not buckets:
        return {"base_loss": read([base], proposal.home)[0], "step_norm": 0.0}
    scale, rows = fisher_scale(buckets, fisher), []
    for bucket in buckets:
        limit = 0.0 if proposal.scale is None else proposal.sizes[bucket.group].radius
        rows.append(statistics(bucket, scale.to(bucket.device), limit, fisher).to(proposal.home))
    table = torch.stack(rows)
    columns = [table[:, 0].min(), table[:, 1].max(), table[:, 2].sum(), table[:, 3].sum(), proposal.square]
    low, high, trace, active, square, base_loss, *ages = read([*columns, base, *turned.values()], proposal.home)
    numel = sum(bucket.coordinates for bucket in buckets)
    return {
        "base_loss": base_loss,
        "step_norm": square**0.5 if moved else 0.0,
        "fisher_mean": trace / numel,
        "fisher_min": low,
        "fisher_max": high,
        "fisher_trace": trace,
        "active_fraction": active / numel,
        **dict(zip(turned, ages, strict=True)),
    }
