"""Plane toy densities, each with exact samples and an exact log-density."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Generator, Tensor


class Density(ABC):
    r"""A probability density with exact samples and an exact logarithm.

    With samples :math:`x_i \sim p`, the entropy :math:`H = -\int p \log p` is the lowest mean
    negative log-likelihood that any model of :math:`p` can reach, so a result reads as nats above
    the optimum.

    Implementing a density: derive a frozen dataclass that defines ``_draw`` (float64 samples made
    of ``_uniform``, ``_normal`` and ``_choice``) and ``_log_density`` (float64 in and out,
    differentiable). An entry of ``DESCRIBED`` makes it a data set.
    """

    features: ClassVar[int] = 2

    @staticmethod
    def _uniform(*shape: int, generator: Generator | None) -> Tensor:
        device = generator.device if generator else None
        return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)

    @staticmethod
    def _normal(*shape: int, generator: Generator | None) -> Tensor:
        device = generator.device if generator else None
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=device)

    @staticmethod
    def _choice(num_choices: int, *shape: int, generator: Generator | None) -> Tensor:
        device = generator.device if generator else None
        return torch.randint(num_choices, shape, generator=generator, device=device)

    @abstractmethod
    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor: ...

    @abstractmethod
    def _log_density(self, points: Tensor) -> Tensor: ...

    def sample(self, num_samples: int, generator: Generator | None = None) -> Tensor:
        """Draw independent samples [num_samples, features] in torch's default dtype.

        Args:
            num_samples: How many.
            generator: Torch's generator; ``None`` takes the one that ``torch.manual_seed`` seeds.

        Raises:
            ValueError: If ``num_samples`` is negative.

        Example:
            >>> Circles().sample(5).shape
            torch.Size([5, 2])
        """
        if num_samples < 0:
            raise ValueError(f"num_samples must be at least 0, got {num_samples}")
        return self._draw(num_samples, generator).to(torch.get_default_dtype())

    def log_prob(self, inputs: Tensor) -> Tensor:
        """Natural logarithm of the density at points [N, features], computed in float64.

        The nats [N] are in the dtype of ``inputs``, and minus infinity outside the support.

        Raises:
            ValueError: If ``inputs`` has another shape or is not floating-point.

        Example:
            >>> Checkerboard().log_prob(torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
            tensor([-3.4657,    -inf])
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.features:
            shape = tuple(inputs.shape)
            raise ValueError(f"inputs must have shape (N, {self.features}), got {shape}")
        if not inputs.is_floating_point():
            raise ValueError(f"inputs must be floating-point, got {inputs.dtype}")
        return self._log_density(inputs.double()).to(inputs.dtype)

    @torch.no_grad()
    def entropy(
        self, num_samples: int = 100_000, generator: Generator | None = None
    ) -> tuple[float, float]:
        r"""Differential entropy with its standard error.

        :math:`\hat H = -\frac1N \sum_i \log p(x_i)` has the standard error
        :math:`\operatorname{std}(\log p(x_i)) / \sqrt N`.

        Args:
            num_samples: Monte Carlo samples, at least two.
            generator: Torch's generator; ``None`` takes the one that ``torch.manual_seed`` seeds.

        Returns:
            The entropy in nats and its standard error, which is zero where the entropy is exact.

        Raises:
            ValueError: If ``num_samples`` is below two.

        Example:
            >>> value, standard_error = Circles().entropy(1000)
            >>> abs(value - 3.27) < 5 * standard_error < 0.2
            True
        """
        if num_samples < 2:
            raise ValueError(f"num_samples must be at least 2, got {num_samples}")
        nats = -self._log_density(self._draw(num_samples, generator))
        return nats.mean().item(), nats.std().item() / math.sqrt(num_samples)


class _Toy(Density):
    """A density whose parameters are all positive."""

    def __post_init__(self) -> None:
        """Validate the parameters."""
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {value}")


# scikit-learn's toys have no density and other samples for the same seed, so these are ours.
@dataclass(frozen=True)
class Circles(_Toy):
    r"""Two concentric circles of equal weight with isotropic Gaussian noise.

    With :math:`r = |x|`, the noise integrates over a circle of radius :math:`R` in closed form:

    .. math::
        p(x) = \tfrac12 \sum_R \frac{1}{2\pi\sigma^2}
               \exp\!\Bigl(-\frac{(r - R)^2}{2\sigma^2}\Bigr)
               e^{-rR/\sigma^2} I_0\!\Bigl(\frac{rR}{\sigma^2}\Bigr)

    The defaults are scikit-learn's circles with ``factor=0.5, noise=0.08``, times three, as in
    FFJORD.

    References:
        "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models"
        (Grathwohl et al., 2019).

    Args:
        noise: Standard deviation of the noise.
        inner: Radius of the first circle.
        outer: Radius of the second circle.

    Example:
        >>> Circles().log_prob(torch.tensor([[3.0, 0.0]]))
        tensor([-3.1207])
    """

    noise: float = 0.24
    inner: float = 1.5
    outer: float = 3.0

    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor:
        angle = 2 * math.pi * self._uniform(num_samples, generator=generator)
        is_outer = self._choice(2, num_samples, generator=generator)
        radius = self.inner + (self.outer - self.inner) * is_outer
        circle = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        return circle + self.noise * self._normal(num_samples, 2, generator=generator)

    def _log_density(self, points: Tensor) -> Tensor:
        distance = points.norm(dim=1)
        rings = [self._log_ring(distance, radius) for radius in (self.inner, self.outer)]
        return torch.stack(rings).logsumexp(dim=0) - math.log(4 * math.pi * self.noise**2)

    def _log_ring(self, distance: Tensor, radius: float) -> Tensor:
        variance = self.noise**2
        bessel = torch.special.i0e(distance * radius / variance)
        return bessel.log() - (distance - radius).square() / (2 * variance)


@dataclass(frozen=True)
class EightGaussians(_Toy):
    r"""Eight equal Gaussians on a ring.

    :math:`p(x) = \tfrac18 \sum_{k=0}^{7} \mathcal N(x;\ R\,(\cos\tfrac{\pi k}4,
    \sin\tfrac{\pi k}4),\ \sigma^2 I)`. The defaults are FFJORD's.

    References:
        "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models"
        (Grathwohl et al., 2019).

    Args:
        noise: Standard deviation of each Gaussian.
        radius: Radius of the ring.

    Example:
        >>> EightGaussians(noise=0.5, radius=4.0).log_prob(torch.tensor([[4.0, 0.0]]))
        tensor([-2.5...])
    """

    noise: float = 0.5 / math.sqrt(2)
    radius: float = 4 / math.sqrt(2)

    def _centre(self, index: Tensor) -> Tensor:
        angle = index.double() * (math.pi / 4)
        return self.radius * torch.stack([angle.cos(), angle.sin()], dim=-1)

    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor:
        centres = self._centre(self._choice(8, num_samples, generator=generator))
        return centres + self.noise * self._normal(num_samples, 2, generator=generator)

    def _log_density(self, points: Tensor) -> Tensor:
        deviations = points[:, None] - self._centre(torch.arange(8, device=points.device))
        return _log_normal(deviations, (self.noise, self.noise)).logsumexp(dim=1) - math.log(8)


@dataclass(frozen=True)
class Checkerboard(Density):
    r"""Uniform on eight of the sixteen squares of :math:`[-4, 4]^2`.

    :math:`p(x) = \tfrac1{32}` where :math:`\lfloor x_1/2 \rfloor + \lfloor x_2/2 \rfloor` is even
    and zero elsewhere; the squares are closed, so that rounding never moves a sample out of them.
    Its entropy is :math:`\log 32`, exactly.

    References:
        "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models"
        (Grathwohl et al., 2019).

    Example:
        >>> Checkerboard().entropy()
        (3.4657359027997265, 0.0)
    """

    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor:
        square = self._choice(8, num_samples, generator=generator)
        column, pair = square % 4, square // 4
        corner = torch.stack([column, 2 * pair + column % 2], dim=1) - 2
        return 2 * (corner + self._uniform(num_samples, 2, generator=generator))

    def _log_density(self, points: Tensor) -> Tensor:
        cells = points / 2
        on_edge = (cells == cells.floor()).any(dim=1)
        is_even = cells.floor().sum(dim=1) % 2 == 0
        inside = (points.abs() <= 4).all(dim=1) & (is_even | on_edge)
        return torch.where(inside, points.new_tensor(-math.log(32)), -math.inf)

    def entropy(
        self, num_samples: int = 100_000, generator: Generator | None = None
    ) -> tuple[float, float]:
        """Differential entropy, exactly: log 32 with a standard error of zero; nothing is drawn."""
        return math.log(32), 0.0


@dataclass(frozen=True)
class Pinwheel(_Toy):
    r"""Five Gaussian arms, each swirled by an angle that grows with the radius.

    An arm :math:`z \sim \mathcal N((2, 0),\ \operatorname{diag}(\sigma_r^2, \sigma_t^2))` turns by
    :math:`\theta_k(|z|) = \tfrac{2\pi k}K + \lambda e^{|z|/2}`. In polar coordinates this is a
    shear, so its Jacobian determinant is one and

    .. math:: p(x) = \tfrac1K \sum_k \mathcal N\bigl(R(-\theta_k(|x|))\,x;\ (2, 0),\ \dots\bigr)

    exactly. (The original turns by the first coordinate of :math:`z`, which has no closed form.)

    References:
        "Composing Graphical Models with Neural Networks for Structured Representations and Fast
        Inference" (Johnson et al., 2016).

    Args:
        num_arms: Number of arms K.
        radial_noise: Standard deviation along an arm.
        tangential_noise: Standard deviation across an arm.
        rate: Strength of the swirl.

    Example:
        >>> Pinwheel(rate=1e-9).log_prob(torch.tensor([[2.0, 0.0]]))
        tensor([-1.3...])
    """

    num_arms: int = 5
    radial_noise: float = 0.6
    tangential_noise: float = 0.2
    rate: float = 0.25

    def __post_init__(self) -> None:
        """Validate the parameters."""
        if not isinstance(self.num_arms, int) or self.num_arms < 1:
            raise ValueError(f"num_arms must be a positive integer, got {self.num_arms}")
        super().__post_init__()

    @property
    def _noises(self) -> tuple[float, float]:
        return self.radial_noise, self.tangential_noise

    def _angle(self, arm: Tensor, distance: Tensor) -> Tensor:
        return 2 * math.pi / self.num_arms * arm + self.rate * (distance / 2).exp()

    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor:
        noise = self._normal(num_samples, 2, generator=generator)
        arm = noise * noise.new_tensor(self._noises) + noise.new_tensor([2.0, 0.0])
        index = self._choice(self.num_arms, num_samples, generator=generator)
        return _rotated(arm, self._angle(index, arm.norm(dim=1)))

    def _log_density(self, points: Tensor) -> Tensor:
        arms = torch.arange(self.num_arms, device=points.device)
        angle = self._angle(arms, points.norm(dim=1, keepdim=True))
        deviations = _rotated(points[:, None], -angle) - points.new_tensor([2.0, 0.0])
        return _log_normal(deviations, self._noises).logsumexp(dim=1) - math.log(self.num_arms)


def _rotated(points: Tensor, angle: Tensor) -> Tensor:
    x, y = points.unbind(dim=-1)
    cosine, sine = angle.cos(), angle.sin()
    return torch.stack([cosine * x - sine * y, sine * x + cosine * y], dim=-1)


def _log_normal(deviations: Tensor, scales: tuple[float, float]) -> Tensor:
    widths = deviations.new_tensor(scales)
    normaliser = math.log(2 * math.pi * scales[0] * scales[1])
    return -0.5 * (deviations / widths).square().sum(dim=-1) - normaliser


FloatArray = npt.NDArray[np.float64]

_NODES_PER_PANEL = 32
_NOISES_PER_PANEL = 3.0
_TERMS_AT_ONCE = 2**17


class MirroredCurve(_Toy):
    r"""A curve and its image under :math:`x \to -x`, with equal weight and isotropic noise.

    .. math::
        p(x) = \tfrac12 \sum_{s = \pm 1} \int_0^T w(t)\,
               \mathcal N\bigl(x;\ s\,c(t),\ \sigma^2 I\bigr)\, dt

    The integral is a composite Gauss-Legendre rule: panels of three noise widths of arc length, 32
    nodes each. Doubling the nodes changes no log-density within 50 noise widths of the curve by
    more than 1e-10, and none within 200 by more than 1e-5 of its value. Rounding adds about
    :math:`10^{-16} |x|^2 / \sigma^2`.

    Derive a frozen dataclass with a ``noise`` field that defines the curve ``c`` on ``[0, end]``
    and the ``power`` of the weight, :math:`w(t) \propto t^{\text{power} - 1}`.
    """

    noise: float
    end: ClassVar[float]
    power: ClassVar[int]

    @staticmethod
    @abstractmethod
    def _position(parameter: Tensor) -> Tensor: ...

    def _draw(self, num_samples: int, generator: Generator | None) -> Tensor:
        uniform = self._uniform(num_samples, generator=generator)
        parameter = self.end * uniform ** (1 / self.power)
        signs = 2 * self._choice(2, num_samples, generator=generator) - 1
        noise = self.noise * self._normal(num_samples, 2, generator=generator)
        return signs[:, None] * self._position(parameter) + noise

    def _log_density(self, points: Tensor) -> Tensor:
        nodes, weights = (torch.from_numpy(part).to(points.device) for part in _rule(self))
        slopes = torch.cat([nodes, -nodes]).T / self.noise**2
        offsets = weights.log() - nodes.square().sum(dim=1) / (2 * self.noise**2)
        rows = max(1, _TERMS_AT_ONCE // slopes.shape[1])
        sums = [(offsets.repeat(2) + part @ slopes).logsumexp(dim=1) for part in points.split(rows)]
        distances = points.square().sum(dim=1) / (2 * self.noise**2)
        return torch.cat(sums) - distances - math.log(4 * math.pi * self.noise**2)


@dataclass(frozen=True)
class Moons(MirroredCurve):
    r"""Two interleaved half circles with isotropic Gaussian noise.

    Uniform :math:`t \in [0, \pi]` on :math:`c(t) = (2\cos t - 1,\ 2\sin t - \tfrac12)` and on its
    mirror image :math:`-c(t)`, plus noise of standard deviation ``noise``. These are scikit-learn's
    moons, doubled and centred: its ``noise=0.1`` is 0.2 here. The log-density is a converged
    quadrature (`MirroredCurve`).

    References:
        "Scikit-learn: Machine Learning in Python" (Pedregosa et al., 2011).

    Example:
        >>> Moons().log_prob(torch.tensor([[-1.0, 1.5]]))
        tensor([-1.8...])
    """

    noise: float = 0.2
    end: ClassVar[float] = math.pi
    power: ClassVar[int] = 1

    @staticmethod
    def _position(parameter: Tensor) -> Tensor:
        return torch.stack([2 * parameter.cos() - 1, 2 * parameter.sin() - 0.5], dim=-1)


@dataclass(frozen=True)
class TwoSpirals(MirroredCurve):
    r"""Two interleaved Archimedean spirals of one and a half turns with isotropic Gaussian noise.

    :math:`t = 3\pi\sqrt u` with uniform :math:`u`, so :math:`w(t) = 2t / (3\pi)^2`, on
    :math:`c(t) = \tfrac t3 (-\cos t, \sin t)` and on its mirror image :math:`-c(t)`, plus noise of
    standard deviation ``noise``.
    These are FFJORD's spirals without their one-sided jitter. The log-density is a converged
    quadrature (`MirroredCurve`).

    References:
        "FFJORD: Free-form Continuous Dynamics for Scalable Reversible Generative Models"
        (Grathwohl et al., 2019).

    Example:
        >>> TwoSpirals().log_prob(torch.tensor([[0.0, 0.0]]))
        tensor([-3.4342])
    """

    noise: float = 0.1
    end: ClassVar[float] = 3 * math.pi
    power: ClassVar[int] = 2

    @staticmethod
    def _position(parameter: Tensor) -> Tensor:
        direction = torch.stack([-parameter.cos(), parameter.sin()], dim=-1)
        return parameter[..., None] / 3 * direction


@functools.lru_cache(maxsize=16)
def _rule(curve: MirroredCurve) -> tuple[FloatArray, FloatArray]:
    edges = _equal_arcs(curve)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES_PER_PANEL)
    half_widths = np.diff(edges)[:, None] / 2
    parameter = torch.from_numpy((edges[:-1, None] + half_widths * (1 + nodes)).ravel())
    density = curve.power * parameter ** (curve.power - 1) / curve.end**curve.power
    return curve._position(parameter).numpy(), (half_widths * weights).ravel() * density.numpy()


def _equal_arcs(curve: MirroredCurve) -> FloatArray:
    parameter = np.linspace(0, curve.end, 4097)
    chords = np.diff(curve._position(torch.from_numpy(parameter)).numpy(), axis=0)
    lengths = np.concatenate([[0.0], np.linalg.norm(chords, axis=1).cumsum()])
    num_panels = math.ceil(lengths[-1] / (_NOISES_PER_PANEL * curve.noise))
    return np.interp(np.linspace(0, lengths[-1], num_panels + 1), lengths, parameter)


DESCRIBED: dict[str, tuple[str, Density]] = {
    "moons": ("two interleaved half circles", Moons()),
    "circles": ("two concentric circles", Circles()),
    "8-gaussians": ("eight Gaussians on a ring", EightGaussians()),
    "checkerboard": ("uniform on eight of sixteen squares", Checkerboard()),
    "pinwheel": ("five swirled Gaussian arms", Pinwheel()),
    "two-spirals": ("two interleaved spirals", TwoSpirals()),
}
"""The toys by name, each with a line for lists."""
