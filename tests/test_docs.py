"""The pages: their code runs, what they show is there, and what they take from the README is in it."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from lightning_models import QUIET, loader

import lightning_soaa

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
README = ROOT / "README.md"
QUIETLY = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter"),
    pytest.mark.filterwarnings("ignore:.*will be overridden by `LightningCLI.configure_optimizers`"),
    pytest.mark.filterwarnings("ignore:The `LightningModule.configure_optimizers` will be overridden"),
]


def load(name):
    """Return a module of the documentation, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page, kind="python"):
    return re.findall(rf"^```{kind}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def after(diff):
    """Return what a diff leaves."""
    return "".join(line[1:] for line in diff.splitlines(keepends=True) if line[:1] in {" ", "+", "\n"})


class Base(LightningModule):
    """What a fragment of a module on a page may use."""

    def __init__(self):
        super().__init__()
        self.one, self.other = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)

    def loss(self, batch, part):
        return torch.nn.functional.cross_entropy(part(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.loss(batch, self.one)


class Two(lightning_soaa.SOAAMixin, Base):
    """Two optimizers and their losses."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def generator_loss(self, batch):
        return self.loss(batch, self.one)

    def discriminator_loss(self, batch):
        return self.loss(batch, self.other)

    def configure_optimizers(self):
        return [lightning_soaa.SOAA(part.parameters()) for part in (self.one, self.other)]


def fitted(module):
    """Return the trainer of a short fit."""
    trainer = Trainer(accelerator="cpu", max_epochs=1, limit_train_batches=3, **QUIETLY)
    trainer.fit(module, loader())
    return trainer


def test_pieces_of_code_in_the_readme_do_what_is_said():
    (start,), (options, steps, plain, kronecker) = blocks(README, "diff"), blocks(README)
    names = {**vars(lightning_soaa), "torch": torch, "LightningModule": Base}
    exec(after(start), names)
    assert isinstance(fitted(names["Net"]()).optimizers[0], lightning_soaa.SOAA)

    exec(f"class Options(SOAAMixin, LightningModule):\n{options}", names)
    assert fitted(names["Options"]()).optimizers[0].param_groups[0]["weight_decay"] == 0.01

    exec(f"class Steps(Two):\n{steps}", names | {"Two": Two}, found := {})
    assert [optimizer.last_step.step for optimizer in fitted(found["Steps"]()).optimizers] == [3, 3]

    names["model"] = model = torch.nn.Linear(4, 2)
    names["loss_closure"] = lambda: model(torch.ones(1, 4)).square().sum()
    names["closure"] = lambda: (loss := names["loss_closure"]()).backward() or loss
    exec(plain, names)
    assert names["optimizer"].last_step.checked
    exec(f"made = {kronecker}", names)
    assert isinstance(names["made"].fisher_rule, lightning_soaa.KroneckerFisher)


def test_code_of_the_page_about_fishers_runs_and_groups_have_theirs(capsys):
    names = {}
    for block in blocks(DOCS / "kronecker.md"):
        exec(block, names)
    assert capsys.readouterr().out == f"{4 * (2 * 49098 + 2 * (32**2 + 64**2 + 256**2 + 10**2 + 64**2) + 6)}\n"
    model, optimizer = names["model"], names["optimizer"]
    loss_at = lambda: model(torch.arange(40).view(5, 8)).square().mean()  # noqa: E731
    loss_at().backward()
    optimizer.step(loss_closure=loss_at)
    rotated = [optimizer.state[param].get("basis_age") is not None for param in model.parameters()]
    assert rotated == [False, True, True, True, True]


def test_code_of_a_diff_runs_after_the_change():
    mixed, sam = blocks(DOCS / "migrating.md", "diff")
    names = {**vars(lightning_soaa), "LightningModule": Base}
    exec(f"{after(mixed)}    pass", names)
    assert isinstance(fitted(names["Net"]()).optimizers[0], lightning_soaa.SOAA)
    weight = torch.nn.Parameter(torch.ones(3))
    names = {"optimizer": lightning_soaa.SOAA([weight]), "batch": 2.0, "loss_of": lambda batch: (batch * weight).sum()}
    exec(after(sam), names)
    assert names["optimizer"].last_step.checked


def commands(page):
    """Return the commands of a page, each as words."""
    text = page.read_text("utf-8")
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    lines += re.findall(r"^    ((?:pip|python) .*)$", text, re.MULTILINE)
    lines += re.findall(r"`((?:pip|python|tensorboard|mkdocs) [^`]*)`", text)
    return [shlex.split(part) for line in lines for part in line.split("&&")]


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_what_commands_of_a_page_name_is_there(page):
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1], re.MULTILINE)
    for words in commands(page):
        if words[:2] == ["pip", "install"]:
            assert re.fullmatch(r"\.\[(\w+)\]", words[-1])[1] in extras
        elif words[:2] == ["python", "-m"]:
            assert words[2] == "pytest" or importlib.util.find_spec(words[2]), words
        elif words[0] == "python" and words[1] != "train.py":
            assert (ROOT / words[1]).is_file()


def test_the_command_lines_and_the_file_of_the_page_about_the_cli_are_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    page, settings = DOCS / "cli.md", tmp_path / "settings.yaml"
    settings.write_text(*blocks(page, "yaml"))
    lines = [words[2:] for words in commands(page) if words[:2] == ["python", "train.py"]]
    assert len(lines) == 4
    quiet = [f"--trainer.{key}=false" for key in QUIETLY] + [
        *("--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--seed_everything=0")
    ]
    (block,) = blocks(page)
    for number, arguments in enumerate([*lines, ["fit", f"--config={settings}"]]):
        (tmp_path / str(number)).mkdir()
        monkeypatch.chdir(tmp_path / str(number))  # the CLI writes its options there
        names = {"__name__": "train"}
        exec(compile(block, str(page), "exec"), names)
        trained = []
        names["Net"].on_train_end = lambda self, trained=trained: trained.append(self.trainer)
        names["main"]([*arguments, *quiet])
        (trainer,) = trained
        assert isinstance(trainer.optimizers[0], lightning_soaa.SOAA)
    assert trainer.optimizers[0].radius_rule == lightning_soaa.RatioRadius(relative=0.1)
    (monitor,) = [call for call in trainer.callbacks if isinstance(call, lightning_soaa.TrustRegionMonitor)]
    assert (monitor.layers, monitor.check_time) == (3, True)


def anchors(markdown):
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", markdown, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def test_links_between_pages_and_to_files_lead_somewhere():
    made = load("hooks").on_page_markdown
    pages = {page.name: made(page.read_text("utf-8")) for page in PAGES}
    for name, markdown in pages.items():
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", markdown):
            assert not target or (DOCS / target).is_file(), (name, target)
            assert not anchor or anchor in anchors(pages[target or name]), (name, target, anchor)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text("utf-8")):
        assert (ROOT / target).exists(), target


def test_functions_that_pages_name_get_their_line_and_a_missing_one_is_named():
    hooks = load("hooks")
    source = (ROOT / "lightning_soaa" / "fisher.py").read_text("utf-8").splitlines()
    line = hooks.line_of("fisher", "DiagonalFisher.sums")
    assert source[line - 1].lstrip().startswith("def sums(")
    assert hooks.with_lines("| a | `fisher.DiagonalFisher.sums` |") == (
        f"| a | `fisher.DiagonalFisher.sums`, fisher.py:{line} |"
    )
    with pytest.raises(ValueError, match=r"^no `gone` in lightning_soaa/fisher.py$"):
        hooks.with_lines("| `fisher.gone` |")
    with pytest.raises(ValueError, match=r"^no file lightning_soaa/gone.py$"):
        hooks.line_of("gone", "x")
    algorithm = (DOCS / "algorithm.md").read_text("utf-8")
    assert len(hooks.CODE.findall(algorithm)) == 10


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_code_of_a_page_runs_from_top_to_bottom(page, capsys):
    if page.stem == "lightning" and not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("this Lightning has no WeightAveraging")
    names = {"__name__": "page"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pictures_of_a_page_are_there_and_small(page):
    for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page.read_text("utf-8")):
        content = (DOCS / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) < 100_000


def test_every_page_is_in_the_navigation_and_the_other_way_round():
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    listed = set(re.findall(r"^  - .+: (\w[\w-]*\.md)$", config, re.MULTILINE))
    assert listed <= {page.name for page in PAGES}
    assert {page.name for page in PAGES} - listed <= {"compatibility.md"}


def test_what_a_page_takes_from_the_readme_is_put_in_with_links_that_stay_inside():
    hooks = load("hooks")
    for page in PAGES:
        markdown = hooks.on_page_markdown(page.read_text("utf-8"))
        assert not re.search(r"<!-- \S*README", markdown)
        assert not re.search(r"\]\((\.\./)?(benchmarks|docs|examples)/", markdown)


def test_a_section_ends_at_the_next_heading_and_a_missing_one_is_named():
    hooks = load("hooks")
    text = "# T\n\n## A\n\none\n\n### B\n\ntwo\n\n## C\n\nthree\n"
    assert hooks.section(text, "A") == "one\n\n### B\n\ntwo"
    assert hooks.section(text, "C") == "three"
    with pytest.raises(ValueError) as error:
        hooks.section(text, "B")
    assert str(error.value) == "README.md has no heading `## B`"


def test_links_out_of_the_pages_become_the_name_of_a_file():
    assert load("hooks").within("[a](../benchmarks/README.md) [b](docs/c.md) [d](e.md)") == (
        "a (`benchmarks/README.md`) [b](c.md) [d](e.md)"
    )


def test_docstrings_become_markdown():
    pytest.importorskip("griffe")
    text = "A :class:`~a.b.C` and :func:`d`.\n\n.. code-block:: text\n\n    x\n\nE::\n\n    y\n\n"
    text += "== ==\na  b\n== ==\nc  d\n== =="
    assert load("docstrings").as_markdown(text) == (
        "A `C` and `d`.\n\n\n    x\n\nE:\n\n    y\n\n```text\na  b\n== ==\nc  d\n```"
    )
