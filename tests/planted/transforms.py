"""Transforms with one bug each, as met in other libraries.

At initialisation the Jacobian of a network is tiny and hides wrong weights; so the branches here
are linear or a sine with norms of 0.7 to 0.9.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet import solvers
from nflows_iresnet.transforms import ResidualTransform
from tests.peers import Linear, Wave, scaled_identity

FEATURES = 3
Result = tuple[Tensor, Tensor]


def steep() -> Linear:
    """g(x) = -0.8 x: all terms of the power series have one sign, so no error cancels."""
    return scaled_identity(-0.8, FEATURES)


class Conditional(nn.Module):
    """g(x; c) = 0.7 sin(x + C c)."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Linear(2, FEATURES, bias=False)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            raise ValueError("a context is needed")
        return 0.7 * (inputs + self.context(context)).sin()


class ForgetsItsContext(Conditional):
    """Works without a context, as another map."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            return 0.7 * inputs.sin()
        return super().forward(inputs, context)


@dataclass(frozen=True)
class TwelveSteps(solvers.FixedPointIteration):
    """Stops after 12 steps and calls it a solution."""

    def __call__(
        self, fn: Callable[[Tensor], Tensor], init: Tensor, lipschitz: float | None = None
    ) -> solvers.Solution:
        point = init.detach()
        with torch.no_grad():
            for _ in range(12):
                point = fn(point)
        zeros = torch.zeros_like(point[:, 0])
        return solvers.Solution(point, zeros, zeros, zeros.long())


class InverseHasForwardsSign(ResidualTransform):
    """Both directions report the same log-determinant."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().inverse(inputs, context)
        return outputs, -logabsdet


class LogDetAtTheWrongPoint(ResidualTransform):
    """The inverse's log-determinant is evaluated at its inputs."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, _ = super().inverse(inputs, context)
        return outputs, -super().forward(inputs, context)[1]


class SeededByNumpy(ResidualTransform):
    """Something random that torch's seed does not decide."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        return outputs, logabsdet + float(np.random.standard_normal())


class RowsSeeEachOther(ResidualTransform):
    """Subtracts the mean over the batch."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        return outputs - outputs.mean(0), logabsdet


class ContextIgnored(ResidualTransform):
    """Accepts a context and does not use it."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        return super().forward(inputs)


class ContextOfTheFirstRow(ResidualTransform):
    """Uses the first row's context for all rows."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        shared = None if context is None else context[:1].expand_as(context)
        return super().forward(inputs, shared)


class NeedsTwoRows(ResidualTransform):
    """Fails where a statistic over the batch does not exist."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        if len(inputs) < 2:
            raise ValueError("expected more than 1 value per channel when training")
        return super().forward(inputs, context)


class MovesWhileTraining(nn.Module):
    """A branch whose norm is re-estimated in each training call."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(0.7))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.scale = self.scale * 0.999
        return self.scale * inputs.sin()


class UnusedParameter(Wave):
    """Has a parameter that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))


class DifferentiatesItsParameters(ResidualTransform):
    """Takes gradients with respect to the parameters in forward, as if all were trained."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        if torch.is_grad_enabled():
            torch.autograd.grad(outputs.sum(), list(self.parameters()), retain_graph=True)
        return outputs, logabsdet


class InverseWithoutGradient(ResidualTransform):
    """The iteration is detached, and nothing takes its place."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().inverse(inputs, context)
        return outputs.detach(), logabsdet


class InverseLogDetWithoutGradient(ResidualTransform):
    """The inverse's log-determinant is a constant for autograd."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().inverse(inputs, context)
        return outputs, logabsdet.detach()


class ContextWithoutGradient(ResidualTransform):
    """An embedding of the context would not learn."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        return super().forward(inputs, None if context is None else context.detach())


class LastStepDifferentiated(ResidualTransform):
    """x = y - g(x*) with x* constant: the gradient lacks (I + J)^-1."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().inverse(inputs, context)
        return inputs - self.net(outputs.detach()), logabsdet


class BranchesOnValues(ResidualTransform):
    """Asks for a number in forward, which function transforms cannot give."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        if len(inputs) and inputs.abs().max().item() > 1e6:
            raise ValueError("too large")
        return super().forward(inputs, context)


class AlwaysRecords(ResidualTransform):
    """Computes under enable_grad, whatever the caller asked for."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        with torch.enable_grad():
            return super().forward(inputs, context)


class _Doubled(torch.autograd.Function):
    """Twice its input, with a view of the output among what is saved."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        outputs = 2 * inputs
        ctx.save_for_backward(outputs[None])
        return outputs

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent


class SavesViewOfOutput(ResidualTransform):
    """A node of its graph holds itself."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        doubled = cast(Tensor, _Doubled.apply(outputs)) / 2
        return doubled, logabsdet


class KeepsItsLastPass(ResidualTransform):
    """Keeps the outputs of its last pass with their graph."""

    last: Result | None = None

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        self.last = super().inverse(inputs, context)
        return self.last


class WantsGradientsOfInputs(ResidualTransform):
    """Switches requires_grad on in the caller's tensor."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        if torch.is_grad_enabled() and inputs.is_leaf:
            inputs.requires_grad_(True)
        return super().forward(inputs, context)


class WritesIntoInputs(ResidualTransform):
    """Adds the branch in place."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        inputs.data.copy_(outputs)
        return outputs, logabsdet


class WritesIntoOutputs(ResidualTransform):
    """Iterates in the tensor that the caller gave to the inverse."""

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().inverse(inputs, context)
        inputs.data.copy_(outputs)
        return outputs, logabsdet


class CannotBePickled(ResidualTransform):
    """Keeps a function without a name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)
        self.scale = lambda inputs: inputs


class LosesState(Wave):
    """Leaves its parameter out of the state_dict."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        return None


class KeepsItsStartToItself(Transform):
    """Starts from its first batch, and leaves out of the state_dict where."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3), persistent=False)
        self.has_started = False

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        if self.training and not self.has_started:
            self.mean, self.has_started = inputs.detach().mean(0) + 1, True
        return inputs - self.mean, inputs.new_zeros(len(inputs))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:
        return inputs + self.mean, inputs.new_zeros(len(inputs))


class NegativeInEvaluation(ResidualTransform):
    """Both log-determinants have the wrong sign in evaluation."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        return outputs, logabsdet if self.training else -logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().inverse(inputs, context)
        return outputs, logabsdet if self.training else -logabsdet


class HalfPrecision(ResidualTransform):
    """Lets autocast choose the precision of the branch."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        return inputs + self.net(inputs), super().forward(inputs, context)[1]


class WrongInOneMode(ResidualTransform):
    """The inverse is that of another map, in training or in evaluation alone."""

    in_training = True

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().inverse(inputs, context)
        return outputs + 0.1 * (self.training == self.in_training), logabsdet


class WrongInEvaluation(WrongInOneMode):
    """Statistics of the evaluation that the inverse does not know."""

    in_training = False


class CountsItsCalls(ResidualTransform):
    """Each forward moves by a little more than the last, and the inverse undoes the latest."""

    calls = 0

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        self.calls += 1
        outputs, logabsdet = super().forward(inputs, context)
        return outputs + 0.01 * self.calls, logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        return super().inverse(inputs - 0.01 * self.calls, context)


class NeedsARow(ResidualTransform):
    """Fails for an empty batch."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        if inputs.shape[0] == 0:
            raise ValueError("expected a batch")
        return super().forward(inputs, context)


class OtherInInferenceMode(ResidualTransform):
    """Leaves something out where nobody can differentiate."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        return outputs, logabsdet * (0.5 if torch.is_inference_mode_enabled() else 1.0)


class OtherGradientWhereFrozen(ResidualTransform):
    """Differentiates half of the map where no parameter learns."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        if any(each.requires_grad for each in self.parameters()):
            return outputs, logabsdet
        return (outputs + outputs.detach()) / 2, logabsdet


class InfiniteGradient(Wave):
    """A parameter at the one point where the map has no derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.corner = nn.Parameter(torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * (1 + self.corner.sqrt())


class _Joined(torch.autograd.Function):
    """a + b, whose recorded derivative goes through b to a as well."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        ctx.save_for_backward(first, second)
        return first + second

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return cotangent, cotangent
        given = ctx.saved_tensors
        return torch.autograd.grad(sum(given), given, cotangent, create_graph=True)


class CountsTwiceWithAGraph(ResidualTransform):
    """A node whose second argument is made from the first."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Result:  # type: ignore[override]
        outputs, logabsdet = super().forward(inputs, context)
        double = 2 * outputs
        joined: Tensor = _Joined.apply(double, -double / 2)
        return joined, logabsdet
