"""The weights of a run (stub of this branch)."""

from __future__ import annotations

import io

import torch

from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.models import Architecture


def pack(model: DensityModel, name: str, size: Architecture) -> bytes:
    """Return the weights as the content of a file."""
    buffer = io.BytesIO()
    torch.save({"name": name, "weights": model.state_dict()}, buffer)
    return buffer.getvalue()
