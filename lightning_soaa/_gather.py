"""From parameters with gradients to buckets with state."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._bucket import Bucket
from lightning_soaa._checks import refuse, refuse_sharded
from lightning_soaa._dist import Shards, gathered, local, over_shards, shards_of, world_size
from lightning_soaa._estimate import AbstractFisher, Fishers
from lightning_soaa._flat import Parts, is_flattened
from lightning_soaa._portions import portions_of
from lightning_soaa._state import GROUP_RADIUS, PORTIONS, STEP, as_real, state_dtype
from lightning_soaa._sums import total, wide_dtype
from lightning_soaa.radius import AbstractRadius

Entry = tuple[int, Tensor]  # index of the parameter group, parameter

# Where torch has its fused AdamW kernel for all dtypes of moments.
FUSED_DEVICES = ("cpu", "cuda")


def find_gradients(groups: Sequence[Mapping[str, Any]], parts: Parts) -> list[Entry]:
    """Return all parameters with a gradient.

    Those of `parts` that are trained all get one, of zeros where there is none: a process that holds nothing of a
    parameter cannot tell whether others have a gradient of it, and all have to go through the same parameters.

    Raises:
        TypeError: a gradient is sparse; the text names its parameter.
    """
    entries = []
    for index, group in enumerate(groups):
        for place, param in enumerate(group["params"]):
            if param.grad is None:
                if not (parts and param.requires_grad and param in parts and parts[param].shards):
                    continue
                param.grad = torch.zeros_like(param)
            if param.grad.layout != torch.strided:
                names = group.get("param_names")
                name = names[place] if names else f"{place} of group {index}"
                refuse(
                    "SOAA", "params", "given dense gradients", f"a {param.grad.layout} of parameter {name}", TypeError
                )
            entries.append((index, param))
    return entries


def spread_over(param: Tensor, parts: Parts) -> Shards:
    """Return the groups over which the coordinates of a parameter are spread."""
    part = parts.get(param) if parts else None
    return shards_of(param) if part is None else part.shards


def only_zeros(entries: Iterable[Entry], parts: Parts) -> bool:
    """Return whether all gradients are zero. The host waits for the device once a parameter, up to the first other."""
    return not any(
        bool(over_shards(local(param.grad).count_nonzero(), spread_over(param, parts)))
        for _, param in entries
        if param.grad is not None
    )


def no_gradients(groups: Sequence[Mapping[str, Any]], parts: Parts, *, look: bool) -> bool:
    """Return whether there is nothing to go by: no gradient, or, if asked to `look`, only zeros.

    torch.distributed.checkpoint steps so to have the state created.
    """
    entries = find_gradients(groups, parts)
    return not entries or (look and only_zeros(entries, parts))


def gradient_sizes(entries: Iterable[Entry], scale: Tensor | float = 1.0) -> dict[Tensor, Tensor]:
    """Return by parameter the sum of absolute values of what this rank holds of its gradient, over `scale`, 0-d."""
    sizes = {}
    for _, param in entries:
        if param.grad is not None:
            grad = _as_kept(local(param.grad), state_dtype(param.dtype))
            size = torch.linalg.vector_norm(grad, 1).to(wide_dtype(grad.device))
            sizes[param] = size / (scale.to(size.device) if isinstance(scale, Tensor) else scale)
    return sizes


def share_left(before: Mapping[Tensor, Tensor], after: Mapping[Tensor, Tensor], parts: Parts) -> Tensor:
    """Return the share of gradients that clipping left, over all shards, 0-d; 1 where there is no telling.

    Parameters whose gradient is gone, or zero, have been left out, not clipped: the step does not go along them.

    Args:
        before: :func:`gradient_sizes` before clipping.
        after: the same after it.
        parts: parameters of which this process holds parts.
    """
    pairs, shards = [], []
    for param, size in after.items():
        if param in before:
            pairs.append(torch.stack([size, torch.where(size > 0, before[param].to(size.device), 0.0)]))
            shards.append(spread_over(param, parts))
    if not pairs:
        return torch.ones(())
    left, whole = total(pairs, shards)
    share: Tensor = left / whole
    return torch.where((share > 0) & share.isfinite(), share, 1.0)


def ensure_state(
    entries: Sequence[Entry], state: dict[Tensor, dict[str, Any]], fisher: Fishers, rule: AbstractRadius, parts: Parts
) -> None:
    """Give every parameter that has none its fresh state (`state` is modified in place).

    Raises:
        ValueError: it is a part, and not known as one, or the Fisher needs whole parameters.
    """
    extra = PORTIONS if rule.fresh_slopes else {}
    fresh = [(index, param) for index, param in entries if not state[param]]
    for index, param in fresh:
        _check_part(param, parts, fisher.of(index))
        kept = fisher.of(index).init(as_real(param), state_dtype(param.dtype))
        state[param].update({STEP: 0, **extra, **kept})
    if fresh:
        lay_out(entries, state, fisher)


def _check_part(param: Tensor, parts: Parts, fisher: AbstractFisher) -> None:
    """Refuse what cannot be done with a part of a parameter, if it is one.

    Raises:
        ValueError: as said.
    """
    if param in parts:
        if parts[param].shards and not fisher.elementwise:
            refuse_sharded(fisher)
    elif is_flattened(param) and world_size() > 1:
        raise ValueError(
            "SOAA: `params` must be whole, or DTensors as fully_shard makes them, outside of SOAAMixin, got parts that "
            "FullyShardedDataParallel holds; use fully_shard, which is FSDP2"
        )


def complete_state(
    groups: Sequence[Mapping[str, Any]], state: dict[Tensor, dict[str, Any]], fisher: Fishers, parts: Parts
) -> None:
    """Give parts of which this process holds nothing the numbers that others have loaded (`state` is modified).

    FullyShardedDataParallel gives state only to processes that hold coordinates. All of them must call it.
    """
    every = [(index, param) for index, group in enumerate(groups) for param in group["params"] if param in parts]
    numbers = [
        {key: value for key, value in state.get(param, {}).items() if not isinstance(value, Tensor)}
        for _, param in every
    ]
    for (index, param), *known in zip(every, *gathered(numbers), strict=True):
        found = next((each for each in known if each), None)
        if found is not None and not state.get(param):
            state[param] = {**found, **fisher.of(index).init(as_real(param), state_dtype(param.dtype))}
    ordered = {p: state[p] for group in groups for p in group["params"] if state.get(p)}
    state.clear()
    state.update(ordered)


def lay_out(entries: Iterable[Entry], state: Mapping[Tensor, dict[str, Any]], fisher: Fishers) -> None:
    """Move tensors of the state of parameters side by side where they are worked on as one (`state` is modified)."""
    groups: dict[int, list[dict[str, Any]]] = {}
    for index, param in entries:
        groups.setdefault(index, []).append(state[param])
    for index, states in groups.items():
        fisher.of(index).lay_out(states)


def has_fused(group: Mapping[str, Any], device: torch.device) -> bool:
    """Return whether a group uses the fused kernel; it is the default where the device has it."""
    wanted = group["foreach"] is None if group["fused"] is None else group["fused"]
    return wanted and device.type in FUSED_DEVICES


def gather(
    entries: Sequence[Entry],
    groups: Sequence[Mapping[str, Any]],
    state: dict[Tensor, dict[str, Any]],
    parts: Parts,
) -> list[Bucket]:
    """Sort parameters into buckets, with gradients as real tensors of the state's dtype, negated to maximise.

    The age of each parameter counts the gradient from here on (`state` is modified in place).
    """
    buckets: dict[tuple[Any, ...], Bucket] = {}
    states: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    portions = portions_of([param for _, param in entries], state)
    for owner, (index, param) in enumerate(entries):
        grad = param.grad
        if grad is None:
            continue
        group, kept, dtype = groups[index], state[param], param.dtype
        kept[STEP] += 1
        plain = type(grad) is Tensor  # no DTensor then, nor is the parameter
        part = parts.get(param) if parts else None
        shards = () if plain and part is None else spread_over(param, parts)
        key = (index, param.device, dtype, kept[STEP], shards)
        bucket = buckets.get(key)
        if bucket is None:
            bucket, states[key] = _empty(index, group, param.device, kept[STEP], shards), []
            bucket.portions = portions
            buckets[key] = bucket
        real, wanted = param, state_dtype(dtype)
        if not plain or grad.dtype != wanted or grad.is_neg():
            grad = _as_kept(grad if plain else local(grad), wanted)
            real = as_real(param if plain else local(param))
        if real.is_contiguous() and not grad.is_contiguous():
            grad = grad.contiguous()
        bucket.owners.append(owner)
        bucket.params.append(real)
        bucket.coordinates += (param.numel() if part is None else part.coordinates) * (2 if dtype.is_complex else 1)
        bucket.grads.append(-grad if group["maximize"] else grad)
        states[key].append(kept if plain else {name: local(value) for name, value in kept.items()})
    for key, bucket in buckets.items():
        names = [name for name in states[key][0] if isinstance(states[key][0][name], Tensor)]
        bucket.state = {name: [kept[name] for kept in states[key]] for name in names}
    return list(buckets.values())


def _empty(index: int, group: Mapping[str, Any], device: torch.device, step: int, shards: Shards) -> Bucket:
    """Return a bucket without tensors."""
    (beta1, beta2), foreach, fused = group["betas"], group["foreach"] is not False, has_fused(group, device)
    bucket = Bucket(index, step, float(beta1), float(beta2), float(group["eps"]), foreach, fused)
    bucket.last_bound, bucket.shards = float(group[GROUP_RADIUS]), shards
    return bucket


def _as_kept(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a gradient as a real tensor of `dtype`, itself if it is one."""
    if grad.is_conj() or grad.is_neg():
        grad = grad.resolve_conj().resolve_neg()
    return as_real(grad).to(dtype)
