"""What the package says that it works with, and what it does not need."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / ".ci" / "constraints-oldest.txt"

WITHOUT = """
import torch
removed = {removed!r}
for name in removed:
    delattr(torch, name)
import nflows_iresnet
from nflows_iresnet import ResidualFlow, transforms
flow = ResidualFlow(2, 8, 2)
flow.log_prob(torch.randn(4, 2)).sum().backward()
assert flow.eval().sample(3).isfinite().all()
linear = transforms.LinearTransform(2, initialization="whitening")
outputs, _ = linear(torch.randn(20, 2))
linear.eval().inverse(outputs)[0].sum().backward()
"""

REMOVED_BY_TORCH_SOME_DAY = ["triangular_solve", "svd", "qr", "chain_matmul", "cholesky"]


@pytest.mark.parametrize("tf32", ["highest", "high"])
def test_what_torch_will_remove_is_not_needed(tf32: str) -> None:
    program = WITHOUT.format(removed=REMOVED_BY_TORCH_SOME_DAY)
    program = program.replace("flow =", f"torch.set_float32_matmul_precision({tf32!r})\nflow =")
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def floors() -> dict[str, str]:
    """Return the oldest versions that pyproject.toml admits, by package."""
    text = (ROOT / "pyproject.toml").read_text()
    return dict(re.findall(r'"([a-z-]+)>=([0-9.]+)"', text))


def pins() -> dict[str, str]:
    lines = OLDEST.read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def padded(version: str) -> list[int]:
    parts = [int(part) for part in version.split(".")]
    return parts + [0] * (4 - len(parts))


def test_the_oldest_versions_that_are_admitted_are_those_that_are_tested() -> None:
    tested = pins()
    admitted = {name: floors()[name] for name in ("torch", "numpy", "nflows", "normflows")}
    assert {name: padded(version) for name, version in admitted.items()} == {
        name: padded(tested[name]) for name in admitted
    }
