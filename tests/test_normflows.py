"""Adapters between nflows and normflows: directions, signs, models of both, and imports."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import normflows as nf
import pytest
import torch
from nflows import transforms as nflows_transforms
from nflows.nn.nets import ResidualNet
from torch import Tensor

from nflows_iresnet import ResidualFlow, ResidualTransform
from nflows_iresnet.interop.normflows import FromNormflows, ToNormflows
from nflows_iresnet.nn import LipschitzMLP

NN = nf.flows
ROWS = 4


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _block() -> ResidualTransform:
    return ResidualTransform(LipschitzMLP(3, [16, 16]))


def test_package_does_not_import_normflows() -> None:
    program = "import sys, nflows_iresnet; sys.exit('normflows' in sys.modules)"
    finished = subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False)
    assert finished.returncode == 0


def _coupling() -> nflows_transforms.Transform:
    return nflows_transforms.AffineCouplingTransform(
        torch.tensor([1, -1, 1]), lambda i, o: ResidualNet(i, o, 8)
    )


def _spline() -> nflows_transforms.Transform:
    return nflows_transforms.PiecewiseRationalQuadraticCouplingTransform(
        torch.tensor([1, -1, 1]), lambda i, o: ResidualNet(i, o, 8), tails="linear", tail_bound=3.0
    )


TRANSFORMS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "residual": (_block, (3,)),
    "preset": (lambda: ResidualFlow(3, 8, 2)._transform.eval(), (3,)),
    "coupling": (_coupling, (3,)),
    "spline": (_spline, (3,)),
    "maf": (lambda: nflows_transforms.MaskedAffineAutoregressiveTransform(3, 8), (3,)),
    "lu": (lambda: nflows_transforms.LULinear(3, identity_init=False), (3,)),
    "batch-norm": (lambda: nflows_transforms.BatchNorm(3).eval(), (3,)),
    "inverse": (lambda: nflows_transforms.InverseTransform(_block()), (3,)),
    "convolution": (lambda: nflows_transforms.OneByOneConvolution(3), (3, 2, 2)),
    "squeeze": (nflows_transforms.SqueezeTransform, (4, 2, 2)),
    "normflows-and-back": (lambda: FromNormflows(NN.LULinearPermute(3)), (3,)),
}


def _jacobian(flow: ToNormflows, row: Tensor) -> Tensor:
    def data(flat: Tensor) -> Tensor:
        values: Tensor = flow(flat.reshape(1, *row.shape))[0]
        return values.flatten()

    return torch.as_tensor(torch.autograd.functional.jacobian(data, row.flatten()))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_forward_of_a_flow_is_noise_to_data(name: str) -> None:
    factory, shape = TRANSFORMS[name]
    transform = factory().double()
    flow = ToNormflows(transform)
    noise = torch.randn(ROWS, *shape, dtype=torch.float64)
    data, log_det = flow(noise)
    jacobian = torch.stack([_jacobian(flow, row) for row in noise])
    back, inverse_log_det = flow.inverse(data)
    assert log_det.shape == inverse_log_det.shape == (ROWS,)
    assert log_det.dtype == torch.float64
    torch.testing.assert_close(data, transform.inverse(noise)[0])
    torch.testing.assert_close(log_det, torch.linalg.slogdet(jacobian).logabsdet, atol=1e-9, rtol=0)
    torch.testing.assert_close(back, noise, atol=1e-9, rtol=0)
    torch.testing.assert_close(inverse_log_det, -log_det, atol=1e-9, rtol=0)


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated")
def test_images_through_both_adapters() -> None:
    glow = ToNormflows(FromNormflows(NN.GlowBlock(4, 8, init_zeros=False)))
    convolution = ToNormflows(nflows_transforms.OneByOneConvolution(8))
    bases = [nf.distributions.DiagGaussian((4, 2, 2)) for _ in range(2)]
    levels = [[glow], [convolution, NN.Squeeze()]]
    flow = nf.MultiscaleFlow(bases, levels, [NN.Merge()], class_cond=False)
    assert flow.forward_kld(torch.randn(8, 2, 4, 4)).isfinite()
    samples, log_q = flow.sample(8)
    torch.testing.assert_close(flow.log_prob(samples, None), log_q, atol=1e-4, rtol=0)


def test_conditional_model_equals_the_one_of_nflows() -> None:
    flow = ResidualFlow(3, 16, num_layers=2, context_features=2)
    data, context = torch.randn(ROWS, 3), torch.randn(ROWS, 2)
    expected = flow.log_prob(data, context)
    base = nf.distributions.DiagGaussian(3, trainable=False)
    model = nf.ConditionalNormalizingFlow(base, [ToNormflows(flow._transform)])
    torch.testing.assert_close(model.log_prob(data, context), expected)
    samples, log_q = model.sample(ROWS, context)
    torch.testing.assert_close(flow.log_prob(samples, context), log_q, atol=1e-4, rtol=0)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_normflows_adds_up_in_float32(kind: str) -> None:
    flow = ToNormflows(_block()) if kind == "ours" else NN.MaskedAffineAutoregressive(3, 8)
    model = nf.NormalizingFlow(nf.distributions.DiagGaussian(3), [flow]).double()
    data = torch.randn(ROWS, 3, dtype=torch.float64)
    exact, loss = -model.log_prob(data).mean(), model.forward_kld(data)
    assert flow.inverse(data)[1].dtype == exact.dtype == torch.float64
    assert loss.dtype == torch.float32
    assert exact.item() == pytest.approx(loss.item(), rel=1e-5)
    assert exact.item() != loss.item()


@pytest.mark.peer
def test_residual_of_normflows_takes_neither_frozen_parameters_nor_context() -> None:
    block, data = NN.Residual(nf.nets.LipschitzMLP([3, 16, 3])), torch.randn(ROWS, 3)
    base = nf.distributions.DiagGaussian(3)
    with pytest.raises(RuntimeError, match="does not require grad"):
        nf.NormalizingFlow(base, [block], base).reverse_kld(ROWS, score_fn=False)
    with pytest.raises(TypeError, match="context"):
        nf.ConditionalNormalizingFlow(base, [block]).log_prob(data, context=data)
