"""The command `nflows-iresnet table1`: what does a guaranteed inverse cost a classifier?

Here is what a table depends on, without torch, so that `--help` is there at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

DEFAULT_COEFFS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Settings:
    """Equal settings give equal results; what each is, the help of the command says.

    Raises:
        ValueError: a coefficient is not in (0, 1), or there is not one length of training.
    """

    dataset: str = "digits"
    coeffs: tuple[float, ...] = DEFAULT_COEFFS
    steps: int | None = 300
    budget: float | None = None
    repeats: int = 3
    seed: int = 0
    batch_size: int = 128
    learning_rate: float = 5e-3
    hidden_channels: int = 32
    num_blocks: int = 4
    num_scales: int = 1
    padding: int = 3
    num_train: int | None = None
    shift: int = 0
    data_dir: str | None = None
    device: str = "cpu"
    threads: int = 1
    training_precision: str = "float32"

    def __post_init__(self) -> None:
        """Check the coefficients, and that there is one length."""
        if (self.steps is None) == (self.budget is None):
            raise ValueError("give either steps or budget, not both and not neither")
        for coeff in self.coeffs:
            if not 0 < coeff < 1:
                raise ValueError(f"coeffs must be in (0, 1), got {coeff}")

    def as_arguments(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {**asdict(self), "coeffs": list(self.coeffs)}


QUICK: dict[str, Any] = {
    "steps": 20,
    "budget": None,
    "repeats": 1,
    "num_blocks": 2,
    "coeffs": (0.9, 0.5),
}
"""What --quick changes."""

_MNIST: dict[str, Any] = {
    "steps": None,
    "repeats": 1,
    "num_scales": 2,
    "learning_rate": 3e-3,
    "shift": 2,
}
TUNED: dict[str, dict[str, dict[str, Any]]] = {
    "mnist": {
        "cuda": {**_MNIST, "budget": 34.0, "hidden_channels": 64, "training_precision": "tf32"},
        "cpu": {**_MNIST, "budget": 17.0, "hidden_channels": 16, "num_blocks": 2},
    }
}
"""By data set and kind of device: seven rows in five minutes on a GPU, in two and more on a CPU."""


def described_rows(coeffs: Iterable[float]) -> dict[str, str]:
    """Return the rows of the table with one line about each."""
    return {
        "resnet": "an ordinary ResNet with strided blocks",
        "vanilla": "y = x + g(x) with ordinary convolutions",
        **{f"c={coeff}": f"certified Lip(g) <= {coeff}" for coeff in coeffs},
    }
