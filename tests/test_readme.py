"""README keeps its word: its examples run, and CI runs the command that it prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_python_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_python_example_runs_alone(example: str) -> None:
    exec(example, {"__name__": "__main__"})


def test_the_first_two_commands_run_the_main_job_and_the_tests() -> None:
    commands = re.findall(r"```\n(python3 -m venv .*?)\n```", README)
    assert len(commands) == 2
    assert commands[0].endswith("nflows-iresnet compare")
    assert "pytest" in commands[1]


def test_ci_takes_its_command_from_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("not a checkout")
    assert "grep -m1" in script.read_text()
