"""One face for the flows of every library: what training and evaluation ask of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from nflows.transforms import Transform
from torch import Tensor, nn

from nflows_iresnet import logdet, transforms

TRAINING_TOLERANCE = 1e-4
"""Absolute tolerance of an integration in training, a tenth of the relative one; zuko's defaults,
1e-6 and 1e-5, hold everywhere else."""
_JACOBIAN_ELEMENTS = 2**22


@dataclass(frozen=True)
class LipschitzBound:
    """The largest Lipschitz constant over the residual blocks of a model.

    Args:
        value: the constant, dimensionless.
        certified: whether the library guarantees it, rather than having estimated it.
    """

    value: float
    certified: bool


def as_density_model(flow: nn.Module) -> DensityModel:
    """Return the face of a flow of nflows, this library, zuko or normflows; a face is its own.

    Raises:
        ValueError: it is of another library.
    """
    if isinstance(flow, DensityModel):
        return flow
    libraries = {kind.__module__.partition(".")[0] for kind in type(flow).__mro__}
    if "nflows" in libraries:
        return ResidualModel(flow) if residual_blocks(flow) else NflowsModel(flow)
    if "normflows" in libraries:
        return NormflowsResidualModel(flow)
    if "zuko" in libraries:
        from zuko.flows import CNF

        return ContinuousModel(flow) if isinstance(flow, CNF) else ZukoModel(flow)
    raise ValueError(
        f"a model must be a flow of nflows, nflows_iresnet, zuko or normflows, got "
        f"{type(flow).__name__}: derive from nflows.flows.Flow, or from adapters.DensityModel"
    )


class DensityModel(nn.Module, ABC):
    """A density that can be trained, evaluated exactly, inverted and sampled.

    Rows have any shape: (B, *) stands for (B, d), or (B, C, H, W) with noise (B, C H W).
    """

    estimates = False
    """Whether `log_prob` is an estimate, so that `exact_log_prob` costs more."""
    flow: Any

    def __init__(self, flow: nn.Module | None = None) -> None:
        super().__init__()
        if flow is not None:
            self.flow = flow

    @property
    def flow_class(self) -> str:
        """Return the full name of the class of the flow."""
        kind = type(self.flow)
        return f"{kind.__module__}.{kind.__qualname__}"

    @abstractmethod
    def log_prob(self, inputs: Tensor) -> Tensor:
        """Log-density in nats that training maximises; (B, *) -> (B,). May be an estimate."""

    @abstractmethod
    def exact_log_prob(self, inputs: Tensor) -> Tensor:
        """Log-density in nats with the exact log-determinant, without a graph; (B, *) -> (B,)."""

    @abstractmethod
    def encode(self, inputs: Tensor) -> Tensor:
        """Data to noise; (B, *) -> (B, d)."""

    @abstractmethod
    def decode(self, noise: Tensor) -> Tensor:
        """Noise to data, with the solver that the library uses by default; (B, d) -> (B, *)."""

    @abstractmethod
    def sample(self, num_samples: int) -> Tensor:
        """Draw samples as a user of the library would; returns (num_samples, *)."""

    def initialize(self, rows: Tensor) -> None:
        """Start from training rows (N, *) what the library starts from data before training."""

    def after_step(self) -> None:
        """Do what the library asks for after each optimiser step."""

    def lipschitz(self) -> LipschitzBound | None:
        """Return the bound over all residual blocks, or None without residual blocks."""
        return None


class NflowsModel(DensityModel):
    """Any `nflows.flows.Flow`."""

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's own log-density."""
        return self.flow.log_prob(inputs)

    @torch.no_grad()
    def exact_log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's own log-density, which is exact for these transforms."""
        return self.flow.log_prob(inputs)

    def encode(self, inputs: Tensor) -> Tensor:
        """Data to noise."""
        return self.flow.transform_to_noise(inputs)

    def decode(self, noise: Tensor) -> Tensor:
        """Noise to data."""
        return self.flow._transform.inverse(noise)[0]

    def sample(self, num_samples: int) -> Tensor:
        """Draw samples with `Flow.sample`."""
        return self.flow.sample(num_samples)


class ResidualModel(NflowsModel):
    """A flow of this library, whose residual blocks certify their Lipschitz bound."""

    estimates = True

    def initialize(self, rows: Tensor) -> None:
        """Start a flow that can be started from rows."""
        initialize = getattr(self.flow, "initialize", None)
        if initialize is not None:
            initialize(rows)

    @torch.no_grad()
    def exact_log_prob(self, inputs: Tensor) -> Tensor:
        """Return the log-density with the exact estimator in place of the trained one."""
        with transforms.using(self.flow, estimator=logdet.Exact()):
            return self.flow.log_prob(inputs)

    def lipschitz(self) -> LipschitzBound:
        """Return the largest certified bound."""
        bounds = [block.lipschitz_bound() for block in residual_blocks(self.flow)]
        return LipschitzBound(max(bounds), certified=True)


def residual_blocks(flow: nn.Module) -> list[transforms.ResidualTransform]:
    """Return the residual blocks of a flow, in order."""
    return [each for each in flow.modules() if isinstance(each, transforms.ResidualTransform)]


class TruncatedModel(ResidualModel):
    """A residual flow that is trained by a truncated series, and evaluated without its bias."""

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's own estimate in training, and an unbiased one in evaluation."""
        if self.training:
            return super().log_prob(inputs)
        with transforms.using(self.flow, estimator=logdet.Auto()):
            return super().log_prob(inputs)


class PrecededModel(DensityModel):
    """Any model with a transform in front of it, which is trained together with it.

    Args:
        start: the transform of nflows between the data and the model.
        model: what takes the values that come out of it.
    """

    def __init__(self, start: Transform, model: DensityModel) -> None:
        super().__init__()
        self.start, self.model = start, model
        self.estimates = model.estimates

    @property
    def flow_class(self) -> str:
        """Return the full name of the class of the flow behind the start."""
        return self.model.flow_class

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the model's own log-density, and that of the start."""
        values, logabsdet = self.start(inputs)
        return self.model.log_prob(values) + logabsdet

    @torch.no_grad()
    def exact_log_prob(self, inputs: Tensor) -> Tensor:
        """Return the model's exact log-density, and that of the start, which is exact."""
        values, logabsdet = self.start(inputs)
        return self.model.exact_log_prob(values) + logabsdet

    def encode(self, inputs: Tensor) -> Tensor:
        """Data to noise."""
        return self.model.encode(self.start(inputs)[0])

    def decode(self, noise: Tensor) -> Tensor:
        """Noise to data."""
        return self.start.inverse(self.model.decode(noise))[0]

    def sample(self, num_samples: int) -> Tensor:
        """Draw samples."""
        return self.start.inverse(self.model.sample(num_samples))[0]

    def after_step(self) -> None:
        """Do what the model's library asks for."""
        self.model.after_step()

    def lipschitz(self) -> LipschitzBound | None:
        """Return the bound over the model's residual blocks."""
        return self.model.lipschitz()


class StartedModel(PrecededModel):
    """Any model with this library's start in front of it, which begins with training rows."""

    def initialize(self, rows: Tensor) -> None:
        """Start the start from training rows, and the model from what comes out of it."""
        transforms.initialize(self.start, rows)
        with torch.no_grad():
            self.model.initialize(self.start(rows)[0])


class ZukoModel(DensityModel):
    """A flow of zuko whose log-determinant is exact."""

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's own log-density."""
        return self.flow().log_prob(inputs)

    @torch.no_grad()
    def exact_log_prob(self, inputs: Tensor) -> Tensor:
        """Return the flow's own log-density, which is exact for these transforms."""
        return self.flow().log_prob(inputs)

    def encode(self, inputs: Tensor) -> Tensor:
        """Data to noise."""
        return self.flow().transform(inputs)

    def decode(self, noise: Tensor) -> Tensor:
        """Noise to data, by zuko's inverse, which for some transforms is a bisection."""
        return self.flow().transform.inv(noise)

    def sample(self, num_samples: int) -> Tensor:
        """Draw samples."""
        return self.flow().sample((num_samples,))


class ContinuousModel(ZukoModel):
    r"""x -> z(1), dz/dt = f(t, z), with the density that follows from the trace of df/dz.

    It is a `zuko.flows.CNF`. Training estimates the trace by Hutchinson's method with a looser
    tolerance of the integration; `exact_log_prob` integrates the exact trace.

    References:
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud. FFJORD, 2019.
    """

    estimates = True

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return the log-density with Hutchinson's estimate of the trace."""
        with self._integrating(exact=False):
            return super().log_prob(inputs)

    @torch.no_grad()
    def exact_log_prob(self, inputs: Tensor) -> Tensor:
        """Return the log-density with the exact trace, as many rows at a time as fit."""
        rows = max(1, _JACOBIAN_ELEMENTS // inputs.shape[1] ** 2)
        with self._integrating(exact=True):
            return torch.cat([self.flow().log_prob(chunk) for chunk in inputs.split(rows)])

    @contextmanager
    def _integrating(self, *, exact: bool) -> Iterator[None]:
        """Integrate one or the other trace, loosely in training."""
        ode = self.flow.transform
        before = ode.exact, ode.atol, ode.rtol
        ode.exact = exact
        if self.training:
            ode.atol, ode.rtol = TRAINING_TOLERANCE, 10 * TRAINING_TOLERANCE
        try:
            yield
        finally:
            ode.exact, ode.atol, ode.rtol = before


class NormflowsResidualModel(DensityModel):
    """A `normflows.NormalizingFlow`, its `Residual` blocks run as its documentation runs them."""

    estimates = True

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Return normflows' stochastic estimate, on a copy because it marks its input."""
        return self.flow.log_prob(inputs.clone())

    @torch.no_grad()
    def exact_log_prob(self, inputs: Tensor) -> Tensor:
        """Replace each block's random log-determinant by that of its full Jacobian."""
        values, total = inputs, inputs.new_zeros(inputs.shape[0])
        for flow in reversed(self.flow.flows):
            values, logabsdet = _exact_inverse(flow, values)
            total = total + logabsdet
        return total + self.flow.q0.log_prob(values)

    def encode(self, inputs: Tensor) -> Tensor:
        """Data to noise."""
        values = inputs
        for flow in reversed(self.flow.flows):
            block = getattr(flow, "iresblock", None)
            values = flow.inverse(values)[0] if block is None else block(values)
        return values

    def decode(self, noise: Tensor) -> Tensor:
        """Noise to data, with normflows' fixed-point iteration and its default tolerance."""
        values = noise
        for flow in self.flow.flows:
            block = getattr(flow, "iresblock", None)
            values = flow.forward(values)[0] if block is None else block.inverse(values)
        return values

    def sample(self, num_samples: int) -> Tensor:
        """Draw samples with `NormalizingFlow.sample`."""
        return self.flow.sample(num_samples)[0]

    def after_step(self) -> None:
        """Run five power iterations per layer, the call that normflows leaves to its users."""
        from normflows.utils import update_lipschitz

        update_lipschitz(self.flow, 5)

    @torch.no_grad()
    def lipschitz(self) -> LipschitzBound | None:
        """Return the largest product of the layers' true spectral norms, in float64."""
        blocks = [flow.iresblock.nnet for flow in self.flow.flows if hasattr(flow, "iresblock")]
        largest = max(map(_spectral_product, blocks), default=None)
        return None if largest is None else LipschitzBound(largest, certified=False)


def _exact_inverse(flow: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a `normflows.flows.Flow` makes of data, and its exact log-determinant."""
    block: nn.Module | None = getattr(flow, "iresblock", None)
    if block is None:
        return flow.inverse(inputs)
    outputs, jacobian = value_and_jacobian(block, inputs)
    logabsdet = torch.linalg.slogdet(jacobian.double()).logabsdet
    return outputs, logabsdet.to(inputs.dtype)


def value_and_jacobian(
    fn: Callable[[Tensor], Tensor], inputs: Tensor, chunk_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Evaluate a map that treats rows independently, with its Jacobians.

    Costs one evaluation and d vector-Jacobian products for each chunk of rows.

    Args:
        fn: maps (B, d) to (B, d), row by row.
        inputs: (B, d).
        chunk_size: rows that are differentiated at a time.

    Returns:
        The values (B, d) and the Jacobians (B, d, d), both without a graph.
    """
    chunks = [_chunk_jacobian(fn, chunk) for chunk in inputs.split(chunk_size)]
    values, jacobians = zip(*chunks, strict=True)
    return torch.cat(values), torch.cat(jacobians)


def _chunk_jacobian(fn: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        outputs = fn(inputs)
        rows = [
            torch.autograd.grad(outputs[:, i].sum(), inputs, retain_graph=True)[0]
            for i in range(outputs.shape[1])
        ]
    return outputs.detach(), torch.stack(rows, dim=1)


def _spectral_product(net: nn.Module) -> float:
    product = 1.0
    for layer in net.modules():
        compute_weight: Callable[..., Tensor] | None = getattr(layer, "compute_weight", None)
        if compute_weight is not None:
            weight = compute_weight(update=False).double()
            product *= float(torch.linalg.matrix_norm(weight, 2))
    return product


class CouplingNet(nn.Module):
    """A network that returns the precision of its inputs.

    Inside a training step it may compute in bfloat16: log-determinants, sums and the coupled values
    stay in full precision, and evaluation never uses bfloat16.

    Args:
        net: maps images to images.
        half_precision: whether to use bfloat16 while training.
    """

    def __init__(self, net: nn.Module, *, half_precision: bool) -> None:
        super().__init__()
        self.net, self.half_precision = net, half_precision

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the network's outputs in the precision of the inputs."""
        enabled = self.half_precision and self.training
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=enabled):
            outputs: Tensor = self.net(inputs)
        return outputs.to(inputs.dtype)


class FlattenTransform(Transform):
    """(B, C, H, W) -> (B, C H W), where shape is (C, H, W)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the rows, 0), shapes (B, C H W) and (B,)."""
        return inputs.flatten(start_dim=1), inputs.new_zeros(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (the images, 0), shapes (B, C, H, W) and (B,)."""
        return inputs.reshape(-1, *self.shape), inputs.new_zeros(inputs.shape[0])
