"""The text of the epoch's line, character by character."""

from io import StringIO
from math import inf, nan

import pytest
from rich.console import Console

from lightning_soaa.console import EpochRow, RunRow, bar_entries, beside, epoch_lines, render, run_lines


def row(name="trust_region", radius=0.0123456, acceptance_rate=0.95, checks=40, rejects=2, skipped_steps=0):
    return EpochRow(name, radius, acceptance_rate, checks, rejects, skipped_steps)


def plain(*rows, epoch=3):
    file = StringIO()
    Console(file=file, width=200).print(epoch_lines(epoch, rows))
    return file.getvalue()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "Epoch 3: radius 0.0123, acceptance rate 0.95, 40 checks, 2 rejects\n"),
        ({"radius": 1.23456e-5}, "Epoch 3: radius 1.23e-05, acceptance rate 0.95, 40 checks, 2 rejects\n"),
        ({"radius": 1.0}, "Epoch 3: radius 1, acceptance rate 0.95, 40 checks, 2 rejects\n"),
        ({"acceptance_rate": 2 / 3}, "Epoch 3: radius 0.0123, acceptance rate 0.667, 40 checks, 2 rejects\n"),
        ({"checks": 1, "rejects": 1}, "Epoch 3: radius 0.0123, acceptance rate 0.95, 1 check, 1 reject\n"),
        ({"checks": 1234567.0}, "Epoch 3: radius 0.0123, acceptance rate 0.95, 1234567 checks, 2 rejects\n"),
        ({"checks": 3.5}, "Epoch 3: radius 0.0123, acceptance rate 0.95, 3.5 checks, 2 rejects\n"),
        ({"acceptance_rate": nan, "checks": 0, "rejects": 0}, "Epoch 3: radius 0.0123, no checks\n"),
        (
            {"skipped_steps": 1},
            "Epoch 3: radius 0.0123, acceptance rate 0.95, 40 checks, 2 rejects, 1 skipped step\n",
        ),
        (
            {"acceptance_rate": nan, "checks": 0, "skipped_steps": 12.0},
            "Epoch 3: radius 0.0123, no checks, 12 skipped steps\n",
        ),
    ],
)
def test_one_optimizer_has_one_line_without_a_name(changes, line):
    assert plain(row(**changes)) == line


def test_several_optimizers_have_a_line_each_with_its_name():
    assert plain(row(), row(name="trust_region-1", radius=2.0), epoch=0) == (
        "Epoch 0, trust_region: radius 0.0123, acceptance rate 0.95, 40 checks, 2 rejects\n"
        "Epoch 0, trust_region-1: radius 2, acceptance rate 0.95, 40 checks, 2 rejects\n"
    )


def test_rendered_text_is_plain_where_the_terminal_has_no_colours():
    text = epoch_lines(3, [row(skipped_steps=1)])
    file = StringIO()
    assert render(text, Console(file=file)) == text.plain
    assert not file.getvalue()


def test_rendered_text_has_skipped_steps_in_red_where_the_terminal_has_colours():
    text = epoch_lines(3, [row(acceptance_rate=nan, checks=0, skipped_steps=1)])
    console = Console(file=StringIO(), force_terminal=True, color_system="standard", no_color=False)
    assert render(text, console) == "Epoch 3: radius 0.0123, no checks, \x1b[1;31m1 skipped step\x1b[0m"


def test_rendered_text_is_not_broken_where_the_terminal_is_narrow():
    text = epoch_lines(3, [row()])
    assert render(text, Console(file=StringIO(), width=20)) == text.plain


def test_rendered_text_goes_by_standard_output_by_default(capsys):
    assert render(epoch_lines(3, [row()])) == "Epoch 3: radius 0.0123, acceptance rate 0.95, 40 checks, 2 rejects"
    assert not capsys.readouterr().out


def run_row(**changes):
    known = {"name": "trust_region", "steps": 600, "checks": 140, "rejects": 2, "skipped_steps": 0, "outlier_steps": 1}
    radii = {"radius": 0.0214, "radius_low": 1e-6, "radius_high": 0.0345}
    return RunRow(**{**known, **radii, "check_share": 0.0312, "advice": [], **changes})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {},
            "Trust region: 600 steps, 140 checks, 2 rejects, 0 skipped steps, 1 outlier\n"
            "  radius 1e-06 to 0.0345, at the end 0.0214; checks took 3.1 % of the time",
        ),
        (
            {"steps": 1, "checks": 1, "rejects": 1, "skipped_steps": 1, "outlier_steps": 0, "check_share": nan},
            "Trust region: 1 step, 1 check, 1 reject, 1 skipped step, 0 outliers\n"
            "  radius 1e-06 to 0.0345, at the end 0.0214",
        ),
        (
            {"check_share": 0.0, "advice": ["repeat_gap", "ratio_noise"]},
            "Trust region: 600 steps, 140 checks, 2 rejects, 0 skipped steps, 1 outlier\n"
            "  radius 1e-06 to 0.0345, at the end 0.0214; checks took 0 % of the time\n"
            "  advice given: repeat_gap, ratio_noise",
        ),
        (
            {"radius_low": inf, "radius_high": -inf, "check_share": nan},  # no batch in this fit
            "Trust region: 600 steps, 140 checks, 2 rejects, 0 skipped steps, 1 outlier\n"
            "  radius 0.0214 to 0.0214, at the end 0.0214",
        ),
    ],
)
def test_summary_of_a_fit_character_by_character(changes, text):
    assert run_lines([run_row(**changes)]).plain == text


def test_summary_names_several_optimizers():
    lines = run_lines([run_row(), run_row(name="trust_region-1")]).plain.splitlines()
    assert [line.split(":")[0] for line in lines[::2]] == [
        "Trust region (trust_region)",
        "Trust region (trust_region-1)",
    ]


def test_summary_is_plain_where_colours_are_not_wanted(monkeypatch):
    text = run_lines([run_row(skipped_steps=3, advice=["repeat_gap"])])
    coloured = Console(file=StringIO(), force_terminal=True, color_system="standard", no_color=False, width=200)
    assert "\x1b[1;31m3 skipped steps" in render(text, coloured)
    assert render(text, Console(file=StringIO(), width=200)) == text.plain  # no terminal
    monkeypatch.setenv("NO_COLOR", "1")
    no_color = render(text, Console(file=StringIO(), force_terminal=True, color_system="standard", width=200))
    assert "\x1b[1m3 skipped steps" in no_color  # bold is no colour
    assert "31m" not in no_color
    assert "33m" not in no_color


@pytest.mark.parametrize(
    ("radius", "text"),
    [
        (1e-6, "1.00e-06"),
        (9.99e-4, "9.99e-04"),
        (1e-3, "0.001"),
        (0.012345, "0.0123"),
        (1.0, "1"),
        (0.0, "0"),
        (nan, "nan"),
    ],
)
def test_a_radius_in_a_bar_has_three_digits_however_small(radius, text):
    assert bar_entries({"": (radius, 4, 3)}) == {"radius": text, "accepted": "0.75"}


def test_a_bar_shows_a_dash_before_the_first_check_and_names_optimizers():
    assert bar_entries({"": (0.5, 0, 0), "-1": (2.0, 3, 2)}) == {
        "radius": "0.5",
        "accepted": "-",
        "radius-1": "2",
        "accepted-1": "0.667",
    }


def test_a_bar_keeps_what_the_module_shows_under_the_same_name():
    assert beside({"radius": 3.0, "loss": 1.0}, {"radius": "0.5", "accepted": "1"}) == {
        "radius": 3.0,
        "loss": 1.0,
        "accepted": "1",
    }
