"""The device that `pytest --device` asks for, and what the tests build on it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests import pretended

ON_DEVICE = frozenset(
    {
        "test_captured",
        "test_conditional",
        "test_contract",
        "test_conv",
        "test_conv_norms",
        "test_dense",
        "test_derivatives",
        "test_device",
        "test_flows",
        "test_flows_doors",
        "test_flows_lipschitz",
        "test_images_flow",
        "test_images_transforms",
        "test_linear",
        "test_linearization",
        "test_logdet",
        "test_nn",
        "test_norms",
        "test_normalization",
        "test_planted_bugs",
        "test_solvers",
        "test_splines",
        "test_theory",
        "test_theory_logdet",
        "test_transforms",
        "test_waits",
    }
)
"""The test files that run there; what they build without naming a device is built on it."""


def reason_against(name: str) -> str | None:
    """Return why tests cannot run on a device, None if they can."""
    try:
        device = pretended.register() if name == pretended.NAME else torch.device(name)
        torch.zeros(1, device=device)
    except Exception as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        return f"there is no device {name!r} here: {first[0]}"
    return None


def current() -> torch.device:
    """Return the device that tensors are built on."""
    return torch.empty(0).device


def generator(seed: int) -> torch.Generator:
    """Return a generator of that device."""
    device = current()
    if device.type == pretended.NAME:
        return pretended.generator(seed)
    return torch.Generator(device).manual_seed(seed)


def run_on(config: pytest.Config, arguments: list[str], name: str = pretended.NAME) -> str:
    """Run tests in a process of their own on a device, and return what it says.

    torch wants to know of a device that is pretended before the first backward pass.
    """
    if config.getoption("--device") != "cpu":
        pytest.skip("these tests run on a device already")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-m", "not slow", "--device", name, *arguments],
        cwd=config.rootpath,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout
