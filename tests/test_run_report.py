"""The report: read from both kinds of log, right about what rows tell, one file, plain errors."""

import re
from math import inf, isfinite, nan

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning_models import QUIET, Mixed, loader

from lightning_soaa import RatioRadius, TrustRegionMonitor, TrustRegionReport
from lightning_soaa._plots import PANELS, svg
from lightning_soaa._points import Column, at, extremes, increases, last_known, spread, thinned
from lightning_soaa._runs import Run, advice_for, by_optimizer, events_of, read_csv, read_run, replay, short_names
from lightning_soaa.run_report import figures, load, main, write_report

pytestmark = QUIET
TITLES = [
    *("Radius", "Acceptance ratio and rate", "Predicted and actual reduction", "Actual over predicted reduction"),
    *("Loss", "Fisher", "Rejects, skipped steps and outliers"),
]


def run(**series):
    """Return a run with the given values of the monitor's keys on steps 0, 1, ..., and a radius at least."""
    keys = {"max": "fisher/max", "trace": "fisher/trace", "mean": "fisher/mean", "loss": "train/loss"}
    length = max((len(values) for values in series.values()), default=3)
    named = {
        keys.get(name, f"trust_region/{name}"): values for name, values in {"radius": length * [0.1], **series}.items()
    }
    return Run("a run", {key: list(enumerate(values)) for key, values in named.items()})


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Return the folders of one run: metrics.csv, and event files."""
    path = tmp_path_factory.mktemp("logs")
    torch.manual_seed(0)
    loggers = [CSVLogger(path, name="csv", version=0), TensorBoardLogger(path, name="tb", version=0)]
    options = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=3, logger=loggers, log_every_n_steps=2, **options)
    trainer.fit(Mixed(RatioRadius()), loader())
    return path / "csv" / "version_0", path / "tb" / "version_0"


def test_both_kinds_of_log_tell_the_same(logs):
    table, events = (read_run(path).series for path in logs)
    assert set(table) == set(events)
    assert "trust_region/radius" in table
    for key, points in table.items():
        assert [step for step, _ in points] == [step for step, _ in events[key]]
        for (_, one), (_, other) in zip(points, events[key], strict=True):
            assert one == pytest.approx(other, rel=1e-6, nan_ok=True)


def test_a_file_is_read_as_its_folder_is(logs):
    table, events = logs
    assert str(read_run(table / "metrics.csv").series) == str(read_run(table).series)
    (file,) = [file for file in events.iterdir() if "tfevents" in file.name]
    assert str(read_run(file).series) == str(read_run(events).series)


def test_a_page_holds_all_that_it_shows(logs, tmp_path):
    write_report(load(logs), html=tmp_path / "new" / "report.html")
    text = (tmp_path / "new" / "report.html").read_text("utf-8")
    assert re.findall("<h2>(.*?)</h2>", text) == ["Advice", *TITLES]
    assert text.count("<svg ") == len(TITLES)
    assert not re.search(r"<(script|link|img|iframe)|@import|\ssrc=|url\((?!#)", text)
    assert not re.search(r'\bhref="(?!#)', text)
    assert set(re.findall(r"https?://[^\"' ]*", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert "#010203" not in text
    assert "#040506" not in text


def test_the_same_runs_give_the_same_page(logs, tmp_path):
    for name in ("one.html", "other.html"):
        write_report(load(logs), html=tmp_path / name)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "other.html").read_bytes()


def test_runs_are_side_by_side_under_names_that_tell_them_apart(logs, tmp_path):
    write_report(load(logs), html=tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<tr><th></th><th>csv/version_0</th><th>tb/version_0</th></tr>" in text
    assert "<h1>Trust region: csv/version_0, tb/version_0</h1>" in text


def test_names_leave_out_what_all_paths_share():
    assert short_names(["/a/b/c"]) == ["c"]
    assert short_names(["/a/b/c", "/a/d/c"]) == ["b/c", "d/c"]
    assert short_names(["/a/b", "/a/b/c"]) == ["b", "b/c"]
    assert short_names(["/a/b", "/a/b"]) == ["b", "b"]


def test_text_of_a_user_is_escaped(tmp_path):
    write_report([Run("<b>&", run().series)], html=tmp_path / "report.html", given=[["<i>"]])
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<b>&" not in text
    assert "<li>&lt;i&gt;</li>" in text


@pytest.mark.parametrize(
    "series",
    [
        {},
        {"radius": [0.1]},
        {"radius": [0.0, 0.0], "acceptance_ratio": [nan, nan], "loss": [-1.0, 2.0], "mean": [0.0, 0.0]},
        {"acceptance_ratio": [-inf, 300.0, 0.5], "predicted_reduction": [0.0, 0.0, 0.0], "step_norm": [0.0, nan, inf]},
        {"predicted_reduction": [1e-300, -1.0, inf], "actual_reduction": [-inf, nan, 1e300], "loss": [nan, inf, nan]},
        {"skipped_steps": [0, 1, 2], "outlier_steps": [1, 1, 1], "trials": [1, 0, 0], "step_norm": [0, 0, 0]},
    ],
)
def test_all_that_a_run_can_log_is_drawn(tmp_path, series):
    write_report([run(**series), run()], html=tmp_path / "report.html", png=tmp_path / "report.png")
    assert (tmp_path / "report.html").read_text("utf-8").count("<svg ") == len(TITLES)
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_from_before_a_key_was_logged_is_shown_without_it(tmp_path):
    old = run(skipped_steps=[0, 0, 1])
    assert figures(old)["Outliers"] == "not logged"
    assert figures(old)["Rejects"] == "not logged"
    assert figures(old)["Skipped steps"] == "1"
    write_report([old], html=tmp_path / "report.html")
    assert ">not logged</text>" in (tmp_path / "report.html").read_text("utf-8")


def test_figures_of_a_run_character_by_character():
    shown = run(
        radius=[1e-6, 0.5, 0.25, 0.125],
        acceptance_rate=[1, 2 / 3, nan, nan],
        step_norm=[1.0, 0.0, 0.0, 0.0],
        trials=[1, 3, 0, 1],
        rejects=[0, 5, 7, 7],
        skipped_steps=[0, 0, 0, 1],
        outlier_steps=[0, 0, 1, 1],
        loss=[3.0, 2.0, 1.5, nan],
    )
    assert figures(shown) == {
        "Rows": "4",
        "Last step": "3",
        "Radius": "1e-06 to 0.5, last 0.125",
        "Acceptance rate, last epoch": "0.667",
        "Rejects": "7",
        "Skipped steps": "1",
        "Outliers": "1",
        "Last loss": "train/loss 1.5",
    }
    assert figures(run())["Acceptance rate, last epoch"] == "no checks"


def marks(**series):
    """Return (steps, how many) of rejects, skipped steps and outliers."""
    return [(kind.steps.tolist(), kind.total) for kind in events_of(run(**series))]


def test_rejects_between_two_rows_are_marked_at_the_later_one_and_counted():
    assert marks(rejects=[0, 2, 2, 5]) == [([1, 3], 5), ([], 0), ([], 0)]


def test_in_a_log_without_a_count_a_reject_is_a_row_with_trials_whose_step_did_not_move():
    assert marks(
        step_norm=[1.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        trials=[1, 3, 0, 1, 1, 4],
        skipped_steps=[0, 0, 0, 1, 1, 1],
        outlier_steps=[0, 0, 0, 0, 2, 2],
    ) == [([1, 5], 2), ([3], 1), ([4], 2)]
    assert figures(run(step_norm=[1.0, 0.0], trials=[1, 1]))["Rejects in rows"] == "1"


def test_a_count_that_is_above_zero_in_the_first_row_has_grown():
    assert increases([(4, 1), (9, 1), (14, 3)]).tolist() == [4, 14]
    assert increases([]).tolist() == []


def test_extremes_and_last_values_pass_over_what_is_not_there():
    assert extremes([(0, nan), (1, -inf), (2, 3.0), (3, 1.0)]) == (1.0, 3.0)
    assert not any(isfinite(value) for value in extremes([(0, nan)]))
    assert last_known([(0, 1.0), (1, -inf), (2, nan)]) == -inf


def test_points_are_in_the_order_of_steps_and_of_two_for_a_step_the_later_stands():
    column = Column.of([3, 1, 3], [0.5, 1.5, 2.5])
    assert list(column) == [(1, 1.5), (3, 2.5)]
    assert (len(column), column[-1], list(column[:1]), repr(column)) == (
        2,
        (3, 2.5),
        [(1, 1.5)],
        "[(1, 1.5), (3, 2.5)]",
    )


def test_values_at_steps_are_nan_where_there_are_none():
    assert at([(1, 5.0), (4, 6.0)], np.array([0, 1, 4, 9])).tolist() == pytest.approx([nan, 5, 6, nan], nan_ok=True)
    assert at([], np.array([0])).tolist() == pytest.approx([nan], nan_ok=True)


def test_a_thinned_line_keeps_every_peak_and_gap_and_its_end():
    values = np.zeros(10_007)
    values[[1234, 5678]] = 9.0, -9.0
    values[4000:4500] = nan
    steps, shown = thinned(Column(np.arange(10_007), values), 200)
    assert len(steps) <= 300
    assert (steps[-1], shown[steps == 1234], shown[steps == 5678]) == (10_006, 9.0, -9.0)
    assert np.isnan(shown[(steps >= 4010) & (steps < 4490)]).all()
    assert thinned([(0, 1.0), (1, inf)], 200)[1].tolist() == pytest.approx([1.0, nan], nan_ok=True)


def test_marks_are_spread_over_the_whole_run():
    steps = np.arange(0, 1_000_000, 3)
    shown = spread(steps, 100)
    assert len(shown) == 100
    assert (shown[0], np.diff(shown).min() >= 9_999, np.diff(shown).max() <= 10_002) == (0, True, True)
    assert spread(np.array([4, 9]), 100).tolist() == [4, 9]


def long_log(path, rows=1200):
    """Write a table with a row for each step and a row of validation for every hundredth; return its path."""
    lines = ["epoch,fisher/max,step,train/loss,trust_region/radius,trust_region/rejects,val_loss"]
    for step in range(rows):
        lines.append(f"0,{9.0 if step == 601 else 1.0},{step},{step / 8},0.5,{step // 7},")
        if step % 100 == 99:
            lines.append(f"0,,{step},,,,{step / 16}")
    path.mkdir()
    (path / "metrics.csv").write_text("\n".join(lines) + "\n")
    return path / "metrics.csv"


def test_of_a_long_table_rows_are_left_out_evenly_and_counted_but_none_of_validation(tmp_path):
    table = long_log(tmp_path / "run")
    whole, none = read_csv(table)
    assert none == 0
    assert len(whole["trust_region/radius"]) == 1200
    series, left_out = read_csv(table, most=300)
    assert left_out == 900
    assert list(series["train/loss"]) == list(whole["train/loss"])[::4]
    assert list(series["val_loss"]) == list(whole["val_loss"]) == [(step, step / 16) for step in range(99, 1200, 100)]
    run = Run("a", series, left_out)
    assert figures(run)["Rows"] == "1200, 300 of them read"
    assert figures(run)["Rejects"] == str(1196 // 7)


def test_a_table_that_is_cut_off_or_holds_words_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,note,trust_region/radius\n0,a,0.5\n,b,0.25\n1,2.0,nan\n2,,\n3,c,0.1\n4")
    series, _ = read_csv(tmp_path / "metrics.csv")
    assert str(series) == "{'note': [(1, 2.0)], 'trust_region/radius': [(0, 0.5), (1, nan), (3, 0.1)]}"
    (tmp_path / "metrics.csv").write_text("")
    assert read_csv(tmp_path / "metrics.csv") == ({}, 0)


def test_advice_of_a_long_run_is_that_of_evenly_spaced_rows():
    series = {"trust_region/radius": Column(np.arange(45_000), np.full(45_000, 0.5))}
    assert [report.step for _, report in replay(Run("a", series))] == list(range(1, 45_001, 5))


def test_a_picture_of_a_long_run_is_not_larger_than_a_column_is_wide():
    count = 300_000
    steps, noise = np.arange(count), np.random.default_rng(0).random(count)
    names = ("radius", "acceptance_ratio", "acceptance_rate", "predicted_reduction", "actual_reduction", "step_norm")
    series = {f"trust_region/{name}": Column(steps, noise + 0.1) for name in names}
    series |= {key: Column(steps, noise + 0.1) for key in ("fisher/mean", "fisher/max", "fisher/trace", "loss")}
    series["trust_region/trials"] = Column(steps, np.ones(count))
    for name in ("rejects", "skipped_steps", "outlier_steps"):
        series[f"trust_region/{name}"] = Column(steps, np.arange(count) // 9.0)
    assert sum(len(svg(panel, [Run("a", series)])) for panel in PANELS) < 1_500_000


def test_a_point_of_the_model_is_a_check_with_a_row_of_its_own():
    from matplotlib.figure import Figure

    (panel,) = [panel for panel in PANELS if panel.title == "Actual over predicted reduction"]
    axes = Figure().subplots()
    assert panel.draw(
        axes,
        run(
            trials=[1, 0, 2, 1, 1],
            step_norm=[1.0, 1.0, 0.0, 1.0, 1.0],
            predicted_reduction=[0.1, 0.1, 0.2, 0.0, 0.3],
            actual_reduction=[0.05, 0.05, -0.4, 0.1, -inf],
        ),
    )
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert drawn["step taken"] == [[0.1, 0.05]]
    assert drawn["rejected"] == [[0.2, -0.4]]
    assert np.array_equal(*np.array(drawn["as predicted"]).T)
    assert not panel.draw(Figure().subplots(), run(trials=[0, 0]))


def test_losses_are_keys_whose_last_part_says_so_and_steps_go_before_their_mean():
    keys = ("a/loss_step", "a/loss_epoch", "val_loss", "loss/accuracy", "NLLLoss", "b_loss_epoch")
    assert Run("", {key: [(0, 1.0)] for key in keys}).losses() == ["NLLLoss", "a/loss_step", "b_loss_epoch", "val_loss"]


def test_several_optimizers_are_runs_of_their_own():
    first, second = by_optimizer(
        Run(
            "a",
            {
                "trust_region/radius": [(0, 1.0)],
                "fisher/mean": [(0, 2.0)],
                "trust_region-1/radius": [(0, 3.0)],
                "fisher-1/mean": [(0, 4.0)],
                "loss": [(0, 5.0)],
            },
        )
    )
    assert first == Run(
        "a, trust_region", {"trust_region/radius": [(0, 1.0)], "fisher/mean": [(0, 2.0)], "loss": [(0, 5.0)]}
    )
    assert second == Run(
        "a, trust_region-1", {"trust_region/radius": [(0, 3.0)], "fisher/mean": [(0, 4.0)], "loss": [(0, 5.0)]}
    )


def test_advice_is_what_the_rows_tell():
    checks = 40
    rejected = run(
        trials=checks * [4],
        step_norm=checks * [0.0],
        predicted_reduction=checks * [1.0],
        actual_reduction=checks * [-3.0],
    )
    assert [advice.kind for advice in advice_for(rejected)] == ["acceptance_rate"]
    poisoned = run(skipped_steps=[step // 4 for step in range(60)], outlier_steps=60 * [0])
    assert [advice.kind for advice in advice_for(poisoned)] == ["skipped_steps"]
    assert [advice.kind for advice in advice_for(run(max=[0.0, 0.0, 0.0], trials=[1, 1, 1]))] == ["zero_gradients"]
    assert advice_for(run()) == []


def test_a_row_without_a_check_of_its_own_gives_no_advice_about_checks():
    repeated = run(trials=40 * [0], step_norm=40 * [1.0], predicted_reduction=40 * [1.0], actual_reduction=40 * [0.0])
    assert advice_for(repeated) == []


def test_errors_of_the_command_line_name_the_path_and_what_is_missing(tmp_path, logs, capsys):
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    other.mkdir()
    (other / "metrics.csv").write_text("epoch,loss,step\n0,1.5,0\n")
    texts = {
        tmp_path / "none": f"no such file or folder: {tmp_path / 'none'}",
        empty: f"no run in {empty}: neither metrics.csv nor an event file of TensorBoard",
        logs[
            0
        ].parent: f"no run in {logs[0].parent}: neither metrics.csv nor an event file of TensorBoard; runs are in "
        f"{logs[0]}",
        other: f"no `trust_region/radius` in {other}: it was not written by a run with TrustRegionMonitor",
    }
    for path, text in texts.items():
        with pytest.raises(SystemExit) as stop:
            main([str(path), "--html", str(tmp_path / "report.html")])
        assert stop.value.code == 1
        assert capsys.readouterr().err == f"python -m lightning_soaa.run_report: {text}\n"
    assert not (tmp_path / "report.html").exists()


def test_the_command_line_writes_what_it_says(tmp_path, logs, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([str(logs[0])]) == 0
    assert main([str(logs[1]), "--png", "a.png"]) == 0
    assert capsys.readouterr().out == "report.html\na.png\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "report.html"]


def test_a_report_without_matplotlib_says_how_to_get_it(tmp_path, logs, capsys, monkeypatch):
    monkeypatch.setattr("lightning_soaa.run_report.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main([str(logs[0]), "--html", str(tmp_path / "report.html")])
    assert capsys.readouterr().err == (
        "python -m lightning_soaa.run_report: a report needs matplotlib: pip install 'lightning-soaa[report]'\n"
    )


def train(path, *callbacks, batches=8, **options):
    """Train for an epoch with a report among the callbacks."""
    torch.manual_seed(0)
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "enable_model_summary": False}
    defaults = {"logger": CSVLogger(path, name="csv", version=0), "log_every_n_steps": 1, **quiet}
    defaults = {} if options.get("barebones") else defaults
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **{**defaults, **options})
    trainer.fit(Mixed(RatioRadius()), loader(batches=batches))


@pytest.mark.parametrize("name", [None, "my.html", "my.png"])
def test_the_callback_writes_the_page_where_it_is_asked_to(tmp_path, name):
    train(tmp_path, TrustRegionReport(None if name is None else str(tmp_path / name)))
    path = tmp_path / "csv" / "version_0" / "trust_region.html" if name is None else tmp_path / name
    assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"<!doctype html>")


def test_the_callback_reads_tensorboard_where_there_is_no_csv(tmp_path):
    train(tmp_path, TrustRegionReport(), logger=TensorBoardLogger(tmp_path, name="tb", version=0))
    assert "<td>8</td>" in (tmp_path / "tb" / "version_0" / "trust_region.html").read_text("utf-8")


def test_the_page_of_the_callback_shows_the_advice_that_was_given(tmp_path):
    class Given(TrustRegionMonitor):
        def advice_given(self):
            return [["turn it off and on again"]]

    train(tmp_path, Given(), TrustRegionReport(tmp_path / "report.html"))
    assert '<ul class="advice"><li>turn it off and on again</li></ul>' in (tmp_path / "report.html").read_text("utf-8")


def test_the_callback_needs_a_logger_whose_files_it_can_read(tmp_path):
    with pytest.raises(ValueError) as error:
        train(tmp_path, TrustRegionReport(), logger=False)
    assert str(error.value) == (
        "TrustRegionReport: `logger` must be a TensorBoardLogger or a CSVLogger at least, got []; add CSVLogger(...) "
        "to Trainer(logger=[...])"
    )


def test_the_callback_refuses_a_path_that_is_none():
    with pytest.raises(TypeError) as error:
        TrustRegionReport(3)
    assert str(error.value) == "TrustRegionReport: `path` must be None, a string or a path, got 3"


def test_the_callback_refuses_at_the_start_what_would_fail_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_soaa.run_report.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="a report needs matplotlib"):
        train(tmp_path, TrustRegionReport())


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"barebones": True}])
def test_the_callback_does_nothing_where_there_are_no_logs_by_design(tmp_path, options):
    train(tmp_path, TrustRegionReport(tmp_path / "report.html"), **options)
    assert not list(tmp_path.rglob("report.html"))


def test_the_callback_warns_of_a_run_without_rows(tmp_path):
    with pytest.warns(UserWarning, match="TrustRegionReport: nothing to show: no `trust_region/radius` in "):
        train(tmp_path, TrustRegionReport(tmp_path / "report.html"), log_every_n_steps=50)
    assert not (tmp_path / "report.html").exists()
