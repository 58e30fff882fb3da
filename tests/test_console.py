"""The text of the epoch's line, character by character."""

from io import StringIO
from math import nan

import pytest
from rich.console import Console

from lightning_soaa.console import EpochRow, epoch_lines, render


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
