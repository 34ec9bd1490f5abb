"""Certified bi-Lipschitz constants of flows, against singular values of dense Jacobians."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import nflows.transforms
import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet import ResidualFlow, flows, transforms
from nflows_iresnet.flows.lipschitz import lipschitz_constants
from nflows_iresnet.transforms.image import PixelwiseSpline


def randomised(transform: Any, spread: float = 0.5) -> Any:
    torch.manual_seed(3)
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=spread)
    return transform.double().eval()


def singular_values(transform: Any, rows: Tensor, context: Tensor | None = None) -> Tensor:
    def outputs(row: Tensor, condition: Tensor | None) -> Tensor:
        given = None if condition is None else condition[None]
        values: Tensor = transform(row[None], given)[0]
        return values.flatten()

    conditions = [None] * len(rows) if context is None else list(context)
    jacobians = [
        torch.as_tensor(torch.autograd.functional.jacobian(lambda x, c=c: outputs(x, c), row))
        for row, c in zip(rows, conditions, strict=True)
    ]
    flat = torch.stack([each.reshape(each.shape[0], -1) for each in jacobians])
    return torch.linalg.svdvals(flat)


SHAPES = {"vectors": (3,), "images": (1, 4, 4)}
TRANSFORMS: dict[str, tuple[Callable[[], Any], str]] = {
    "act-norm": (lambda: transforms.ActNorm(3), "vectors"),
    "act-norm-of-nflows": (lambda: nflows.transforms.ActNorm(3), "vectors"),
    "spline": (lambda: transforms.ElementwiseRationalQuadraticSpline(3), "vectors"),
    "linear": (lambda: transforms.LinearTransform(3), "vectors"),
    "lu-of-nflows": (lambda: nflows.transforms.LULinear(3), "vectors"),
    "affine-of-nflows": (
        lambda: nflows.transforms.PointwiseAffineTransform(1.0, torch.tensor([0.5, 2.0, 3.0])),
        "vectors",
    ),
    "block": (lambda: ResidualFlow(3, 8, 1)._transform._transforms[2], "vectors"),
    "residual-flow": (lambda: ResidualFlow(3, 8, 2)._transform, "vectors"),
    "iresnet": (lambda: flows.InvertibleResNet(3, 8, 2)._transform, "vectors"),
    "inverse": (
        lambda: nflows.transforms.InverseTransform(
            transforms.ElementwiseRationalQuadraticSpline(3)
        ),
        "vectors",
    ),
    "permutation": (lambda: nflows.transforms.RandomPermutation(3), "vectors"),
    "reverse": (lambda: nflows.transforms.ReversePermutation(3), "vectors"),
    "composite-of-nflows": (
        lambda: nflows.transforms.CompositeTransform(
            [transforms.ActNorm(3), nflows.transforms.ReversePermutation(3)]
        ),
        "vectors",
    ),
    "squeeze": (transforms.SqueezeTransform, "images"),
    "padding": (lambda: transforms.InjectivePadding(2), "images"),
    "image-flow": (
        lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, levels=4, alpha=None)._transform,
        "images",
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_constants_bound_all_singular_values(name: str) -> None:
    factory, shape = TRANSFORMS[name]
    transform = randomised(factory())
    rows = 2 * torch.randn(20, *SHAPES[shape], dtype=torch.float64)
    rows = rows if name != "image-flow" else rows.abs().clamp_max(4)
    values = singular_values(transform, rows)
    forward, inverse = lipschitz_constants(transform)
    assert math.isfinite(forward)
    assert math.isfinite(inverse)
    assert float(values.max()) <= forward * (1 + 1e-9)
    assert float(1 / values.min()) <= inverse * (1 + 1e-9)


TIGHT = [
    "act-norm",
    "act-norm-of-nflows",
    "linear",
    "lu-of-nflows",
    "affine-of-nflows",
    "permutation",
    "reverse",
    "squeeze",
    "composite-of-nflows",
    "padding",
]


@pytest.mark.parametrize("name", TIGHT)
def test_the_constants_of_linear_maps_are_tight(name: str) -> None:
    factory, shape = TRANSFORMS[name]
    transform = randomised(factory())
    values = singular_values(transform, torch.randn(1, *SHAPES[shape], dtype=torch.float64))
    assert lipschitz_constants(transform) == pytest.approx(
        (float(values.max()), float(1 / values.min())), rel=1e-9
    )


def test_the_constants_of_a_spline_are_tight() -> None:
    spline = randomised(transforms.ElementwiseRationalQuadraticSpline(1))
    grid = torch.linspace(-4.5, 4.5, 20001, dtype=torch.float64)[:, None].requires_grad_()
    (slopes,) = torch.autograd.grad(spline(grid)[0].sum(), grid)
    forward, inverse = lipschitz_constants(spline)
    assert float(slopes.max()) <= forward <= 1.05 * float(slopes.max())
    assert float(1 / slopes.min()) <= inverse <= 1.05 * float(1 / slopes.min())
    assert lipschitz_constants(transforms.ElementwiseRationalQuadraticSpline(2)) == pytest.approx(
        (1, 1), rel=1e-6
    )


class Scaled(nn.Module):
    """g(x) = a x: its constants are known."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.slope * inputs

    def lipschitz_bound(self) -> float:
        return abs(float(self.slope.detach()))


@pytest.mark.parametrize("slope", [0.9, -0.9])
def test_the_constants_of_a_block_are_reached(slope: float) -> None:
    block = transforms.ResidualTransform(Scaled(slope)).double()
    forward, inverse = lipschitz_constants(block)
    value = float(singular_values(block, torch.randn(1, 2, dtype=torch.float64)).max())
    reached = value / forward if slope > 0 else 1 / value / inverse
    assert reached == pytest.approx(1, rel=1e-6)


def test_a_flow_states_its_blocks_in_order_and_the_whole() -> None:
    flow = ResidualFlow(2, 8, 3, coeff=0.9)
    blocks = [each for each in flow.modules() if isinstance(each, transforms.ResidualTransform)]
    with torch.no_grad():
        for index, block in enumerate(blocks):
            for layer in block.net.layers:  # type: ignore[union-attr]
                layer.weight.mul_(0.1 * (index + 1))
    bound = flow.lipschitz_bound()
    assert bound.blocks == tuple(block.lipschitz_bound() for block in blocks)
    assert bound.blocks[0] < bound.blocks[1] < bound.blocks[2] <= 0.9
    assert bound.forward == pytest.approx(math.prod(1 + each for each in bound.blocks), rel=1e-6)
    assert bound.inverse == pytest.approx(
        math.prod(1 / (1 - each) for each in bound.blocks), rel=1e-6
    )
    with pytest.raises(AttributeError):
        bound.forward = 1.0  # type: ignore[misc]


def test_a_conditional_map_is_bounded_for_every_context() -> None:
    affine = randomised(transforms.ConditionalAffine(2, 3), spread=2.0)
    context = 100 * torch.randn(20, 3, dtype=torch.float64)
    values = singular_values(affine, torch.randn(20, 2, dtype=torch.float64), context)
    forward, inverse = lipschitz_constants(affine)
    assert 100 < float(values.max()) <= forward
    assert 100 < float(1 / values.min()) <= inverse
    assert math.isfinite(ResidualFlow(2, 8, 1, context_features=3).lipschitz_bound().forward)


class Shift(nflows.transforms.Transform):
    """A transform of a user, which says nothing."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs + 1, inputs.new_zeros(inputs.shape[0])


class Stated(Shift):
    """One that says what it guarantees."""

    def lipschitz_constants(self) -> tuple[float, float]:
        return 1.0, 1.0


class Overridden(transforms.ResidualTransform):
    """A block of a user, who may do anything with it."""


def test_what_is_unknown_is_infinite() -> None:
    unknown = (math.inf, math.inf)
    assert lipschitz_constants(Shift()) == unknown
    assert lipschitz_constants(Stated()) == (1, 1)
    assert lipschitz_constants(Overridden(Scaled(0.5))) == unknown
    assert lipschitz_constants(transforms.ResidualTransform(nn.LSTM(2, 2))) == unknown
    forward, inverse = lipschitz_constants(transforms.ResidualTransform(Scaled(1.5)))
    assert forward == pytest.approx(2.5)
    assert inverse == math.inf
    whole = transforms.CompositeTransform([Shift(), transforms.ResidualTransform(nn.LSTM(2, 2))])
    flow = flows.Flow(whole, flows.StandardNormal([2]))
    assert flow.lipschitz_bound() == flows.FlowLipschitz((math.inf,), *unknown)


def test_a_logit_stretches_without_bound_at_its_ends() -> None:
    forward, inverse = lipschitz_constants(transforms.LogitTransform(17))
    rows = torch.linspace(0.1, 16.9, 50, dtype=torch.float64)[:, None, None, None]
    values = singular_values(transforms.LogitTransform(17), rows)
    assert forward == math.inf
    assert float(1 / values.min()) <= inverse <= 1.01 * float(1 / values.min())
    assert lipschitz_constants(transforms.UniformDequantization()) == (1, math.inf)


class States(transforms.ActNorm):
    """States two constants, whatever it does."""

    def __init__(self, forward: float, inverse: float) -> None:
        super().__init__(2)
        self.stated = forward, inverse

    def lipschitz_constants(self) -> tuple[float, float]:
        return self.stated


def test_products_of_constants_are_above_the_exact_ones() -> None:
    """A product is rounded, and down as often as up."""
    for index in range(1, 100):
        forward, inverse = 1 + index / 7, 1 + index / 13
        parts = [States(forward, inverse)] * 3
        whole = lipschitz_constants(transforms.CompositeTransform(parts))
        for bound, each in zip(whole, (forward, inverse), strict=True):
            exact = Fraction(each) ** 3
            assert exact <= Fraction(bound) <= exact * Fraction(1 + 1e-14)


def test_an_inverse_has_the_constants_of_the_other_direction() -> None:
    inverse = nflows.transforms.InverseTransform(States(2.0, 3.0))
    assert lipschitz_constants(inverse) == (3.0, 2.0)


def test_what_leaves_a_scale_early_is_no_shorter_than_it_was() -> None:
    """The last scale shrinks the half that it is given to a tenth, and not the other one."""
    whole = nflows.transforms.MultiscaleCompositeTransform(2)
    whole.add_transform(States(1.0, 1.0), (4, 2, 2))
    whole.add_transform(States(0.1, 0.1), (2, 2, 2))
    forward, inverse = lipschitz_constants(whole)
    assert forward == pytest.approx(1.0)
    assert inverse == pytest.approx(1.0)


# --- parameters that are not finite ---------------------------------------------------------------


def spoiled(transform: Any, name: str, value: float) -> Any:
    parameter = transform.get_parameter(name)
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    return transform


SPOILED: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "act-norm": (lambda: transforms.ActNorm(2), ("log_scale",)),
    "act-norm-of-nflows": (lambda: nflows.transforms.ActNorm(2), ("log_scale",)),
    "spline": (
        lambda: transforms.ElementwiseRationalQuadraticSpline(2),
        ("sizes", "log_slopes"),
    ),
    "linear": (lambda: transforms.LinearTransform(2), ("factors",)),
    "lu-of-nflows": (lambda: nflows.transforms.LULinear(2), ("unconstrained_upper_diag",)),
    "conditional": (lambda: transforms.ConditionalAffine(2, 1), ("net.0.weight", "net.4.bias")),
    "block": (lambda: ResidualFlow(2, 8, 1)._transform._transforms[3], ("net.layers.0.weight",)),
}


@pytest.mark.parametrize(
    ("name", "parameter"), [(name, each) for name, case in SPOILED.items() for each in case[1]]
)
def test_nothing_is_certified_of_parameters_that_are_nan(name: str, parameter: str) -> None:
    """A spline was certified as an isometry, and a matrix raised an error of LAPACK."""
    transform = spoiled(SPOILED[name][0](), parameter, math.nan)
    unknown = (math.inf, math.inf)
    assert lipschitz_constants(transform) == unknown
    own = getattr(transform, "lipschitz_constants", None)
    assert own is None or own() == unknown
    if name != "conditional":
        whole = transforms.CompositeTransform([transform, States(2.0, 0.5)])
        assert lipschitz_constants(whole) == unknown


class Unsure(nn.Module):
    """A network whose bound is NaN."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs

    def lipschitz_bound(self) -> float:
        return math.nan


@pytest.mark.parametrize("kind", [transforms.ResidualTransform, transforms.MonotoneTransform])
def test_a_bound_that_is_nan_is_none(kind: type[transforms.ResidualTransform]) -> None:
    block = kind(Unsure())
    assert lipschitz_constants(block) == (math.inf, math.inf)
    flow = flows.Flow(transforms.CompositeTransform([block]), flows.StandardNormal([2]))
    assert flow.lipschitz_bound() == flows.FlowLipschitz((math.inf,), math.inf, math.inf)


def test_scales_do_not_hide_a_part_that_is_nan_or_shrinks_all_to_nothing() -> None:
    """max(1.0, nan) is 1.0."""
    for stated in ((math.nan, math.nan), (math.inf, math.inf)):
        whole = nflows.transforms.MultiscaleCompositeTransform(3)
        whole.add_transform(States(1.0, 1.0), (8, 2, 2))
        whole.add_transform(States(0.0, 0.0), (4, 2, 2))
        whole.add_transform(States(*stated), (2, 2, 2))
        assert lipschitz_constants(whole) == (math.inf, math.inf)


def test_of_a_flow_whose_parameters_are_all_nan_nothing_is_known() -> None:
    flow = ResidualFlow(2, 8, 1)
    for parameter in flow.parameters():
        nn.init.constant_(parameter, math.nan)
    assert flow.lipschitz_bound() == flows.FlowLipschitz((math.inf,), math.inf, math.inf)


def test_splines_of_pixels_have_the_constants_of_their_features() -> None:
    torch.manual_seed(0)
    pixels = PixelwiseSpline((1, 2, 2))
    pixels.initialize(torch.randn(200, 1, 2, 2).sinh())
    features = transforms.ElementwiseRationalQuadraticSpline(4, 16)
    features.load_state_dict(pixels.state_dict())
    assert lipschitz_constants(pixels) == features.lipschitz_constants()
    assert max(features.lipschitz_constants()) < math.inf


def test_scales_of_images_have_the_constants_of_their_parts() -> None:
    whole = transforms.multiscale((1, 4, 4), 2, lambda shape: [States(2.0, 3.0)])
    forward, inverse = lipschitz_constants(whole)
    assert forward == pytest.approx(4.0)
    assert inverse == pytest.approx(9.0)
