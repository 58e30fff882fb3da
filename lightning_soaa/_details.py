"""What the monitor logs on request: each layer's Fisher and step, and distributions."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from math import nan
from typing import Any

import torch
from torch import Tensor

from lightning_soaa._checks import refuse
from lightning_soaa._estimate import SQUARE
from lightning_soaa._rows import Monitored, is_kind
from lightning_soaa._sums import wide_dtype
from lightning_soaa.report import StepReport

ALL = "all"  # stands for the whole model where no layers are asked for
# Entries of a layer that go into a distribution, evenly spaced: enough for its shape, and no more to bring to the host.
ENTRIES = 100_000
BINS = 64

Layers = dict[str, list[Tensor]]


def layers_of(named: Iterable[tuple[str, Tensor]]) -> Layers:
    """Return parameters by the module that owns them; one of the outermost module goes by its own name."""
    layers: Layers = {}
    for name, param in named:
        layers.setdefault(name.rpartition(".")[0] or name, []).append(param)
    return layers


def chosen(layers: Layers, wanted: int | Sequence[str]) -> Layers:
    """Return the `wanted` largest layers in the model's order, or those of the given names.

    Raises:
        ValueError: there is no layer of that name.
    """
    if isinstance(wanted, int):
        largest = sorted(layers, key=lambda name: -sum(param.numel() for param in layers[name]))[:wanted]
        return {name: params for name, params in layers.items() if name in largest}
    for name in wanted:
        if name not in layers:
            refuse("TrustRegionMonitor", "layers", f"names of modules with parameters, of {sorted(layers)}", name)
    return {name: layers[name] for name in wanted}


def refuse_parts(layers: int | Sequence[str], *, histograms: bool) -> None:
    """Refuse figures of layers of which a process sees only parts.

    Raises:
        ValueError: `layers` or `histograms` are asked for.
    """
    if layers or histograms:
        raise ValueError(
            f"TrustRegionMonitor: `layers` and `histograms` must be left out under FSDPStrategy, got {layers=}, "
            f"{histograms=}; a process sees only its parts of parameters: use ModelParallelStrategy, which is FSDP2"
        )


@dataclass
class Details:
    """Figures of some layers of one optimizer.

    Args:
        optimizer: whose parameters they are.
        layers: the layers that are logged, those of other optimizers left out.
        parts: the layers that distributions are of.
    """

    optimizer: Monitored
    layers: Layers
    parts: Layers
    before: dict[Tensor, Tensor] = field(default_factory=dict)

    def remember(self) -> None:
        """Copy the parameters that the next step is measured on."""
        params = [param for layer in (*self.layers.values(), *self.parts.values()) for param in layer]
        self.before = {param: param.detach().clone() for param in params}

    def forget(self) -> None:
        """Drop the copy."""
        self.before = {}

    def values(self, suffix: str, report: StepReport | None) -> dict[str, float]:
        """Return each layer's Fisher trace and relative step, nan where not known; waits for the device once.

        All entries of the Fisher are the second moment times one number, so that a layer has its share of the trace.
        """
        if not self.layers:
            return {}
        moments = self._second_moments()
        table = torch.full((len(self.layers), 2), nan)
        if report is not None and self.before and moments:
            home = next(iter(moments)).device
            sums = {
                param: (square.sum(dtype=wide_dtype(square.device)) / by).to(home)
                for param, (square, by) in moments.items()
            }
            total, nothing = torch.stack(list(sums.values())).sum(), torch.tensor(nan, device=home)
            rows = []
            for params in self.layers.values():
                own = [sums[param] for param in params if param in sums] or [nothing]
                moved = norm([param.detach() - self.before[param] for param in params], home)
                size = norm([self.before[param] for param in params], home)
                rows.append(torch.stack((torch.stack(own).sum() / total * report.fisher_trace, moved / size)))
            table = torch.stack(rows)
        logged: dict[str, float] = {}
        for name, (trace, step) in zip(self.layers, table.tolist(), strict=True):
            logged |= {f"fisher{suffix}/layer_trace/{name}": trace, f"trust_region{suffix}/layer_step/{name}": step}
        return logged

    def _second_moments(self) -> dict[Tensor, tuple[Tensor, float]]:
        """Return each parameter's second moment, if it has one, and its correction for the start at zero."""
        moments = {}
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                state = self.optimizer.state.get(param, {})
                if SQUARE in state and state.get("step"):
                    moments[param] = (state[SQUARE], 1 - group["betas"][1] ** state["step"])
        return moments

    def distributions(self, suffix: str) -> dict[str, Tensor]:
        """Return log10 of the second moment and the step of each part, as flat tensors without what is not finite."""
        found: dict[str, Tensor] = {}
        moments = self._second_moments()
        for name, params in self.parts.items():
            if known := [moments[param] for param in params if param in moments]:
                parts = [flat([square], sum(square.numel() for square, _ in known)) / by for square, by in known]
                found[f"fisher{suffix}/histogram/{name}"] = torch.cat(parts).log10()
            if self.before:
                steps = [param.detach() - self.before[param] for param in params]
                found[f"trust_region{suffix}/step_histogram/{name}"] = flat(steps)
        finite = {key: values[values.isfinite()] for key, values in found.items()}
        return {key: values for key, values in finite.items() if values.numel()}


def make_details(
    named: Iterable[tuple[str, Tensor]],
    optimizers: Mapping[str, Monitored],
    wanted: int | Sequence[str],
    *,
    histograms: bool,
) -> dict[str, Details]:
    """Return the details of each optimizer, by its suffix; none if nothing is wanted.

    Args:
        named: the module's parameters by name.
        optimizers: the SOAA optimizers by suffix.
        wanted: how many layers, or which; one whose parameters are not all the optimizer's own is left out.
        histograms: whether distributions are wanted: of these layers, or of all parameters if there are none.

    Raises:
        ValueError: there is no layer of that name.
    """
    if not wanted and not histograms:
        return {}
    found, details = chosen(layers_of(named), wanted), {}
    for suffix, optimizer in optimizers.items():
        every = [param for group in optimizer.param_groups for param in group["params"]]
        own = {id(param) for param in every}
        layers = {name: params for name, params in found.items() if own.issuperset(map(id, params))}
        parts = (layers if wanted else {ALL: every}) if histograms else {}
        details[suffix] = Details(optimizer, layers, parts)
    return details


def norm(tensors: Sequence[Tensor], home: torch.device) -> Tensor:
    """Return the Euclidean norm over several tensors, 0-d on `home`."""
    parts = [tensor.abs().square().sum(dtype=wide_dtype(tensor.device)).to(home) for tensor in tensors]
    return torch.stack(parts).sum().sqrt()


def flat(tensors: Sequence[Tensor], of: int | None = None) -> Tensor:
    """Return entries of `tensors` as one vector of float32, evenly spaced: all, or about `ENTRIES` of more than that.

    Args:
        tensors: at least one.
        of: how many entries there are, if these are only some of the tensors.
    """
    stride = max(1, (sum(tensor.numel() for tensor in tensors) if of is None else of) // ENTRIES)
    real = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    return torch.cat([tensor.detach().reshape(-1)[::stride].float() for tensor in real])


def write_distributions(loggers: Iterable[Any], distributions: Mapping[str, Tensor], step: int) -> None:
    """Write distributions to those loggers that have a place for them: TensorBoard and W&B."""
    for logger in loggers:
        if is_kind(logger, "TensorBoardLogger"):
            for key, values in distributions.items():
                logger.experiment.add_histogram(key, values, step)
        elif is_kind(logger, "WandbLogger"):
            histogram = import_module("wandb").Histogram
            bins = {key: torch.histogram(values.cpu(), BINS) for key, values in distributions.items()}
            shown = {
                key: histogram(np_histogram=(hist.tolist(), edges.tolist())) for key, (hist, edges) in bins.items()
            }
            logger.log_metrics(shown, step=step)


# One page for TensorBoard's tab "Custom Scalars": its title, its charts, the tags of each as regular expressions.
LAYOUT = {
    "Trust region": {
        "Radius": ["Multiline", [r"^trust_region(-\d+)?/radius$", r"^trust_region(-\d+)?/group_radius/"]],
        "Acceptance": ["Multiline", [r"^trust_region(-\d+)?/acceptance_(ratio|rate)$"]],
        "Predicted and actual reduction": ["Multiline", [r"^trust_region(-\d+)?/(predicted|actual)_reduction$"]],
        "Rejects, skipped steps and outliers, so far": [
            "Multiline",
            [r"^trust_region(-\d+)?/(rejects|skipped_steps|outlier_steps)$"],
        ],
        "Step norm": ["Multiline", [r"^trust_region(-\d+)?/step_norm$"]],
        "Fisher, trace": ["Multiline", [r"^fisher(-\d+)?/trace$"]],
        "Fisher, largest entry": ["Multiline", [r"^fisher(-\d+)?/max$"]],
    }
}


def write_layout(loggers: Iterable[Any]) -> None:
    """Lay out TensorBoard's custom scalars; other loggers have none."""
    for logger in loggers:
        if is_kind(logger, "TensorBoardLogger"):
            logger.experiment.add_custom_scalars(LAYOUT)
