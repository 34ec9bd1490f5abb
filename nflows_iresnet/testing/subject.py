"""What every clause of the contract is given, and how it judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

SIGMAS = 6.0
"""How many standard errors the mean of random numbers may be off."""


@dataclass(frozen=True)
class Subject:
    """A transform under test, with inputs (B, *) and context (B, C) or None.

    Attributes:
        atol: how far an exact number may be off, in the units of the outputs or in nats.
        num_draws: how many draws a random log-determinant is averaged over.
        bias: nats by which the mean of a log-determinant may be off, for truncated estimators.
        untouched: the transform that this is a copy of, which has seen no batch of it.
    """

    transform: Any
    inputs: Tensor
    context: Tensor | None = None
    atol: float = 1e-6
    num_draws: int = 200
    bias: float = 0.0
    untouched: Any = None

    def forward(self, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Run the transform with a seed."""
        torch.manual_seed(seed)
        outputs, logabsdet = self.transform.forward(self.inputs, self.context)
        return outputs, logabsdet

    def inverse(self, outputs: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Run the inverse with a seed."""
        torch.manual_seed(seed)
        inputs, logabsdet = self.transform.inverse(outputs, self.context)
        return inputs, logabsdet

    def rows(self, rows: slice) -> Subject:
        """Return the subject with some rows of its inputs and context."""
        context = None if self.context is None else self.context[rows]
        return replace(self, inputs=self.inputs[rows], context=context)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [each for each in self.transform.parameters() if each.requires_grad]

    def is_random(self) -> bool:
        """Whether the log-determinant depends on the seed."""
        with torch.no_grad():
            return not torch.equal(self.forward(0)[1], self.forward(1)[1])


def require(condition: bool | Tensor, message: str) -> None:
    """Raise an `AssertionError` with a message unless the condition holds."""
    if not bool(condition):
        raise AssertionError(message)


def require_close(actual: Tensor, expected: Tensor, atol: float, what: str) -> None:
    """Require equal shapes and values within `atol`."""
    require(actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}")
    error = float((actual - expected).detach().abs().max()) if actual.numel() else 0.0
    require(error <= atol, f"{what}: off by {error:.3g}, more than {atol:.3g}")


def require_mean(draws: Tensor, expected: Tensor, subject: Subject, what: str) -> None:
    """Require the mean of draws (N, *) to be as expected within its standard error."""
    allowed = subject.atol + subject.bias
    if len(draws) > 1:
        allowed = allowed + SIGMAS * draws.std(0) / len(draws) ** 0.5
    error = (draws.mean(0) - expected).abs()
    worst = float((error - allowed).max()) if error.numel() else 0.0
    require(worst <= 0, f"{what}: mean off by {float(error.max()):.3g}, beyond its standard error")


def require_gradients(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Require gradients that agree with differences, and with themselves but for rounding.

    A GPU adds in another order each time.
    """
    torch.autograd.gradcheck(
        function, arguments, eps=1e-5, atol=1e-4, rtol=1e-3, nondet_tol=_REORDERED
    )


_REORDERED = 1e-8
"""By how much a gradient in float64 may differ between two passes: sums in another order, solved
to the tolerance of a solver."""


def drawn(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """Return normal numbers of a seed, the same ones on every device, for a tensor's kind."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(like)


@contextmanager
def generators_kept(*tensors: Tensor) -> Iterator[None]:
    """Restore torch's generators, of the CPU and of all devices that are seeded, afterwards."""
    seeded = {"cuda"} if torch.cuda.is_initialized() else set()
    kinds = seeded | {each.device.type for each in tensors}
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in sorted(kinds - {"cpu", "meta"}):
            everyone = range(torch.get_device_module(kind).device_count())
            stack.enter_context(torch.random.fork_rng(everyone, device_type=kind))
        yield


def exact_logabsdet(subject: Subject) -> Tensor:
    r"""Return log\|det\| of the full Jacobian, row by row, from automatic differentiation: (B,)."""
    rows = [_row_jacobian(subject.rows(slice(i, i + 1))) for i in range(len(subject.inputs))]
    return torch.linalg.slogdet(torch.stack(rows)).logabsdet


def _row_jacobian(row: Subject) -> Tensor:
    def outputs(flat: Tensor) -> Tensor:
        values, _ = row.transform.forward(flat.reshape(row.inputs.shape), row.context)
        return values.flatten()

    jacobian = torch.autograd.functional.jacobian(
        outputs, row.inputs.flatten(), create_graph=torch.is_grad_enabled()
    )
    return cast(Tensor, jacobian)
