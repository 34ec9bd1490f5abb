"""`nflows-iresnet table1` and `table2`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nflows_iresnet import datasets
from nflows_iresnet.experiments import models as continuous
from nflows_iresnet.experiments import published
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.data import RowTask
from nflows_iresnet.experiments.options import TABLE2 as TABLE2_PRESET
from nflows_iresnet.experiments.record import Record as DensityRecord
from nflows_iresnet.experiments.session import LiveProgress
from nflows_iresnet.experiments.table1 import DEFAULT_COEFFS, classifiers
from nflows_iresnet.experiments.table1.classifiers import Inversion
from nflows_iresnet.experiments.table1.command import TableRecord
from nflows_iresnet.experiments.tables import bounded, rows_of
from nflows_iresnet.experiments.tables import columns_for as density_columns

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

TINY = ["--steps", "3", "--repeats", "2", "--num-blocks", "1", "--hidden-channels", "8"]
TABLE1 = ["table1", "--coeffs", "0.9", "0.5", *TINY, "--num-train", "64", "--padding", "1"]
TABLE2 = ["table2", "--models", "made", "residual-flow", "--steps", "3", "--num-layers", "1"]


# --- table 1 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table1(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("table1") / "out"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "200")
        printed = printed_by([*TABLE1, "--out", str(out)])
    return out, printed


def printed_by(arguments: list[str]) -> str:
    import contextlib
    import io

    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        assert main(arguments) == 0
    return stream.getvalue()


def test_table1_prints_what_its_json_says(table1: tuple[Path, str]) -> None:
    out, printed = table1
    data = json.loads((out / "results.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        *("results.json", "table1.png", "report.html", "runs")
    }
    assert not list((out / "runs").iterdir())
    page = (out / "report.html").read_text()
    lines = first_lines(printed)
    assert [row["model"] for row in data["table"]] == ["resnet", "vanilla", "c=0.9", "c=0.5"]
    for row in data["table"]:
        line, outcomes = lines[row["model"]], of(data["outcomes"], row["model"])
        wrong, total = (sum(each[name] for each in outcomes) for name in ("num_wrong", "num_test"))
        assert row["error_percent"] == pytest.approx(100 * wrong / total)
        rate, distinct = wrong / total, data["data"]["num_distinct"]
        assert 179 < distinct < total
        assert row["error_se"] == pytest.approx(100 * math.sqrt(rate * (1 - rate) / distinct))
        cells = [
            f"{row['error_percent']:.2f} ± {row['error_se']:.2f}",
            f"{outcomes[0]['num_parameters']:,}",
        ]
        cells += list(published.CLASSIFICATION_ERROR[row["model"]].values())
        bounds = [each["lipschitz_bound"] for each in outcomes]
        if row["model"] == "resnet":
            assert bounds == [None, None]
            cells.append("none")
        else:
            assert row["lipschitz_bound"] == max(bounds)
            cells += [f"≤ {max(bounds):.3f}", f"{row['inversion']['error_max']:.1e}"]
        guaranteed = None not in bounds and max(bounds) < 1
        assert row["guaranteed_inverse"] == guaranteed == row["model"].startswith("c=")
        cells.append(" yes " if guaranteed else " no ")
        for cell in cells:
            assert cell in line, (cell, line)
            assert cell.strip() in page


def first_lines(printed: str) -> dict[str, str]:
    """Return by its first word the first line that starts with it."""
    lines = [line for line in printed.splitlines() if line.strip()]
    return {line.split()[0]: line for line in reversed(lines)}


def of(outcomes: Sequence[dict[str, Any]], model: str) -> list[dict[str, Any]]:
    return [each for each in outcomes if each["model"] == model]


def test_table1_classes_are_named(table1: tuple[Path, str]) -> None:
    outcomes = json.loads((table1[0] / "results.json").read_text())["outcomes"]
    classes = {each["model"]: each["model_class"].rsplit(".", 1)[1] for each in outcomes}
    assert classes == {
        "resnet": "ResNet",
        "vanilla": "ResidualClassifier",
        **dict.fromkeys(("c=0.9", "c=0.5"), "InvertibleClassifier"),
    }


def test_a_record_survives_its_json(table1: tuple[Path, str]) -> None:
    record = TableRecord.from_json((table1[0] / "results.json").read_text())
    lost = Inversion(6, 6, math.inf, math.nan, 1.0)
    again = TableRecord.from_json(
        replace(record, outcomes=(replace(record.outcomes[1], inversion=lost),)).as_json()
    )
    (row,) = again.rows()
    assert row.inversion is not None
    assert math.isnan(row.inversion.error_max)
    assert TableRecord.from_json(record.as_json()) == record


def test_table1_goes_on_where_it_was(
    table1: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*TABLE1, "--out", str(tmp_path / "out"), "--quiet"]
    steps: list[float] = []

    def cut(self: LiveProgress, done: float, loss: float) -> None:
        steps.append(done)
        if len(steps) == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LiveProgress, "step", cut)
        assert main(arguments) == 130
    assert main([*arguments, "--resume"]) == 0
    first, second = (
        json.loads((folder / "results.json").read_text())["outcomes"]
        for folder in (table1[0], tmp_path / "out")
    )
    for one, other in zip(first, second, strict=True):
        assert {**one, "train_seconds": 0} == {**other, "train_seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table1", "digit"], "unknown set of images 'digit'"),
        (["table1", "mnist", "--data-dir", "/nowhere"], "no train-images-idx3-ubyte"),
        (["table1", "--coeffs", "0.9", "1.0"], "coeffs must be in (0, 1), got 1.0"),
        (["table1", "--num-scales", "4"], "cannot be squeezed 4 times"),
        (["table1", "--steps", "0"], "'0' is not a positive integer"),
        (["table2", "mnist", "--data-dir", "/nowhere"], "no train-images-idx3-ubyte"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_another_run_is_not_resumed(
    table1: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TABLE1, "--out", str(table1[0]), "--resume", "--seed", "1"]) == 2
    assert "--seed was 0 there and is 1 now" in capsys.readouterr().err
    assert main([*TABLE1, "--out", str(table1[0])]) == 2
    assert "already holds results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("data", "num_distinct"), 7, "the data have changed since"),
        (("environment", "versions", "torch"), "1.0", "torch was 1.0 there"),
    ],
)
def test_table1_is_not_resumed_with_other_data_or_versions(
    place: tuple[str, ...],
    value: object,
    message: str,
    table1: tuple[Path, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record = part = json.loads((table1[0] / "results.json").read_text())
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    (tmp_path / "results.json").write_text(json.dumps(record))
    assert main([*TABLE1, "--out", str(tmp_path), "--resume"]) == 2
    assert message in capsys.readouterr().err


def test_table1_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table1", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == [*datasets.available_images(), *classifiers.builders(DEFAULT_COEFFS)]
    assert "certified Lip(g) <= 0.9" in "\n".join(lines)


# --- table 2 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("table2") / "out"
    return out, printed_by([*TABLE2, "--out", str(out)])


def test_published_numbers_stand_beside_the_models_of_the_papers() -> None:
    rows, images = (TABLE2_PRESET.published_beside(images=images) for images in (False, True))
    assert rows["residual-flow-plain"] == images["residual-flow"]
    assert "residual-flow" not in rows
    assert "residual-flow-plain" not in images


def test_table2_prints_what_its_json_says(table2: tuple[Path, str]) -> None:
    out, printed = table2
    data = json.loads((out / "results.json").read_text())
    assert data["command"] == "table2"
    page = (out / "report.html").read_text()
    assert "nflows-iresnet table2 digits" in page
    assert (out / "digits--bars.png").exists()
    lines = first_lines(printed)
    classes = {"made": "nflows.flows.base.Flow", "residual-flow": "residual.ResidualFlow"}
    for result in data["results"]:
        metrics, line = result["metrics"], lines[result["model"]]
        units = 64 * math.log(2)
        bits = (metrics["test_nll"] + data["datasets"][0]["log_scale"]) / units + math.log2(17)
        assert metrics["bits_per_dim"] == pytest.approx(bits)
        assert metrics["bits_per_dim_se"] == pytest.approx(metrics["test_nll_se"] / units)
        assert result["model_class"].endswith(classes[result["model"]])
        for cell in (
            f"{metrics['bits_per_dim']:.4f} ± {metrics['bits_per_dim_se']:.4f}",
            f"{result['num_parameters']:,}",
            f"{result['training']['seconds']:.1f}",
            *data["published"].get(result["model"], {"none": "-"}).values(),
        ):
            assert cell in line, (cell, line)
            assert cell in page
    assert data["published"] == TABLE2_PRESET.published_beside(images=False)
    assert data["published"]["made"] == published.BITS_PER_DIM["made"]


def test_published_numbers_are_marked_and_only_beside_images(table2: tuple[Path, str]) -> None:
    record = DensityRecord.from_json((table2[0] / "results.json").read_text())
    columns = density_columns(record, record.datasets[0])
    marked = [column for column in columns if column.title.startswith("published\n")]
    assert [column.title for column in marked] == ["published\nMNIST", "published\nCIFAR-10"]
    assert all(
        "Not measured here" in column.help and column.rank(rows_of(record, "digits")[0]) is None
        for column in marked
    )
    toy = replace(record.datasets[0], levels=None)
    assert not [c for c in density_columns(record, toy) if c.title.startswith("published")]


def test_table2_is_not_resumed_as_compare(
    table2: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TABLE2, "--out", str(table2[0]), "--resume", "--quiet"]) == 0
    other = ["compare", "digits", *TABLE2[1:], "--learning-rate", "2e-3"]
    assert main([*other, "--out", str(table2[0]), "--resume"]) == 2
    assert "the command was table2 there and is compare now" in capsys.readouterr().err


def test_a_missing_library_is_said_in_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continuous, "find_spec", lambda name: None)
    arguments = ["table2", "--models", "nice", "ffjord", "--steps", "2", "--out", str(tmp_path)]
    printed = printed_by(arguments)
    assert "ffjord FAILED" in printed
    assert "pip install '.[ffjord]' in the clone" in printed
    nice, missing = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (nice["failures"], missing["num_parameters"]) == ([], 0)


def test_quantised_rows_get_fresh_noise_of_the_same_pixels() -> None:
    config = RunConfig(("digits",), ("nice",), batch_size=2000)
    data = (task := RowTask.load("digits", config)).data
    stream = task.batches(config, 0)
    first, second = next(stream), next(stream)
    pixels = [
        ((b * data.scale + data.location) * 17).floor().sort(dim=0).values
        for b in (first, second, data.train)
    ]
    for other in pixels[1:]:
        assert (pixels[0] != other).double().mean() < 1e-4, "equal but for rounding"
    assert not torch.equal(first.sort(dim=0).values, second.sort(dim=0).values)
    noise = (first * data.scale + data.location) * 17 % 1
    assert noise.mean() == pytest.approx(0.5, abs=0.01)
    assert noise.var() == pytest.approx(1 / 12, abs=0.005)


def test_images_are_recognised_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "mnist"]) == 2
    assert "add --images" in capsys.readouterr().err


def test_help_names_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    for name, expected in (("table1", "(default: 300; mnist"), ("table2", "default: digits")):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert expected in capsys.readouterr().out


def test_every_table_row_that_stopped_early_is_named(table1: tuple[Path, str]) -> None:
    record = TableRecord.from_json((table1[0] / "results.json").read_text())
    first = replace(record.outcomes[0], stopped="patience", steps=7, best_step=3)
    stopped = replace(record, outcomes=(first, *record.outcomes[1:]))
    (line,) = set(stopped.early_stops()) - set(record.early_stops())
    assert line.endswith("stopped early, at step 7: its best validation was at step 3")
    assert "up to" in record.caption()


def test_certified_bounds_are_rounded_up_and_rates_told_apart() -> None:
    assert [bounded(x) for x in (0.7613, 0.97, 0.9700001, 13.0)] == [
        *("≤ 0.762", "≤ 0.970", "≤ 0.971", "≤ 13.000")
    ]
    assert bounded(math.inf) == "≤ inf"
    names = list(classifiers.builders([0.9999999, 0.99999999, 0.5]))
    assert names == ["resnet", "vanilla", "c=0.9999999", "c=0.99999999", "c=0.5"]


def test_validation_looks_at_rows_from_the_whole_split() -> None:
    class Kept:
        def exact_log_prob(self, rows: torch.Tensor) -> torch.Tensor:
            seen.append(rows)
            return rows.sum(dim=1)

    seen: list[torch.Tensor] = []
    data = datasets.make("moons", num_train=10, num_validation=1890, num_test=10)
    model: Any = Kept()
    RowTask(data).validate(model, RunConfig(("moons",), ("maf",)))
    (rows,) = torch.cat(seen).split(1000)
    assert torch.equal(rows[:10], data.validation[[0, 1, 3, 5, 7, 9, 11, 13, 15, 17]])
    assert torch.equal(rows[-1], data.validation[1888])
