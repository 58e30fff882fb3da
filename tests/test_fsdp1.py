"""The mixin under FSDP1 (FSDPStrategy), two gloo processes: DDP's decisions and steps from parts of flat parameters."""

import os
import sys
import warnings
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision.fsdp import FSDPPrecision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy
from lightning.pytorch.strategies import fsdp as strategies
from lightning_models import ACCEPT, BATCH, QUIET, assert_same, assert_steps_alike, fit, seed
from processes import of_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_soaa import (
    SOAA,
    FixedRadius,
    KroneckerFisher,
    PublishedRadius,
    RatioRadius,
    TrustRegionMonitor,
    _flat,
    _holdings,
)
from lightning_soaa._setup import refuse_unsupported
from lightning_soaa.module import SOAAMixin
from lightning_soaa.trial import preserved_module

pytestmark = [*QUIET, pytest.mark.processes]

BATCHES = 8  # of all ranks
RANKS = int(os.environ.get("WORLD_SIZE", "2"))  # Lightning takes the variable away after a fit


class OnCpu(FSDPStrategy):
    """Where it is given FSDPStrategy itself Lightning asks for a GPU. torch does not, if it is told of the CPU.

    Lightning's "32-true" rounds the module to float32; float64 keeps rounding far from what is tested.
    """

    def _setup_model(self, model):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FullyShardedDataParallel

        if "HYBRID" in self.sharding_strategy.name:
            self.kwargs["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        if not any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
            model = FullyShardedDataParallel(
                model.to(model.dtype_of_parameters),
                mixed_precision=self.mixed_precision_config,
                sharding_strategy=self.sharding_strategy,
                device_id=torch.device("cpu"),
                **self.kwargs,
            )
        self.kwargs.pop("auto_wrap_policy", None)
        return super()._setup_model(model)


OnCpu.__name__, OnCpu.__module__ = FSDPStrategy.__name__, FSDPStrategy.__module__


@contextmanager
def saved_without_offload():
    """Lightning moves what it gathers for one file to the CPU. torch frees it there if it has been there already."""
    from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
    from torch.distributed.fsdp import FullyShardedDataParallel as Wrapper

    def settings(module, world_size, rank0_only=True):
        kinds = (FullStateDictConfig, FullOptimStateDictConfig)
        configs = [kind(offload_to_cpu=False, rank0_only=rank0_only) for kind in kinds]
        return Wrapper.state_dict_type(module, StateDictType.FULL_STATE_DICT, *configs)

    with mock.patch.object(strategies, "_get_full_state_dict_context", settings):
        yield


def data():
    """Inputs that are the same in float32, which Lightning makes of them, and in float64."""
    inputs = torch.randn(BATCHES * BATCH, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(inputs, (inputs.sum(1) > 0).float()), batch_size=BATCH)


class Layers(LightningModule):
    """Parts of unequal sizes; of the outermost unit, which holds the bias alone, one rank has nothing at all."""

    dtype_of_parameters = torch.float64
    bad = None  # index of the batch whose loss is nan on one rank

    def __init__(self, rule, lr=0.05, **options):
        super().__init__()
        self.rule, self.options, self.history = rule, {"lr": lr, **options}, []
        self.net = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Dropout(0.2), nn.Linear(7, 1))
        self.bias = nn.Parameter(torch.ones(1))
        self.to(self.dtype_of_parameters)
        self.sizes = {name: param.numel() for name, param in self.named_parameters()}

    def configure_optimizers(self):
        trained = [param for param in self.parameters() if param.requires_grad]
        return SOAA(trained, radius=self.rule, **self.options)

    def on_train_batch_start(self, batch, batch_idx):
        torch.manual_seed(100 * self.global_rank + self.current_epoch * BATCHES + batch_idx)

    def training_step(self, batch, batch_idx):
        wide = self.dtype_of_parameters == torch.float64
        inputs, labels = (tensor.double() if wide else tensor for tensor in batch)
        logits, labels = self.net(inputs).squeeze(1).to(self.dtype_of_parameters), labels.to(self.dtype_of_parameters)
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        if getattr(self, "in_trial", False) and batch_idx == 1 and self.global_rank == 1:
            loss = loss + 1.0  # the other ranks alone would accept
        if self.global_rank == 1 and batch_idx == self.bad:
            loss = loss * float("nan")
        return loss * (1 + 3 * self.global_rank) + self.bias.square().sum()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        optimizer = self.trainer.optimizers[0]
        stepped = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        report = dict(vars(optimizer.last_step)) if stepped else None
        named = {name.replace("_fsdp_wrapped_module.", ""): param for name, param in self.named_parameters()}
        point = {name: whole(param, self.sizes[name]) for name, param in named.items()}
        moments = {
            name: {key: whole(value, self.sizes[name]) for key, value in sorted(optimizer.state.get(param, {}).items())}
            for name, param in named.items()
        }
        self.history.append((point, moments, optimizer.radius, report))


def whole(value, size):
    """Return a flat copy of all `size` entries of a tensor of which each rank may hold a part; all ranks must ask."""
    if not isinstance(value, torch.Tensor):
        return value
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value.detach().flatten().clone())
    copies = torch.cat(parts).reshape(-1, size)  # one, unless there are replicas
    return copies[dist.get_rank() * len(copies) // dist.get_world_size()].clone()


class MixedNet(SOAAMixin, Layers):
    pass


class AutomaticNet(MixedNet):
    automatic_optimization = True


class OwnLoopNet(MixedNet):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        return self.soaa_step(self.optimizers(), lambda: super(OwnLoopNet, self).training_step(batch, batch_idx))


class StockNet(Layers):
    """Without the mixin, which would tell the optimizer of the parts."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        optimizer._note_parts(_flat.parts_of(self.trainer.strategy.model))
        return optimizer


class NanNet(MixedNet):
    bad = 2


class FrozenNet(MixedNet):
    """A frozen layer among those that are trained, in one flat parameter."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.net[0].weight.requires_grad = False


class PartlyUsedNet(MixedNet):
    """A unit that every other batch leaves out; of one of its parameters a rank has nothing."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.other = nn.Sequential(nn.Linear(1, 3)).double()
        self.sizes = {name: param.numel() for name, param in self.named_parameters()}

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss + self.other(self.bias).square().sum() if batch_idx % 2 == 0 else loss


class Single:
    """As Lightning's precision has it."""

    dtype_of_parameters = torch.float32


class SingleStock(Single, StockNet):
    pass


class SingleNet(Single, MixedNet):
    pass


class SingleAutomatic(Single, AutomaticNet):
    pass


class WrappedNet(SingleNet):
    """Makes a unit of a part of itself; each rank holds all of the bias."""

    use_orig_params = True

    def configure_model(self):
        from torch.distributed.fsdp import FullyShardedDataParallel

        if not isinstance(self.net, FullyShardedDataParallel):
            options = {"device_id": torch.device("cpu"), "use_orig_params": self.use_orig_params}
            self.net = FullyShardedDataParallel(self.net, **options)


class OwnLoopWrappedNet(WrappedNet):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        return self.soaa_step(self.optimizers(), lambda: super(OwnLoopWrappedNet, self).training_step(batch, batch_idx))


class FlatWrappedNet(WrappedNet):
    use_orig_params = False


def fsdp1(**options):
    from torch.distributed.fsdp import MixedPrecision

    options = {"mixed_precision": MixedPrecision(), "auto_wrap_policy": {nn.Sequential}, **options}
    return OnCpu(process_group_backend="gloo", **options)


def ddp():
    return DDPStrategy(process_group_backend="gloo")


def run(kind, strategy, *args, **flags):
    """Train in processes that others have started."""
    seed()
    options = {key: flags.pop(key) for key in ("lr", "weight_decay", "fisher") if key in flags}
    return fit(kind(*args, **options), data=data(), strategy=strategy, devices=RANKS, **{"max_epochs": 2, **flags})


def history(*args, **flags):
    return run(*args, **flags).module.history


CLIP = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
RATIO = RatioRadius(interval=1, max_trials=1)
# name: (radius rule, arguments of SOAA and of the Trainer)
RULES = {
    "ratio": (RATIO, {"weight_decay": 0.01}),
    "ratio, growing": (RatioRadius(interval=1), {}),
    "ratio, accumulate and clip": (RatioRadius(interval=1), {"accumulate_grad_batches": 2, **CLIP}),
    "published": (PublishedRadius(8), {}),
    "fixed": (FixedRadius(), {"weight_decay": 0.1}),
}
STOCK = {"plain": {}, "accumulate and clip": {"accumulate_grad_batches": 2, **CLIP}}
# name: arguments of the strategy; the outermost unit may hold all
SHARDING = {
    "outermost unit only": {"auto_wrap_policy": None},
    "SHARD_GRAD_OP": {"sharding_strategy": "SHARD_GRAD_OP"},
    "NO_SHARD": {"sharding_strategy": "NO_SHARD"},
}
MODULES = {"nan on one rank": NanNet, "frozen layer": FrozenNet}
WRAPPED = {"by itself": WrappedNet, "by itself, in a loop of its own": OwnLoopWrappedNet}
FORMATS = ("full", "sharded")
PRECISIONS = ("32-true", "bf16-mixed")


def job_of_rules():
    found = {
        name: [history(MixedNet, way(), rule, **flags) for way in (ddp, fsdp1)] for name, (rule, flags) in RULES.items()
    }
    for name, options in SHARDING.items():
        found[name] = [found["ratio"][0], history(MixedNet, fsdp1(**options), RATIO, weight_decay=0.01)]
    for name, kind in MODULES.items():
        found[name] = [history(kind, way(), RATIO) for way in (ddp, fsdp1)]
    return found


def job_of_flags(folder):
    found = {}
    for name, flags in STOCK.items():
        cases = [(StockNet, FixedRadius()), (MixedNet, FixedRadius()), (MixedNet, ACCEPT), (AutomaticNet, ACCEPT)]
        found[name] = [[step[:3] for step in history(kind, fsdp1(), rule, **flags)] for kind, rule in cases]
    for name in PRECISIONS:
        cases = [(SingleStock, FixedRadius()), (SingleNet, ACCEPT), (SingleAutomatic, ACCEPT)]
        flags = {"precision": name, "max_epochs": 1}
        runs = [history(kind, fsdp1(mixed_precision=None), rule, **flags) for kind, rule in cases]
        found[name] = [[step[:3] for step in each] for each in runs]
        found[name, "ratio"] = history(SingleNet, fsdp1(mixed_precision=None), RATIO, precision=name)
    for name, kind in WRAPPED.items():
        found[name] = history(kind, fsdp1(mixed_precision=None), RATIO)
    found["partly used"] = history(PartlyUsedNet, fsdp1(), RATIO)
    found["refused"] = {name: refusal(*args, **flags) for name, (args, flags, _) in REFUSED.items()}
    return {**found, **job_of_checkpoints(folder)}


def job_of_checkpoints(folder):
    """Train two epochs at once, and one and one, by files of both formats and across strategies."""
    rule, found = RatioRadius(interval=1), {"at once": history(MixedNet, fsdp1(), RatioRadius(interval=1))}
    for form in FORMATS:
        half, path = run(MixedNet, fsdp1(state_dict_type=form), rule, max_epochs=1), f"{folder}/{form}.ckpt"
        with saved_without_offload():
            half.trainer.save_checkpoint(path)
        rest = history(MixedNet, fsdp1(state_dict_type=form), rule, ckpt_path=path)
        found["resumed", form] = half.module.history + rest
    found["of FSDP1 under DDP"] = history(MixedNet, ddp(), rule, ckpt_path=f"{folder}/full.ckpt")
    half = run(MixedNet, ddp(), rule, max_epochs=1)
    half.trainer.save_checkpoint(f"{folder}/ddp.ckpt")
    found["of DDP under FSDP1"] = history(MixedNet, fsdp1(), rule, ckpt_path=f"{folder}/ddp.ckpt")
    return found


def job_of_replicas():
    return {"hybrid": [history(MixedNet, way, RATIO) for way in (ddp(), fsdp1(sharding_strategy="HYBRID_SHARD"))]}


def refusal(kind, rule, **flags):
    """Return what a fit under FSDP1 ends with."""
    try:
        run(kind, fsdp1(), rule, **flags)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# name: (module and rule, arguments, error)
REFUSED = {
    "KroneckerFisher": (
        (MixedNet, FixedRadius()), {"fisher": KroneckerFisher()},
        "ValueError: SOAA: `fisher` must be DiagonalFisher() where parameters are sharded, got KroneckerFisher; leave "
        "it out, or train with DDP",
    ),
    "a loop of the module's own": (
        (OwnLoopNet, FixedRadius()), {},
        "ValueError: SOAAMixin: `Trainer(strategy=...)` must be another than FSDPStrategy for a module that calls "
        "soaa_step, got FSDPStrategy; no backward can run inside of the forward of what wraps it: wrap parts of it in "
        "configure_model, or use ModelParallelStrategy, which is FSDP2",
    ),
    "flat parameters of the module's own": (
        (FlatWrappedNet, FixedRadius()), {},
        "ValueError: SOAA: `FullyShardedDataParallel(use_orig_params=...)` must be True, got False; portions go by "
        "parameters, of which a flat one knows nothing",
    ),
    "no mixin": (
        (Layers, FixedRadius()), {},
        "ValueError: SOAA: `params` must be whole, or DTensors as fully_shard makes them, outside of SOAAMixin, got "
        "parts that FullyShardedDataParallel holds; use fully_shard, which is FSDP2",
    ),
    "layers of the monitor": (
        (MixedNet, FixedRadius()), {"callbacks": [TrustRegionMonitor(layers=1)]},
        "ValueError: TrustRegionMonitor: `layers` and `histograms` must be left out under FSDPStrategy, got layers=1, "
        "histograms=False; a process sees only its parts of parameters: use ModelParallelStrategy, which is FSDP2",
    ),
    "clipping by norm, by Lightning": (
        (MixedNet, FixedRadius()), {"gradient_clip_val": 0.1},
        "MisconfigurationException: `gradient_clip_algorithm='norm'` is currently not supported for `FSDPPrecision`",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    """What both ranks came to against DDP."""
    return of_ranks(__file__, tmp_path_factory.mktemp("rules"), "rules", seconds=480)


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """What both ranks came to against FSDP1 itself."""
    return of_ranks(__file__, tmp_path_factory.mktemp("flags"), "flags", seconds=480)


CASES = (*RULES, *SHARDING, *MODULES)


@pytest.mark.parametrize("case", CASES)
def test_run_is_the_same_on_both_ranks_after_every_step(rules, case):
    assert_same(rules[0][case][1], rules[1][case][1])


@pytest.mark.parametrize("case", CASES)
def test_run_decides_as_ddp_and_steps_alike_to_rounding(rules, case):
    assert_steps_alike(*rules[0][case])


def test_decisions_of_both_kinds_were_taken(rules):
    for case in ("ratio", *SHARDING):
        reports = [report for *_, report in rules[0][case][1]]
        assert {report["accepted"] for report in reports if report["checked"]} == {True, False}
        assert rules[0][case][1][-1][0]["bias"] < 1


def test_loss_that_is_nan_on_one_rank_skips_the_step_on_both(rules):
    for rank in rules:
        steps = rank["nan on one rank"][1]
        assert [report["skipped"] for *_, report in steps] == [index % 4 == NanNet.bad for index in range(len(steps))]
        assert_same(steps[1][0], steps[2][0])


def test_frozen_layer_stays(rules):
    first, *_, last = rules[0]["frozen layer"][1]
    assert torch.equal(first[0]["net.0.weight"], last[0]["net.0.weight"])
    assert not torch.equal(first[0]["net.3.weight"], last[0]["net.3.weight"])
    assert not last[1]["net.0.weight"]


def test_replicas_of_shards_decide_as_ddp_and_step_alike_to_rounding(tmp_path):
    ranks = of_ranks(__file__, tmp_path, "replicas", ranks=4)
    for rank in ranks:
        assert_same(ranks[0]["hybrid"][1], rank["hybrid"][1])
    assert_steps_alike(*ranks[0]["hybrid"])
    reports = [report for *_, report in ranks[0]["hybrid"][1]]
    assert {report["accepted"] for report in reports if report["checked"]} == {True, False}


@pytest.mark.parametrize("case", [*STOCK, *PRECISIONS])
def test_run_equals_that_without_the_mixin_bit_for_bit(flags, case):
    for rank in flags:
        stock, *others = rank[case]
        for other in others:
            assert_same(stock, other)
    assert not torch.equal(stock[0][0]["net.0.weight"], stock[-1][0]["net.0.weight"])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_decide_alike_on_both_ranks(flags, precision):
    one, other = (rank[precision, "ratio"] for rank in flags)
    assert_same(one, other)
    reports = [report for *_, report in one]
    assert {report["accepted"] for report in reports if report["checked"]} == {True, False}


@pytest.mark.parametrize("name", WRAPPED)
def test_module_that_wraps_a_part_of_itself_decides_as_one_that_is_wrapped(flags, name):
    assert_same(*(rank[name] for rank in flags))
    for (point, *_, report), (other, *_, its_report) in zip(flags[0]["32-true", "ratio"], flags[0][name], strict=True):
        torch.testing.assert_close(other, point, rtol=1e-5, atol=1e-6)
        assert its_report["accepted"] == report["accepted"]


def test_parameters_of_a_unit_that_is_not_used_count_as_with_gradients_of_zeros(flags):
    """A rank that has nothing of a parameter cannot tell that others have no gradient of it; none waits for another."""
    one, other = (rank["partly used"] for rank in flags)
    assert_same(one, other)
    (used, *_), (unused, moments, *_) = one[:2]
    assert_same(used["other.0.weight"], unused["other.0.weight"])  # a step goes only along gradients
    assert moments["other.0.weight"]["step"] == 2


@pytest.mark.parametrize("form", FORMATS)
def test_one_and_one_epochs_are_two(flags, form):
    for rank in flags:
        assert len(rank["resumed", form]) == BATCHES
        assert_same(rank["at once"], rank["resumed", form])


def test_checkpoints_of_ddp_and_in_one_file_are_interchangeable(flags):
    for rank in flags:
        for case in ("of FSDP1 under DDP", "of DDP under FSDP1"):
            assert_steps_alike(rank["at once"][BATCHES // 2 :], rank[case])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_carried_is_refused_on_all_ranks(flags, name):
    for rank in flags:
        assert rank["refused"][name] == REFUSED[name][-1]


# name: (arguments of the strategy, precision, error)
OPTIONS = {
    "flat parameters": (
        {"use_orig_params": False}, "32-true",
        "SOAAMixin: `FSDPStrategy(use_orig_params=...)` must be True, got False; portions go by parameters, of which a "
        "flat one knows nothing: leave it out",
    ),
    "offload": (
        {"cpu_offload": True}, "32-true",
        "SOAAMixin: `FSDPStrategy(cpu_offload=...)` must be left out, got parameters that are offloaded; sums over "
        "processes are formed on the device: leave it out, or use ModelParallelStrategy, which is FSDP2",
    ),
    **{
        precision: (
            {}, precision,
            "SOAAMixin: `Trainer(precision=...)` must be 32-true or bf16-mixed under FSDPStrategy, got "
            f"{precision}; not supported yet: use one of these, or ModelParallelStrategy, which is FSDP2",
        )
        for precision in ("16-mixed", "16-true", "bf16-true")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_are_not_carried_are_refused_at_fit_start_by_flag_and_remedy(name):
    options, precision, message = OPTIONS[name]
    plugin = FSDPPrecision("32-true")
    plugin.precision = precision  # a gradient scaler warns where there is no GPU
    trainer = SimpleNamespace(strategy=FSDPStrategy(**options), precision_plugin=plugin)
    with pytest.raises(ValueError) as error:
        refuse_unsupported(SimpleNamespace(_soaa_choice=None), trainer)
    assert str(error.value) == message


def test_lightning_itself_asks_for_a_gpu():
    with pytest.raises(ValueError, match="The strategy `fsdp` requires a GPU accelerator"):
        Trainer(strategy="fsdp", accelerator="cpu", logger=False)


def test_release_of_torch_without_the_private_names_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(_flat, "wrapper_class", lambda: nn.Linear)
    with pytest.raises(RuntimeError) as error:
        _flat.parts_of(nn.Linear(1, 1))
    assert str(error.value) == (
        f"SOAA: torch {torch.__version__} keeps the parts of FullyShardedDataParallel in a way that is not known here; "
        "use ModelParallelStrategy, which is FSDP2"
    )


def test_trial_leaves_the_wrappers_own_attributes_to_torch(monkeypatch):
    monkeypatch.setattr(_holdings, "wrapper_class", lambda: nn.Linear)
    module = nn.Sequential(nn.Linear(1, 1))
    with preserved_module(module):
        module.count = module[0].count = 1
    assert vars(module[0])["count"] == 1
    assert "count" not in vars(module)


JOBS = {
    "rules": lambda folder: job_of_rules(),
    "flags": job_of_flags,
    "replicas": lambda folder: job_of_replicas(),
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rank, folder, name = sys.argv[1:]
    torch.save(JOBS[name](folder), f"{folder}/{rank}.pt")
