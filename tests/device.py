"""The device that `pytest --device` asks for, and what the tests build on it."""

from __future__ import annotations

import torch

from tests import pretended

ON_DEVICE = frozenset(
    ["test_conditional", "test_contract", "test_conv", "test_conv_norms", "test_dense", "test_derivatives", "test_device", "test_flows", "test_flows_doors", "test_flows_lipschitz", "test_images_flow", "test_images_transforms", "test_linear", "test_linearization", "test_logdet", "test_nn", "test_norms", "test_normalization", "test_planted_bugs", "test_solvers", "test_splines", "test_theory", "test_theory_logdet", "test_transforms", "test_waits"]
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
