"""`nflows-iresnet table1` and `table2`, and the classifiers behind the first."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nflows_iresnet import nn
from nflows_iresnet.classifiers import InvertibleClassifier
from nflows_iresnet.compare import continuous, published
from nflows_iresnet.compare.cli import main
from nflows_iresnet.compare.columns import columns_for as density_columns
from nflows_iresnet.compare.config import RunConfig
from nflows_iresnet.compare.progress import LiveProgress
from nflows_iresnet.compare.results import Record as DensityRecord
from nflows_iresnet.compare.summary import rows_of
from nflows_iresnet.compare.table1 import models, work
from nflows_iresnet.compare.table1.inversion import Inversion, invert
from nflows_iresnet.compare.table1.record import DataSummary, Outcome, Record
from nflows_iresnet.compare.table1.settings import Settings
from nflows_iresnet.compare.table1.table import columns_for
from nflows_iresnet.compare.tasks import RowTask
from nflows_iresnet.solvers import FixedPointNotConverged

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

IMAGES = torch.randint(0, 17, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
SIZE = models.Size((1, 8, 8), 10, 17, Settings(num_blocks=2, hidden_channels=8, padding=1))
TINY = ["--steps", "3", "--repeats", "2", "--num-blocks", "1", "--hidden-channels", "8"]
TABLE1 = ["table1", "--coeffs", "0.9", "0.5", *TINY, "--num-train", "64", "--padding", "1"]
TABLE2 = ["table2", "--models", "made", "residual-flow", "--steps", "3", "--num-layers", "1"]


def classifier(**options: Any) -> Any:
    torch.manual_seed(0)
    built = InvertibleClassifier((1, 8, 8), 10, 8, num_blocks=2, padding=1, levels=17, **options)
    built(IMAGES)
    return built.eval()


# --- the classifier -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_scales", [1, 2])
def test_features_turn_back_into_images(num_scales: int) -> None:
    model = classifier(coeff=0.7, num_scales=num_scales)
    features = model.encode(IMAGES)
    side = 8 // 2**num_scales
    assert features.shape == (6, 2 * 4**num_scales, side, side)
    assert model(IMAGES).shape == (6, 10)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(features), IMAGES.float(), atol=1e-3, rtol=0)
    bound = model.lipschitz_bound()
    assert bound is not None
    assert 0.5 < bound <= 0.7
    assert model.has_guaranteed_inverse()


def test_every_parameter_learns() -> None:
    model = classifier().train()
    model(IMAGES)[:, 0].sum().backward()
    assert all(each.grad is not None for each in model.parameters())
    assert not any(bool(each.grad.isnan().any()) for each in model.parameters())


def test_images_that_cannot_be_squeezed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) cannot be squeezed 4 times"):
        InvertibleClassifier((1, 8, 8), 10, 8, num_scales=4)


# --- the certificate ------------------------------------------------------------------------------


def outcome_of(model: Any) -> Outcome:
    return Outcome(
        *("tested", 0, "class", 1),
        num_test=1,
        lipschitz_bound=model.lipschitz_bound(),
        inversion=invert(model, IMAGES.float()),
    )


def row_of(*outcomes: Outcome) -> dict[str, str]:
    """Return the cells that a model gets."""
    data = DataSummary("tested", "", "", (1, 8, 8), 17, 10, 1, 1, 1)
    record = Record({"repeats": 1, "steps": 1}, {}, "", data, {}, tuple(outcomes))
    (row,) = record.rows()
    return {column.title: column.text(row) for column in columns_for(record)}


class Tampered(nn.SymbolNorm):
    """A norm that claims a tenth of the truth."""

    def value_and_gradient(
        self, weight: torch.Tensor, state: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        value, gradient = super().value_and_gradient(weight, state)
        return value / 10, gradient / 10


def test_a_false_norm_changes_the_certificate_and_the_guarantee() -> None:
    honest = row_of(outcome_of(classifier(coeff=0.9)))
    assert honest["guaranteed\ninverse"] == "yes"
    model = classifier(coeff=0.9)
    for layer in model.blocks[1].net.layers:
        layer.norm = Tampered()
    row = row_of(outcome_of(model))
    assert row["guaranteed\ninverse"] == "no"
    assert row["certified\nbound"] != honest["certified\nbound"]
    assert float(row["certified\nbound"].removeprefix("≤ ")) > 1


def test_power_iteration_without_iterations_guarantees_nothing() -> None:
    norm = nn.ConvPowerIteration((4, 4), num_initial_steps=0)
    model = classifier(coeff=0.9, norm=norm)
    assert row_of(outcome_of(model))["guaranteed\ninverse"] == "no"


def test_scaled_weights_of_a_free_branch_change_the_bound() -> None:
    model: Any = models.vanilla(SIZE)
    model(IMAGES)
    model.eval()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (0, 2, 4):
                block.net[layer].weight.mul_(0.1)
    assert row_of(outcome_of(model))["guaranteed\ninverse"] == "yes"
    with torch.no_grad():
        model.blocks[1].net[4].weight.mul_(1e4)
    row = row_of(outcome_of(model))
    assert row["guaranteed\ninverse"] == "no"
    assert row["inverse\nfound"] == "0 of 6"
    with pytest.raises(FixedPointNotConverged):
        model.decode(model.encode(IMAGES))


def test_the_worst_repeat_decides() -> None:
    good = Outcome("m", 0, "", 1, num_test=1, lipschitz_bound=0.5)
    for bound in (1.0, None):
        row = row_of(good, replace(good, repeat=1, lipschitz_bound=bound))
        assert row["guaranteed\ninverse"] == "no"
    assert row_of(good, replace(good, repeat=1))["guaranteed\ninverse"] == "yes"


def test_inversion_finds_what_decode_finds() -> None:
    model = classifier(coeff=0.8)
    found = invert(model, IMAGES.float(), rows=4)
    assert (found.num_images, found.num_failed) == (6, 0)
    assert found.error_median <= found.error_max < 1e-3
    assert 0 < found.residual_max < 1e-4


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
    record = Record.from_json((table1[0] / "results.json").read_text())
    lost = Inversion(6, 6, math.inf, math.nan, 1.0)
    again = Record.from_json(
        replace(record, outcomes=(replace(record.outcomes[1], inversion=lost),)).as_json()
    )
    (row,) = again.rows()
    assert row.inversion is not None
    assert math.isnan(row.inversion.error_max)
    assert Record.from_json(record.as_json()) == record


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
        (["table1", "--resume"], "--resume needs the --out folder"),
        (["table1", "--steps", "0"], "'0' is not a positive integer"),
        (["table2", "--models", "mode"], "did you mean 'made'"),
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


def test_a_classifier_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*arguments: Any) -> None:
        raise ArithmeticError("it exploded")

    monkeypatch.setattr(work, "train", explode)
    from nflows_iresnet.datasets import load_images

    data, settings = load_images("digits", num_train=32), SIZE.settings
    (row,) = models.contestants([0.9])[2:]
    outcome = work.execute(row, 0, data, settings, lambda done, loss: None)
    assert outcome.failure == "ArithmeticError: it exploded"
    assert row_of(outcome)["guaranteed\ninverse"] == "no"


# --- table 2 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("table2") / "out"
    return out, printed_by([*TABLE2, "--out", str(out)])


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
            *published.BITS_PER_DIM[result["model"]].values(),
        ):
            assert cell in line, (cell, line)
            assert cell in page
    assert data["published"] == published.BITS_PER_DIM


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
    assert "pip install 'nflows-iresnet[ffjord]'" in printed
    nice, missing = json.loads((tmp_path / "results.json").read_text())["results"]
    assert (nice["failures"], missing["num_parameters"]) == ([], 0)


def test_quantised_rows_get_fresh_noise_of_the_same_pixels() -> None:
    config = RunConfig(("digits",), ("nice",), batch_size=2000)
    data = (task := RowTask.load("digits", config)).data
    stream = task.stream(config, 0)
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
    for name, expected in (("table1", "(default: 300)"), ("table2", "default: digits")):
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert expected in capsys.readouterr().out
