"""What a result depends on beside its arguments: versions and the machine."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nflows_iresnet import __version__
from nflows_iresnet.experiments.config import UsageError

_PACKAGES = ("torch", "nflows", "normflows", "numpy", "scikit-learn", "matplotlib", "rich", "zuko")
_EXTRA = ("jinja2", "joblib", "matplotlib", "pandas", "rich", "scipy")


def check_extra() -> None:
    """Check that the `compare` extra is installed.

    Raises:
        UsageError: a package is missing; the message says how to install it.
    """
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"{' and '.join(missing)} not installed: pip install 'nflows-iresnet[compare]'"
        )


def versions() -> dict[str, str | None]:
    """Return the versions of this package and of those that results depend on."""
    return {"nflows-iresnet": __version__, **{name: _version(name) for name in _PACKAGES}}


def describe_environment(device: str) -> dict[str, Any]:
    """Return versions, device and machine as plain JSON data."""
    import torch

    return {
        "versions": versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "cpu_count": os.cpu_count(),
        "cuda": torch.version.cuda,
    }


def check_environment(environment: dict[str, Any]) -> None:
    """Check that a record holds what reports say of its environment.

    Raises:
        ValueError: something is missing; the message names it.
    """
    inner = environment.get("versions")
    known = environment | (inner if isinstance(inner, dict) else {})
    for name in ("versions", "device", "device_name", "nflows-iresnet", "torch"):
        if name not in known:
            raise ValueError(f"environment has no {name}")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
