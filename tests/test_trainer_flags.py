"""Every row of the table of Trainer flags against the stock run of the same optimizer, in both modes, bit for bit."""

from functools import lru_cache
from pathlib import Path

import pytest
from compatibility import document
from lightning.pytorch import callbacks
from lightning_models import ACCEPT, QUIET, Remember, assert_same
from trainer_flags import REFUSED, TABLE

from lightning_soaa import FixedRadius

ROWS = {f"{area}: {row.flag}": row for area, rows in TABLE.items() for row in rows}
pytestmark = [
    *QUIET,
    *(
        pytest.mark.filterwarnings(f"ignore:{text}")
        for text in (
            "ReduceLROnPlateau conditioned on metric",
            "SWA is currently only supported every epoch",
            "train_dataloader yielded None",
            ".*in barebones mode",
            "You are trying to `self.log",
            "The `LightningModule.configure_callbacks`",
            "The dirpath has changed",
            "The provided params to be frozen already exist",
            "The `batch_idx` argument in",
            "The number of training batches",
            "Trying to infer the `batch_size`",
        )
    ),
]


@lru_cache(maxsize=1)
def stock(name, folder):
    row = ROWS[name]
    return row.run(lambda: row.stock(FixedRadius(), **row.options), folder)


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stock")


def same(one, other):
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("mode", ["default", "automatic"])
@pytest.mark.parametrize("name", ROWS)
def test_flag_means_what_it_means_without_the_mixin(name, mode, stock_folder, tmp_path):
    row = ROWS[name]
    if not hasattr(callbacks, row.needs):
        pytest.skip(f"this version of Lightning has no {row.needs}")
    mixed = row.mixed(mode == "automatic")
    if getattr(row, mode) == REFUSED:
        with pytest.raises(ValueError, match=r"^SOAAMixin: `.*` must be .*, got .*; "):
            row.run(lambda: mixed(ACCEPT, **row.options), tmp_path)
        return
    folder = stock_folder / str(list(ROWS).index(name))
    folder.mkdir(exist_ok=True)
    reference = stock(name, folder)
    remember = Remember()
    for rule in (FixedRadius(), remember):
        own = tmp_path / type(rule).__name__
        own.mkdir()
        found = row.run(lambda: mixed(rule, **row.options), own)  # noqa: B023
        assert set(found) == set(reference)
        apart = {fact for fact in found if not same(reference[fact], found[fact])}
        assert apart == set(row.apart_automatic if mode == "automatic" else row.apart)
    assert bool(remember.seen) == row.checked
    if name.startswith("Learning-rate") and "missing" not in name:
        assert len({tuple(lr) for lr in reference["learning rates"]}) > 1


def test_the_document_is_what_the_rows_say():
    assert (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text() == document()
