"""The list of planted faults: every one is where it says, and the command tells dead from alive."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.planted import __main__ as command
from tests.planted.fault import ROOT, Fault, LostFaultError
from tests.planted.faults import FAULTS


@pytest.mark.parametrize("file", sorted({fault.file for fault in FAULTS}))
def test_every_fault_is_found_once_and_leaves_a_program(file: str) -> None:
    text = (ROOT / "nflows_iresnet" / file).read_text()
    for fault in FAULTS:
        if fault.file == file:
            changed = fault.planted_in(text)
            assert changed != text, fault.name
            ast.parse(changed)


def test_faults_have_names_of_their_own_and_tests_that_there_are() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert fault.test_files, fault.name
        for test in fault.test_files:
            file, _, name = test.partition("::")
            assert (ROOT / file).is_file(), f"{fault.name}: {test}"
            definition = rf"^def {re.escape(name.partition('[')[0])}\("
            source = (ROOT / file).read_text()
            assert not name or re.search(definition, source, re.MULTILINE), f"{fault.name}: {test}"


def test_a_text_that_is_gone_or_not_unique_is_an_error() -> None:
    fault = Fault("nothing", "flows/base.py", "one", "two", "flows")
    assert fault.planted_in("one more") == "two more"
    for text in ("", "one and one"):
        with pytest.raises(LostFaultError, match="instead of once"):
            fault.planted_in(text)


HALF = Fault("half", "half.py", "x / 2", "x / 3", "half")
WHOLE = Fault("whole", "half.py", "# exactly", "# about", "half")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of one line, with one test."""
    (tmp_path / "nflows_iresnet").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "nflows_iresnet" / "__init__.py").touch()
    (tmp_path / "nflows_iresnet" / "half.py").write_text(
        "def half(x):  # exactly\n    return x / 2\n"
    )
    (tmp_path / "tests" / "test_half.py").write_text(
        "from nflows_iresnet.half import half\ndef test_half(): assert half(4) == 2\n"
    )
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(command, "COPIED", ("nflows_iresnet", "tests"))
    monkeypatch.setattr(command, "PLUGINS", ())
    monkeypatch.setattr(command, "FAULTS", (HALF, WHOLE))
    return tmp_path


def test_a_fault_that_no_test_sees_lives_and_the_tree_stays_as_it_was(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (tree / "nflows_iresnet" / "half.py").read_text()
    assert command.main(["--jobs", "2"]) == 1
    said = capsys.readouterr().out
    assert "1 killed, 1 lives, 0 broken" in said
    assert "lives: half.py: whole" in said
    assert "tests/test_half.py::test_half" in said
    assert command.main(["--only", "half", "--sample"]) == 0
    assert (tree / "nflows_iresnet" / "half.py").read_text() == before


def test_a_test_that_is_red_without_a_fault_kills_none(tree: Path) -> None:
    (tree / "tests" / "test_half.py").write_text("def test_half(): assert False\n")
    assert command.main([]) == 2


def test_a_fault_that_is_lost_breaks_the_list(tree: Path) -> None:
    (tree / "nflows_iresnet" / "half.py").write_text("def half(x):\n    return x * 0.5\n")
    assert command.main(["--only", "whole"]) == 2


def test_the_list_is_shown_and_a_name_that_is_in_none_is_named(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--list"]) == 0
    assert "half.py: whole" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="nowhere"):
        command.main(["--only", "nowhere"])
