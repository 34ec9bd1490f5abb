"""FromNormflows: every kind of flow of normflows keeps the contract as far as normflows can."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import normflows as nf
import pytest
import torch
from nflows.flows import Flow
from nflows.transforms import CompositeTransform, InverseNotAvailable
from torch import Tensor, nn

from nflows_iresnet import ResidualTransform, testing
from nflows_iresnet.flows import StandardNormal
from nflows_iresnet.interop.normflows import FromNormflows, ToNormflows
from nflows_iresnet.nn import LipschitzMLP

NN = nf.flows
ROWS = 4

AUTOCAST = {"autocast": "normflows computes in bfloat16 inside autocast: errors of 1e-3 to 1e-1"}
ZEROS = {"vmap_and_jacrev": "adds in place to zeros that vmap does not batch"}
SPLINE = {"vmap_and_jacrev": "selects rows by a boolean mask, whose shape depends on the data"}
EMPTY = {"few_rows": "reshapes an empty batch to an ambiguous shape"}
FORGETS = {"forgotten_context": "without its context it is another density, silently"}
SINGLE = {"inverse_gradients": "the log-determinant is computed in float32 by a float64 flow"}


@dataclass(frozen=True)
class Case:
    """A flow, its shapes, and the clauses it cannot keep, with reasons."""

    factory: Callable[[], nn.Module]
    shape: tuple[int, ...] = (4,)
    context_features: int | None = None
    excluded: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, num_rows: int = ROWS) -> tuple[FromNormflows, Tensor, Tensor | None]:
        torch.manual_seed(0)
        transform = FromNormflows(self.factory())
        inputs = torch.randn(num_rows, *self.shape)
        if self.context_features is None:
            return transform, inputs, None
        return transform, inputs, torch.randn(num_rows, self.context_features)


def _mlp(features: int, outputs: int) -> nn.Module:
    return nf.nets.MLP([features, 16, outputs])


def _masked() -> nn.Module:
    return NN.MaskedAffineFlow(torch.tensor([1.0, 0, 1, 0]), _mlp(4, 4), _mlp(4, 4))


def _class_conditional() -> nn.Module:
    flow = NN.CCAffineConst(4, 2)
    nn.init.normal_(flow.s_cc)
    return flow


def _spline(kind: str, context: int | None = None) -> nn.Module:
    if kind == "coupled":
        return NN.CoupledRationalQuadraticSpline(4, 1, 16, num_context_channels=context)
    return NN.AutoregressiveRationalQuadraticSpline(
        4, 1, 16, num_context_channels=context, init_identity=False
    )


def _composite() -> nn.Module:
    return NN.Composite([NN.AffineConstFlow(4), NN.LULinearPermute(4, identity_init=False)])


CASES: dict[str, Case] = {
    "coupling-block": Case(
        lambda: NN.AffineCouplingBlock(_mlp(2, 4)), excluded={**AUTOCAST, **ZEROS}
    ),
    "masked-affine": Case(_masked, excluded=AUTOCAST),
    "affine-constant": Case(lambda: NN.AffineConstFlow(4)),
    "act-norm": Case(lambda: NN.ActNorm(4)),
    "lu-permute": Case(lambda: NN.LULinearPermute(4, identity_init=False), excluded=AUTOCAST),
    "affine-lu": Case(lambda: NN.InvertibleAffine(4), excluded=AUTOCAST),
    "glow": Case(
        lambda: NN.GlowBlock(4, 8, init_zeros=False), (4, 2, 2), excluded={**AUTOCAST, **ZEROS}
    ),
    "spline-coupled": Case(lambda: _spline("coupled"), excluded={**AUTOCAST, **SPLINE, **EMPTY}),
    "spline-coupled-context": Case(
        lambda: _spline("coupled", 2),
        context_features=2,
        excluded={**AUTOCAST, **SPLINE, **EMPTY},
    ),
    "spline-autoregressive-context": Case(
        lambda: _spline("autoregressive", 2),
        context_features=2,
        excluded={**AUTOCAST, **SPLINE, **FORGETS},
    ),
    "maf-context": Case(
        lambda: NN.MaskedAffineAutoregressive(4, 16, context_features=2),
        context_features=2,
        excluded=FORGETS,
    ),
    "class-conditional": Case(_class_conditional, context_features=2),
    "planar-leaky": Case(lambda: NN.Planar(4, act="leaky_relu"), excluded=SINGLE),
    "reverse": Case(lambda: NN.Reverse(NN.AffineConstFlow(4))),
    "composite": Case(_composite, excluded={**AUTOCAST, **ZEROS, **SINGLE}),
    "there-and-back": Case(lambda: ToNormflows(ResidualTransform(LipschitzMLP(4, [8])))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
def test_contract(name: str) -> None:
    kept = tuple(clause for clause in testing.CLAUSES if clause not in CASES[name].excluded)
    testing.check_transform(*CASES[name].arguments(), clauses=kept)


@pytest.mark.peer
@pytest.mark.parametrize(
    ("name", "clause"), [(name, clause) for name, case in CASES.items() for clause in case.excluded]
)
@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
def test_clauses_that_normflows_does_not_keep(name: str, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        testing.check_transform(*CASES[name].arguments(num_rows=64), clauses=(clause,))


def test_squeeze_changes_the_shape_and_back() -> None:
    transform, images = FromNormflows(NN.Squeeze()), torch.randn(ROWS, 2, 4, 4)
    outputs, logabsdet = transform(images)
    assert outputs.shape == (ROWS, 8, 2, 2)
    assert torch.equal(logabsdet, torch.zeros(ROWS))
    assert torch.equal(transform.inverse(outputs)[0], images)


def test_float32_zeros_of_a_permutation_follow_the_precision_of_the_data() -> None:
    _, logabsdet = FromNormflows(NN.Permute(3))(torch.randn(ROWS, 3, dtype=torch.float64))
    assert logabsdet.dtype == torch.float64


@pytest.mark.parametrize("flow", [NN.Planar(3), NN.Radial(3)], ids=["planar", "radial"])
def test_flows_without_an_inverse_sample_but_have_no_density(flow: nn.Module) -> None:
    transform, noise = FromNormflows(flow).double(), torch.randn(ROWS, 3, dtype=torch.float64)
    data, logabsdet = transform.inverse(noise)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: transform.inverse(z[None])[0][0]))(noise)
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(jacobian).logabsdet)
    with pytest.raises(InverseNotAvailable, match="noise to data only"):
        transform(data)


def test_what_is_no_bijection_of_one_tensor_is_refused() -> None:
    chain = NN.MetropolisHastings(nn.Identity(), nn.Identity(), steps=1)
    with pytest.raises(ValueError, match="Markov chain"):
        FromNormflows(chain)
    for block in (NN.Residual(_mlp(4, 4)), nf.flows.Composite([NN.Residual(_mlp(4, 4))])):
        with pytest.raises(ValueError, match="another number than its log-determinant"):
            FromNormflows(block)
    with pytest.raises(ValueError, match="maps to 2 tensors"):
        FromNormflows(NN.Split()).inverse(torch.randn(ROWS, 4))
    with pytest.raises(ValueError, match="needs a context"):
        FromNormflows(_class_conditional())(torch.randn(ROWS, 4))


def test_a_context_goes_to_the_flows_that_take_one() -> None:
    inputs, context = torch.randn(ROWS, 4), torch.randn(ROWS, 2)
    unaware = FromNormflows(NN.AffineConstFlow(4))
    assert torch.equal(unaware(inputs, context)[0], unaware(inputs)[0])
    aware = FromNormflows(NN.MaskedAffineAutoregressive(4, 16, context_features=2))
    assert not torch.equal(aware(inputs, context)[0], aware(inputs)[0])


class _ShiftsToData(nn.Module):
    """Takes a context on the way to data alone."""

    def forward(self, noise: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, float]:
        return noise + context, 0.0

    def inverse(self, data: torch.Tensor) -> tuple[torch.Tensor, float]:
        return data - 1, 0.0


class _ShiftsToNoise(nn.Module):
    """Takes a context on the way to noise alone."""

    def forward(self, noise: torch.Tensor) -> tuple[torch.Tensor, float]:
        return noise + 1, 0.0

    def inverse(self, data: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, float]:
        return data - context, 0.0


def test_each_direction_says_whether_it_takes_a_context() -> None:
    rows, context = torch.zeros(ROWS, 4), torch.full((ROWS, 4), 3.0)
    for flow, to_noise, to_data in ((_ShiftsToData(), -1.0, 3.0), (_ShiftsToNoise(), -3.0, 1.0)):
        transform = FromNormflows(flow)
        assert torch.equal(transform(rows, context)[0], torch.full((ROWS, 4), to_noise))
        assert torch.equal(transform.inverse(rows, context)[0], torch.full((ROWS, 4), to_data))


def test_a_model_of_normflows_as_a_model_of_nflows() -> None:
    torch.manual_seed(0)
    flows = [NN.AffineCouplingBlock(_mlp(2, 4)), NN.LULinearPermute(4, identity_init=False)]
    theirs = nf.NormalizingFlow(nf.distributions.DiagGaussian(4, trainable=False), flows)
    transform = CompositeTransform([FromNormflows(flow) for flow in reversed(theirs.flows)])
    ours, data = Flow(transform, StandardNormal([4])), torch.randn(ROWS, 4)
    torch.testing.assert_close(ours.log_prob(data), theirs.log_prob(data))
    samples, log_prob = ours.sample_and_log_prob(ROWS)
    torch.testing.assert_close(theirs.log_prob(samples), log_prob)


def test_residual_blocks_are_taken_for_two_features_only() -> None:
    block = nf.flows.Residual(nf.nets.LipschitzMLP([3, 8, 3]), brute_force=True)
    transform = FromNormflows(block)
    for direction in (transform.forward, transform.inverse):
        with pytest.raises(ValueError, match=r"exact for two features, and was given \(5, 3\)"):
            direction(torch.zeros(5, 3))
