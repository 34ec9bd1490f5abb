"""The manners of `nflows-iresnet bench`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from nflows_iresnet.compare.bench import catalogue
from nflows_iresnet.compare.bench.contestants import CONTESTANTS, Size
from nflows_iresnet.compare.bench.items import BASELINE, FLOOR, OURS, Item, Settings
from nflows_iresnet.compare.bench.steps import TRIO, step_case
from nflows_iresnet.compare.cli import main

pytest.importorskip("matplotlib")
pytest.importorskip("rich")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two items that take no time."""
    step = Item(
        "small steps",
        lambda settings: [step_case(Size(2, 4), batch, TRIO) for batch in (4, 8)],
        targets=catalogue.ITEMS["step-dimension"].targets,
        variable="B",
    )
    monkeypatch.setitem(catalogue.ITEMS, "tiny", step)


def run(out: Path, *arguments: str) -> dict[str, Any]:
    assert main(["bench", "--quick", *arguments, "--out", str(out)]) == 0
    content: dict[str, Any] = json.loads((out / "bench.json").read_text())
    return content


@pytest.mark.usefixtures("tiny")
def test_what_is_written_can_be_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = run(tmp_path, "--only", "tiny", "--repeats", "3", "--seed", "5")
    assert content["arguments"]["items"] == ["tiny"]
    assert content["arguments"]["seed"] == 5
    assert content["environment"]["versions"]["torch"]
    assert [result["parameters"]["B"] for result in content["results"]] == [4, 8]
    for result in content["results"]:
        cells = {cell["contestant"]: cell for cell in result["cells"]}
        assert list(cells) == [OURS, BASELINE, FLOOR]
        for cell in cells.values():
            assert len(cell["seconds"]) == len(cell["cpu_seconds"]) == 3
            for clock, key in (("seconds", "wall_ratio"), ("cpu_seconds", "cpu_ratio")):
                pairs = zip(cells[BASELINE][clock], cell[clock], strict=True)
                expected = statistics.median(above / below for above, below in pairs)
                assert cell[key]["median"] == pytest.approx(expected)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("small steps", "normflows", "promised", "bench.json"))


@pytest.mark.usefixtures("tiny")
def test_targets_in_the_file_are_those_of_the_samples(tmp_path: Path) -> None:
    content = run(tmp_path, "--only", "tiny", "--repeats", "3")
    faster = [target for target in content["targets"] if "d = 2" in target["target"]]
    assert len(faster) == 2
    for target, result in zip(faster, content["results"], strict=True):
        ours = next(cell for cell in result["cells"] if cell["contestant"] == OURS)
        assert target["measured"] == pytest.approx(ours["cpu_ratio"]["median"])
        assert target["is_met"] == (target["measured"] >= target["bound"])


@pytest.mark.usefixtures("tiny")
def test_scaling_is_fitted_and_drawn(tmp_path: Path) -> None:
    content = run(tmp_path, "--only", "tiny", "--repeats", "1")
    assert {fit["contestant"] for fit in content["fits"]} == set(TRIO)
    assert all(len(fit["points"]) == 2 for fit in content["fits"])
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny")
def test_a_contestant_that_fails_is_a_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = CONTESTANTS[FLOOR].build(Size(3, 4))
    monkeypatch.setitem(CONTESTANTS, FLOOR, type(CONTESTANTS[FLOOR])("broken", lambda size: broken))
    content = run(tmp_path, "--only", "tiny", "--repeats", "2")
    cell = content["results"][0]["cells"][-1]
    assert cell["seconds"] == []
    assert "RuntimeError" in cell["note"]
    assert "RuntimeError" in capsys.readouterr().out
    assert content["results"][0]["cells"][0]["wall_ratio"] is not None


def test_the_real_items_run(tmp_path: Path) -> None:
    content = run(tmp_path, "--only", "likelihood", "inverse-scaling", "--repeats", "1")
    found = {result["item"] for result in content["results"]}
    assert found == {"likelihood", "inverse-scaling"}
    law = {fit["contestant"]: fit["law"]["exponent"] for fit in content["fits"]}
    assert law["ours-picard"] == pytest.approx(1.1, abs=0.15)


def test_quality_trains_both_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nflows_iresnet.compare.bench.quality.HIDDEN", {"two-spirals": 8})
    monkeypatch.setattr("nflows_iresnet.compare.bench.quality.TEST_ROWS", 50)
    content = run(tmp_path, "--only", "quality", "--seconds", "0.2")
    (result,) = content["results"]
    assert [cell["contestant"] for cell in result["cells"]] == [OURS, BASELINE]
    for cell in result["cells"]:
        assert len(cell["raw"]["seconds"]) == len(cell["raw"]["nll"]) == 17
        assert cell["raw"]["seconds"][-1] >= 0.2
        assert cell["figures"]["nll"] == min(cell["raw"]["nll"])
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_that_fails_in_training_leaves_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nflows_iresnet.compare.bench.quality.HIDDEN", {"two-spirals": 8})
    monkeypatch.setattr("nflows_iresnet.compare.bench.quality.TEST_ROWS", 50)
    broken = CONTESTANTS[BASELINE].build(Size(3, 4))
    monkeypatch.setitem(
        CONTESTANTS, BASELINE, type(CONTESTANTS[BASELINE])("broken", lambda size: broken)
    )
    (result,) = run(tmp_path, "--only", "quality", "--seconds", "0.1")["results"]
    ours, failed = result["cells"]
    assert len(ours["raw"]["nll"]) == 17
    assert failed["raw"] == {"seconds": [], "nll": []}
    assert "RuntimeError" in failed["note"]


@pytest.mark.usefixtures("tiny")
def test_interruption_keeps_what_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    item = catalogue.ITEMS["tiny"]
    endless = Item("stops", item.cases, measure=interrupt)  # type: ignore[arg-type]
    monkeypatch.setitem(catalogue.ITEMS, "endless", endless)
    out = ["--out", str(tmp_path)]
    assert main(["bench", "--only", "tiny", "endless", "--repeats", "1", *out]) == 130
    assert str(tmp_path) in capsys.readouterr().err
    assert len(json.loads((tmp_path / "bench.json").read_text())["results"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "step-dimensoin"], "did you mean 'step-dimension'"),
        (["--only", "zzz"], "choose from"),
        (["--only"], "--only"),
        (["--repeats", "0"], "'0' is not a positive integer"),
        (["--seconds", "-1"], "'-1' is not a positive number"),
        (["--threads", "many"], "'many' is not a positive integer"),
        (["--device", "tpu"], "'tpu'"),
        (["--unknown"], "--unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.strip().splitlines()) == 1
    assert message in printed.err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("tiny")
def test_folder_that_holds_results_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--only", "tiny", "--repeats", "1", "--quiet")
    assert main(["bench", "--only", "tiny", "--out", str(tmp_path)]) == 2
    assert "already holds results" in capsys.readouterr().err


def test_list_and_help_name_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*catalogue.ITEMS, *CONTESTANTS))
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--help"])
    assert stop.value.code == 0
    helped = capsys.readouterr().out
    assert all(name in helped for name in (*catalogue.ITEMS, "cpu ratio", "--quality"))


@pytest.mark.parametrize("name", catalogue.ITEMS)
def test_quick_is_no_more_than_everything(name: str) -> None:
    item = catalogue.ITEMS[name]
    quick, full = (item.cases(Settings(quick=flag)) for flag in (True, False))
    assert 0 < len(quick) <= len(full)
    assert len({case.label for case in full}) == len(full)
    assert all(item.variable in case.parameters for case in full if item.variable is not None)


def test_what_runs_by_default() -> None:
    optional = ["step-compiled", "quality"]
    assert not set(optional) & set(catalogue.chosen_items(None))
    assert list(catalogue.chosen_items(None, optional)) == list(catalogue.ITEMS)
    assert list(catalogue.chosen_items(["memory", "memory"], ["quality"])) == ["memory", "quality"]
