"""Tables and reports: one list of columns, all that was found, and nothing that is not escaped."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from nflows_iresnet.datasets.tables import COMPARABLE
from nflows_iresnet.experiments import evaluation, tables
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.evaluation import Metrics
from nflows_iresnet.experiments.folder import Folder
from nflows_iresnet.experiments.record import DatasetSummary, Record, Result, Trial
from nflows_iresnet.experiments.report import (
    Page,
    Section,
    command_of,
    render,
    render_race,
)
from nflows_iresnet.experiments.tables import (
    Column,
    Row,
    columns_for,
    in_bits,
    number,
    print_table,
    rows_of,
)
from nflows_iresnet.training import CurvePoint, History

ENVIRONMENT: dict[str, Any] = {
    "device": "cpu",
    "device_name": "a <fast> one",
    "versions": {"torch": "2", "nflows-iresnet": "1"},
}
LOG = History(7, 2.0, 3.0, 5, 1.0, (CurvePoint(5, 1.0, 1.0, 1.0),), stopped="patience")


def result_of(model: str, repeat: int = 0, **metrics: Any) -> Result:
    found = Metrics(**{"test_nll": 1.0, "test_nll_se": 0.1, **metrics})
    return Result("a", model, repeat, repeat, {}, 1234, (), LOG, found, learning_rate=0.01)


def record_of(kind: str, *results: Result, **summary: Any) -> Record:
    about = {"name": "a", "notes": (), "levels": None, "shape": None, **summary}
    data = DatasetSummary(
        about["name"], "file", 8, 8, 1, 1, None, None, 0.0, about["levels"], about["notes"],
        about["shape"],
    )  # fmt: skip
    arguments: dict[str, Any] = {"datasets": [about["name"]], "race": None, "models": ["one"]}
    arguments |= {"steps": 5, "budget": None, "seed": 0, "threads": 1, "batch_size": 2}
    arguments |= {"repeats": 1, "race": 2.0 if kind == "race" else None}
    return Record(
        arguments,
        ENVIRONMENT,
        "today",
        (data,),
        tuple(replace(each, dataset=about["name"]) for each in results),
        command="table2" if kind == "table2" else "compare",
        published={"one": {"MNIST": "0.99†"}} if kind == "table2" else {},
    )


def printed(record: Record, folder: Path) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    print_table(console, record, Folder(folder), record.datasets[0])
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["compare", "race", "table2"])
@pytest.mark.parametrize("images", [False, True], ids=["rows", "images"])
def test_a_column_put_into_the_list_is_in_every_table(
    kind: str, images: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one line: in the terminal, in report.html with its explanation, and in race.md."""
    mine: Column[Row] = Column(
        "twice\nthe NLL",
        "Two times <what> it is.",
        lambda row: f"{2 * (row.metrics.test_nll or 0):.2f}",
    )
    monkeypatch.setattr(tables, "COLUMNS", (*tables.COLUMNS, mine))
    record = record_of(kind, result_of("one", test_nll=4.56), shape=(1, 2, 4) if images else None)
    terminal = printed(record, tmp_path)
    assert "the NLL" in terminal
    assert "9.12" in terminal
    page = render(record, Folder(tmp_path))
    assert "<th>twice<br>the NLL</th>" in page
    assert "<td>9.12</td>" in page
    assert "<dt>twice the NLL</dt><dd>Two times &lt;what&gt; it is.</dd>" in page
    race = render_race(replace(record, arguments={**record.arguments, "race": 2.0}))
    assert "twice the NLL |" in race
    assert "9.12 |" in race


def names(kind: str, **summary: Any) -> list[str]:
    record = record_of(kind, result_of("one"), result_of("one", 1), **summary)
    return [column.name for column in columns_for(record, record.datasets[0])]


_NLL = ["test NLL (nats)", "± over repeats"]
_COST = ["parameters", "ms per step", "sample 10,000 (s)", "round trip max (median)", "memory (MB)"]
_OF_IMAGES = ["sample 256 (s)" if name == "sample 10,000 (s)" else name for name in _COST]
_LISTED: dict[tuple[str, bool, bool], list[str]] = {
    ("compare", False, False): ["model", *_NLL, *_COST, "Lipschitz bound"],
    ("compare", True, True): [
        *("model", "bits per dim", *_NLL, *_OF_IMAGES, "estimate - exact", "Lipschitz bound")
    ],
    ("race", False, False): [
        *("model", "test NLL (nats)", "seeds", "steps", "best at step", "parameters"),
        *("ms per step", "training (s)", "learning rate"),
    ],
    ("table2", True, False): [
        *("model", "bits per dim", "± over repeats", "parameters", "training (s)"),
        *("sample 10,000 (s)", "Lipschitz bound", "published MNIST"),
    ],
    ("table2", False, False): [
        *("model", *_NLL, "parameters", "training (s)", "sample 10,000 (s)", "Lipschitz bound")
    ],
}


@pytest.mark.parametrize(("kind", "quantised", "images"), list(_LISTED))
def test_every_kind_of_table_has_its_columns(kind: str, quantised: bool, images: bool) -> None:
    """Those that are listed here, in this order; more may be added between them."""
    found = names(kind, shape=(1, 2, 4) if images else None, levels=16 if quantised else None)
    listed = set().union(*_LISTED.values())
    assert [name for name in found if name in listed] == _LISTED[kind, quantised, images]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (lambda row: f"{row.metrics.kurtosis}", "no attribute 'kurtosis'"),
        (lambda row: f"{row.metrics.test_nll:.2f}", "unsupported format string"),
    ],
    ids=["unknown", "not for None"],
)
def test_a_column_that_cannot_be_shown_is_refused_before_anything_is_trained(
    text: Any,
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mine: Column[Row] = Column("the\nkurtosis", "Of the samples.", text)
    monkeypatch.setattr(tables, "COLUMNS", (*tables.COLUMNS, mine))
    out = tmp_path / "out"
    assert main(["compare", "moons", "--models", "nice", "--out", str(out), "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "column 'the kurtosis' of experiments/tables.py" in line
    assert problem in line
    assert "fields of Row, and of Metrics in experiments/evaluation.py" in line
    assert not out.exists()


def test_a_measurement_without_a_field_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"mine": lambda model, data: {"kurtosis": 3.0}}
    right = {"right": lambda model, data: {"lipschitz": 0.5, "kept": np.zeros(2)}}
    monkeypatch.setattr(evaluation, "_MEASUREMENTS", {**wrong, **right})
    model: Any = torch.nn.Identity()
    data: Any = None
    found = evaluation.evaluate(model, data, 0)
    (failure,) = found.failures
    assert re.match("mine: TypeError: .* unexpected keyword argument 'kurtosis'", failure)
    assert (found.metrics, list(found.arrays)) == (Metrics(lipschitz=0.5), ["kept"])


def test_errors_over_seeds_are_those_of_the_unit(tmp_path: Path) -> None:
    nats = 8 * math.log(2)
    found = [
        result_of("one", k, test_nll=nats * bits, bits_per_dim=bits, bits_per_dim_se=0.5)
        for k, bits in enumerate([3.0, 3.2])
    ]
    race = render_race(record_of("race", *found, levels=16))
    assert "| one | 3.1000 ± 0.1000 | 17.190 ± 0.555 | 2 |" in race
    for kind, levels, shown in (("table2", 16, "0.1000"), ("table2", None, "0.555")):
        record = record_of(kind, *found, levels=levels)
        (column,) = [
            each
            for each in columns_for(record, record.datasets[0])
            if each.name == "± over repeats"
        ]
        assert column.text(rows_of(record, "a")[0]) == shown


def test_rates_that_were_tried_are_shown_everywhere(tmp_path: Path) -> None:
    trials = tuple(Trial("a", "one", rate, nll, 7, 2.0) for rate, nll in ((0.1, 3.0), (0.01, 2.0)))
    record = replace(record_of("compare", result_of("one")), trials=trials)
    assert "learning rate" in [each.name for each in columns_for(record, record.datasets[0])]
    for text in (printed(record, tmp_path), render(record, Folder(tmp_path))):
        assert "Validation NLL by learning rate, with the first seed (4 s in all" in text
        assert "- one: 0.01: 2.000, 0.1: 3.000" in text


def test_what_deserves_care_is_said_everywhere(tmp_path: Path) -> None:
    note = "column [x] is 0 in 80% of the rows: its density is unbounded there"
    record = record_of("race", result_of("one"), notes=(note,))
    assert note in printed(record, tmp_path)
    for text in (render_race(record), render(record, Folder(tmp_path))):
        assert f"{note.capitalize().replace('[X]', '[x]')}." in text
    assert "quantised" not in render(record, Folder(tmp_path))
    assert "quantised" in render(replace(record_of("race", levels=16)), Folder(tmp_path))


def test_one_test_row_says_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.create()
    for model, nll in (("one", 1.0), ("two", 2.0)):
        folder.save_arrays(("a", model, 0), {"test_log_prob": -np.array([nll])})
    record = record_of("compare", result_of("one"), result_of("two", test_nll=2.0))
    assert tables.verdict(record, folder, "a") == (
        "one is best on the one test row, which says nothing of others."
    )


def saved(folder: Path, *leads: tuple[str, float]) -> Folder:
    place = Folder(folder)
    place.create()
    for model, lead in leads:
        rows = lead + np.linspace(-0.01, 0.01, 50)
        place.save_arrays(("a", model, 0), {"test_log_prob": rows})
    return place


def test_the_verdict_is_in_the_unit_of_the_table(tmp_path: Path) -> None:
    place = saved(tmp_path, ("one", 8 * math.log(2)), ("two", 0.0))
    results = result_of("one", test_nll=1.0), result_of("two", test_nll=1 + 8 * math.log(2))
    for kind, levels, expected in (
        ("table2", 16, "ahead of two by 1.0000 ± 0.0000 bits per dimension on"),
        ("table2", None, "ahead of two by 5.545 ± 0.000 nats on"),
        ("compare", 16, "ahead of two by 5.545 ± 0.000 nats on"),
    ):
        record = record_of(kind, *results, levels=levels)
        assert expected in tables.verdict(record, place, "a")
        assert in_bits(record, record.datasets[0]) == ("bits" in expected)
        names = [column.name for column in columns_for(record, record.datasets[0])]
        assert ("test NLL (nats)" in names) == ("nats" in expected)


def test_who_diverged_is_not_compared(tmp_path: Path) -> None:
    place = saved(tmp_path, ("one", 0.0), ("two", -2e11))
    sound, bad, worse = (result_of(*each) for each in (("one",), ("two",), ("three",)))
    bad, worse = (replace(r, metrics=Metrics(test_nll=v)) for r, v in ((bad, 2e11), (worse, 3e12)))
    said = tables.verdict(record_of("compare", sound, bad), place, "a")
    assert said == "one is best: all others diverged, two at 2.000e+11 nats."
    said = tables.verdict(record_of("compare", bad, worse), place, "a")
    assert said == "No model is best, for all diverged: two has 2.000e+11 nats."


def test_numbers_are_shown_as_far_as_they_say_something() -> None:
    assert number(117914910180.166, error=582433601.238) == "1.179e+11 ± 5.824e+08"
    assert number(-1234.5) == "-1234.500"
    assert number(2e6, ".0f") == "2000000"
    record = record_of(
        "compare",
        result_of("one", exact_gap=0.00022, exact_gap_se=0.00025, exact_rows=8),
        result_of("two", exact_gap=0.5, exact_gap_se=0.1, exact_rows=8),
        shape=(1, 2, 4),
    )
    data = record.datasets[0]
    (gap,) = (each for each in columns_for(record, data) if each.name == "estimate - exact")
    shown = {row.model: gap.text(row) for row in rows_of(record, "a")}
    assert shown == {"one": "0.00022 ± 0.00025\nof 8", "two": "0.500 ± 0.100\nof 8"}


def test_settings_that_were_not_used_are_not_on_the_page(tmp_path: Path) -> None:
    record = record_of("race", result_of("one"))
    for rates in ([], [0.25]):
        arguments = {**record.arguments, "learning_rate": 0.125, "learning_rates": rates}
        page = render(replace(record, arguments=arguments), Folder(tmp_path))
        assert ("0.125" in page) == (not rates)
        assert ("0.25" in page) == bool(rates)


def test_a_round_trip_is_in_the_units_of_the_model() -> None:
    record = record_of("compare", result_of("one"))
    found = {each.name: each.help for each in columns_for(record, record.datasets[0])}
    assert "of tables standard deviations" in found["round trip max (median)"]


def test_a_bound_and_a_guarantee_hold_for_all_repeats() -> None:
    """One repeat has the larger constant, and another is not certified."""
    found = [
        result_of("one", 0, lipschitz=0.9, lipschitz_certified=True, round_trip_max=1e-3),
        result_of("one", 1, lipschitz=0.5, lipschitz_certified=True, round_trip_max=1e-6),
        result_of("one", 2, lipschitz=0.6, lipschitz_certified=True, round_trip_max=1e-6),
    ]
    (row,) = rows_of(record_of("compare", *found), "a")
    assert (row.metrics.lipschitz, row.metrics.round_trip_max) == (0.9, 1e-3)
    assert row.metrics.lipschitz_certified
    found[1] = result_of("one", 1, lipschitz=0.5, lipschitz_certified=False, test_nll_exact=False)
    (row,) = rows_of(record_of("compare", *found), "a")
    assert not row.metrics.lipschitz_certified


def test_numbers_of_repeats_are_joined_as_their_kind_wants() -> None:
    found = [
        result_of("one", k, test_nll=nll, sample_seconds=s, peak_memory_mb=None, exact_rows=8)
        for k, (nll, s) in enumerate([(1.0, 1.0), (2.0, 2.0), (6.0, 100.0)])
    ]
    (row,) = rows_of(record_of("compare", *found), "a")
    assert row.metrics.test_nll == 3.0
    assert row.repeats_se == pytest.approx(7**0.5 / 3**0.5)
    assert row.metrics.sample_seconds == 2.0
    assert row.metrics.peak_memory_mb is None
    assert (row.repeats, row.num_parameters, row.steps, row.best_step) == (3, 1234, 7, 5)
    assert (row.seconds, row.ms_per_step, row.learning_rate) == (2.0, 3.0, 0.01)
    (alone,) = rows_of(record_of("compare", found[0]), "a")
    assert alone.repeats_se is None
    assert rows_of(record_of("compare"), "a") == []


def test_runs_that_were_not_trained_are_rows_too() -> None:
    failed = replace(result_of("two"), training=None, failures=("no <memory>",), metrics=Metrics())
    rows = rows_of(record_of("compare", failed, result_of("one")), "a")
    assert [(row.model, row.metrics.test_nll, row.steps) for row in rows] == [
        ("one", 1.0, 7),
        ("two", None, None),
    ]
    (alone,) = rows_of(record_of("compare", failed), "a")
    assert alone.failures == ("no <memory>",)


# --- the page -------------------------------------------------------------------------------------


def test_names_and_messages_are_escaped(tmp_path: Path) -> None:
    name = '<img src=x onerror="alert(1)">&'
    failed = replace(result_of("two"), failures=("<b>nan</b>",), metrics=Metrics())
    page = render(record_of("compare", result_of("one"), failed, name=name), Folder(tmp_path))
    assert "<img src=x" not in page
    assert "<b>" not in page
    assert "<fast>" not in page
    assert page.count("&lt;img src=x onerror=&#34;alert(1)&#34;&gt;&amp;") >= 4
    assert "two failed: &lt;b&gt;nan&lt;/b&gt;" in page


def test_the_page_says_all_that_is_known(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.picture("a", "race").write_bytes(b"picture")
    record = record_of("race", result_of("one"), result_of("two", test_nll=2.0))
    page = render(record, folder)
    for text in (
        "2 CPU-seconds of training per model",
        "one stopped early, at step 7: its best validation was at step 5",
        "one is best; by how much, its arrays would say",
        '<img alt="a race" src="data:image/png;base64,cGljdHVyZQ==">',
        "<td class=best>1.000</td>",
        "<dt>learning rate</dt>",
        "<pre>nflows-iresnet compare a --race 2.0 --models one --steps 5",
        "<td>batch_size</td><td>2</td>",
        "<td>torch</td><td>2</td>",
        "Every number and curve of this page is in <code>results.json</code>",
    ):
        assert text in page, text
    assert "http" not in page


def test_published_numbers_stand_only_beside_the_published_rows(tmp_path: Path) -> None:
    def page(name: str, *notes: str) -> str:
        return render(
            record_of("compare", result_of("one"), name=name, notes=notes), Folder(tmp_path)
        )

    for text in ("RQ-NSF, autoregressive", "-13.09 ± 0.02", "not measured here"):
        assert text in page("gas", COMPARABLE)
    assert "RQ-NSF" not in page("gas"), "somebody's own gas.csv"
    assert "RQ-NSF" not in page("casp", COMPARABLE)


def test_one_template_renders_the_page_of_any_command() -> None:
    column: Column[Row] = Column("model", "Its <name>.", lambda row: row.model)
    section = Section("Part", tables=[([column], [], "above")], pictures=[("p", b"", "below")])
    run: dict[str, Any] = {"started": "today", "environment": ENVIRONMENT}
    run["arguments"] = {"seed": None, "list": [1, 2], "word": "as it is"}
    page = Page("Mine", "Mine & yours", [section], run, "run <this>", numbers="mine.json").render()
    for text in ("<title>Mine</title>", "Mine &amp; yours", "run &lt;this&gt;"):
        assert text in page
    assert "<figcaption>below</figcaption>" in page
    assert "<td>list</td><td>1, 2</td>" in page
    assert "<td>word</td><td>as it is</td>" in page
    assert "seed" not in page
    assert "How to read it" not in page


def test_a_command_line_can_be_pasted() -> None:
    options: dict[str, Any] = {"jobs": 2, "race": None, "images": True, "amp": False}
    options |= {"rates": [], "models": ["a b"]}
    line = command_of("compare", ["my file.csv"], options)
    assert line == "nflows-iresnet compare 'my file.csv' --jobs 2 --images --models 'a b'"
