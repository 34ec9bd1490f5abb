"""Command lines: what they mean, what is said of mistakes, and that both come before torch."""

from __future__ import annotations

import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from nflows_iresnet import datasets
from nflows_iresnet.datasets.tables import CASP
from nflows_iresnet.experiments import options
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.config import UsageError
from nflows_iresnet.experiments.figures import DESCRIPTIONS
from nflows_iresnet.experiments.models import IMAGE_MODELS, MODELS
from nflows_iresnet.experiments.options import CompareOptions, TrainingOptions, parse, to_config
from nflows_iresnet.experiments.table1 import Settings

ROOT = Path(__file__).parents[1]
WITHOUT_TORCH = """
import sys
from nflows_iresnet.experiments.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stop:
    status = stop.code
print(status, *sorted({"torch", "numpy", "nflows"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "status"),
    [
        *([[name, "--help"], 0] for name in options.COMMANDS),
        (["--help"], 0),
        (["--version"], 0),
        *([[name, "--list"], 0] for name in ("bench", "figures")),
        ([], 2),
        (["comprae"], 2),
        *([[name, "--quik"], 2] for name in options.COMMANDS),
        (["compare", "--steps", "0"], 2),
        (["compare", "--models", "realnpv"], 2),
        (["compare", "--resume"], 2),
        (["compare", "--amp"], 2),
        (["table1", "--coeffs", "1"], 2),
        (["bench", "--only", "memry"], 2),
        (["figures", "--only", "dynamic"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_mistakes_do_not_wait_for_torch(words: list[str], status: int) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == str(status), done.stderr
    assert (len(done.stderr.splitlines()) == 2) == (status == 2)


def test_names_are_those_of_the_registries() -> None:
    assert options.data_sets(images=False) == datasets.available()
    assert options.data_sets(images=True) == datasets.available_images()
    assert options.models(images=False).keys() == MODELS.keys()
    assert options.models(images=True).keys() == IMAGE_MODELS.keys()
    assert all({**options.models(images=False), **options.items(), **DESCRIPTIONS}.values())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("comprae", "unknown command 'comprae': did you mean 'compare'?"),
        ("--quick compare", "unknown option '--quick'"),
        ("compare --stpes 3", "unknown option '--stpes': did you mean '--steps'?"),
        ("compare --stpes=3", "did you mean '--steps'?"),
        ("compare -steps 3", "did you mean '--steps'?"),
        ("compare \u2013steps 3", "did you mean '--steps'?"),
        ("compare --learning 3", "did you mean '--learning-rate"),
        ("compare --rep 3", "did you mean '--repeats'?"),
        ("compare --version", "unknown option '--version' (see nflows-iresnet compare --help)"),
        ("compare --tensorboard", "unknown option '--tensorboard' (see"),
        ("compare compar", "unknown data set 'compar'. Known: moons"),
        ("compare tables", "unknown data set 'tables'. Known: moons"),
        ("compare help", "unknown data set 'help'. Known: moons"),
        ("compare --xyzzy", "unknown option '--xyzzy' (see nflows-iresnet compare --help)"),
        ("compare -dash.csv", "unknown option '-dash.csv': a file of that name is './-dash.csv'"),
        ("compare --dash.npy moons", "a file of that name is './--dash.npy'"),
        ("compare --ouut=dash.csv", "did you mean '--out'?"),
        ("compare --steps=", "'' is not a positive integer"),
        ("compare --resume", "--resume needs the --out folder"),
        ("compare --steps 1e3", "'1e3' is not a positive integer"),
        ("compare --steps", "--steps: expected one argument"),
        ("compare --models", "--models: expected at least one argument"),
        ("compare --models maf moons", "unknown model 'moons': data sets stand before"),
        ("compare --seed -1", "'-1' is not an integer from 0"),
        ("compare --minutes 2 --race 3s", "not allowed with"),
        ("compare --device cdua", "'cdua' is none of auto, cpu, cuda"),
        ("compare --dask scheduler", "is not an address, such as tcp://scheduler:8786"),
        ("compare --out=", "'' is not a name"),
        ("compare ''", "'' is not the name of a data set: see --list"),
        ("compare moons --images", "'moons' is not a set of images: leave out --images"),
        ("compare mnist --images --same-start", "--same-start is for rows"),
        ("compare \u4f60\u597d", "unknown data set '\u4f60\u597d'"),
        ("table1 digits mnist", "'mnist' is one word too many"),
        ("table1 minst", "did you mean 'mnist'?"),
        ("table1 --resume", "--resume needs the --out folder"),
        ("table2 --models mode", "did you mean 'made'?"),
        ("bench --only step-dimensoin", "did you mean 'step-dimension'?"),
        ("bench memory", "'memory' is one word too many"),
        ("figures --only dynamic", "did you mean 'dynamics'?"),
    ],
)
def test_a_mistake_is_one_line_with_the_remedy(
    line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(line)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    assert message in printed.err


def test_words_may_stand_in_front_of_options_and_behind_them(tmp_path: Path) -> None:
    table = tmp_path / "two words.csv"
    table.touch()
    line = ["compare", "moons", "--steps", "3", "circles", str(table)]
    found = parse(line)
    assert isinstance(found, CompareOptions)
    assert found.datasets == ("moons", "circles", str(table))
    assert parse(["table1", "--quick", "mnist"]).dataset == "mnist"  # type: ignore[attr-defined]


def test_of_repeated_options_the_last_counts_and_lists_are_joined() -> None:
    line = "compare --steps 3 --steps 4 --models maf --models nice glow"
    found = parse(line.split())
    assert isinstance(found, CompareOptions)
    assert (found.steps, found.models) == (4, ("maf", "nice", "glow"))


def test_a_help_in_the_middle_is_a_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["compare", "moons", "-h", "--models"])
    assert stop.value.code == 0
    assert "--same-start" in capsys.readouterr().out


def test_options_are_made_without_a_command_line() -> None:
    config = to_config(CompareOptions(datasets=("moons",), steps=3, seed=2, device="cpu"))
    assert (config.datasets, config.steps, config.seed) == (("moons",), 3, 2)
    assert CompareOptions(dask="tcp://scheduler:8786").dask == "tcp://scheduler:8786"


@pytest.mark.parametrize("name", options.COMMANDS)
def test_the_help_says_what_holds_by_default(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "examples: nflows-iresnet" in text
    defaults = {
        "compare": ["(default: 400)", "(default: 256; with --images: 64)"],
        "table2": ["(default: 1000)", "(default: 0.002; with --images: 0.001)"],
        "table1": [f"(default: {Settings.steps}; mnist: a time)", "(default: 0.9 0.8 0.7 0.6 0.5)"],
        "bench": ["(default: 0.005)", "inverse-scaling"],
        "figures": ["(default: all)", "dynamics paths of points"],
    }
    assert all(each in text for each in [*defaults[name], "--seed N reproduces", "(default: 0)"])
    assert "auto is cuda where there is a GPU (default: auto)" in text
    assert "contestant" not in text


@pytest.mark.parametrize("name", options.COMMANDS)
def test_the_help_names_the_files_that_are_written(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    (text,) = " ".join(capsys.readouterr().out.split()).split("--out DIR ")[1:]
    text = text.split("(default: results/COMMAND-TIME)")[0]
    assert {"bench": "bench.json", "figures": "figures.json"}.get(name, "results.json") in text
    assert ("report.html" in text) == (name != "bench")
    assert (".csv" in text) == (name in ("compare", "table2"))


@pytest.mark.parametrize("name", ["compare", "table2"])
def test_what_mnist_alone_gets_is_said_where_it_gets_it(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    is_tuned = "mnist" in options.COMMANDS[name].options.preset.tuned
    assert ("residual-flow alone" in capsys.readouterr().out) == is_tuned


def test_the_same_option_has_one_name_and_one_kind_everywhere() -> None:
    shared = {each.name for each in fields(TrainingOptions)}
    for command in options.COMMANDS.values():
        own = {each.name for each in fields(command.options)}
        assert {"list", "seed", "quick", "out", "quiet"} <= own
        if isinstance(command.options, TrainingOptions):
            assert shared <= own


def test_a_name_of_another_registry_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="did you mean 'realnvp'"):
        parse(["compare", "digits", "--images", "--models", "realnvp-scalde"])


@pytest.mark.parametrize("name", ["casp", "gas"])
def test_tables_too_are_looked_for_in_the_folder_that_the_environment_names(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFLOWS_IRESNET_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=f"{name}: no .* in {tmp_path}"):
        datasets.load(name)


def test_a_folder_that_is_named_wins_over_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NFLOWS_IRESNET_DATA", "/nowhere")
    (tmp_path / "CASP.csv").write_text("a,b")
    assert CASP.find(tmp_path).path == str(tmp_path / "CASP.csv")
