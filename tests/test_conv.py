"""Convolutional networks: certified at every moment and size, and good for a flow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nflows_iresnet import logdet, nn, testing, transforms
from nflows_iresnet.nn.convolution import PaddingMode
from tests.test_conv_linearization import images, jacobians, network
from tests.test_conv_norms import PADDINGS, true_norm


def balanced_norms(
    net: nn.LipschitzCNN, size: tuple[int, int], padding_mode: PaddingMode
) -> list[float]:
    """The norms of T_i W_i T_{i-1}^-1 of the weights that are used, on images of one size."""
    inner = [each.detach().clamp(-7, 7).exp().double() for each in net.log_scales]
    one = torch.ones(1, dtype=torch.float64)
    triples = zip([one, *inner], net.effective_weights(), [*inner, one], strict=True)
    return [
        true_norm(after[:, None, None, None] * weight / before[:, None, None], size, padding_mode)
        for before, weight, after in triples
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("padding_mode", PADDINGS)
@pytest.mark.parametrize("oversampling", [4, None])
def test_bound_holds_for_hostile_weights(
    dtype: torch.dtype, padding_mode: PaddingMode, oversampling: int | None
) -> None:
    torch.manual_seed(0)
    norm = nn.FourierNorm(oversampling)
    net = nn.LipschitzCNN(2, [8, 8], coeff=0.9, padding_mode=padding_mode, norm=norm).to(dtype)
    for factor in (1e6, 1e6, 1e-18, 1e-3):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(factor)
        for mode in (True, False):
            net.train(mode)
            assert net.lipschitz_bound() <= 0.9
        for size in ((1, 6), (5, 4)):
            assert math.prod(balanced_norms(net, size, padding_mode)) <= net.lipschitz_bound()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bound_holds_after_violent_steps_and_reloading(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.LipschitzCNN(2, [6, 6], 2, coeff=0.8, optional_context=True).to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=100.0)
    for _ in range(60):
        loss = 100 * net(torch.randn(4, 2, 4, 4, dtype=dtype)).sin().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0.5 < net.lipschitz_bound() <= 0.8
    fresh = nn.LipschitzCNN(2, [6, 6], 2, coeff=0.8, optional_context=True).to(dtype)
    fresh.load_state_dict(net.state_dict())
    assert fresh.lipschitz_bound() == net.lipschitz_bound()
    inputs, context = 10 * torch.randn(4, 2, 3, 3), 1e3 * torch.randn(4, 2).double()
    testing.check_lipschitz(fresh.double().bind(context), inputs, 0.8, num_steps=5)


def test_lipschitz_conv2d() -> None:
    torch.manual_seed(0)
    layer = nn.LipschitzConv2d(3, 4, 3, coeff=0.5)
    layer.weight.data.mul_(1e6)
    assert layer.lipschitz_bound() == pytest.approx(0.5, rel=1e-5)
    assert layer.lipschitz_bound() <= 0.5
    truths = [true_norm(layer.effective_weight(), (size, size), "zeros") for size in (1, 6, 13)]
    assert max(truths) <= 0.5
    assert truths[-1] > 0.45
    layer.weight.data.mul_(1e-9)
    torch.testing.assert_close(layer.effective_weight(), layer.weight)
    net = torch.nn.Sequential(layer, torch.nn.ReLU(), torch.nn.Conv2d(4, 3, 3, padding=1))
    assert nn.lipschitz_bound(net) == layer.lipschitz_bound() * nn.lipschitz_bound(net[2])


def test_power_iteration_is_reported_by_its_true_bound_and_can_be_loaded() -> None:
    torch.manual_seed(0)

    def build() -> nn.LipschitzCNN:
        norm = nn.ConvPowerIteration((4, 5), num_initial_steps=0)
        return nn.LipschitzCNN(2, [8, 8], coeff=0.9, norm=norm)

    net, inputs = build(), torch.randn(3, 2, 4, 5)
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.mul_(3)  # type: ignore[operator]
    assert net.bind().lipschitz is None
    assert net.lipschitz_bound() > 0.9
    net.eval()
    assert torch.equal(net(inputs), net(inputs))
    net.train()
    for _ in range(100):
        net(inputs)
    assert net.lipschitz_bound() <= 0.9 * 1.5
    fresh = build()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh.eval()(inputs), net.eval()(inputs))


@pytest.mark.parametrize("padding_mode", PADDINGS)
def test_exact_log_det_of_a_tiny_image(padding_mode: PaddingMode) -> None:
    net, inputs = network(padding_mode=padding_mode), images(3, 2, (3, 3))
    block = transforms.ResidualTransform(net, estimator=logdet.Exact())
    expected = torch.linalg.slogdet(torch.eye(18) + jacobians(net, inputs)).logabsdet
    torch.testing.assert_close(block(inputs)[1], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("exact_trace", [True, False])
def test_roulette_is_unbiased(exact_trace: bool) -> None:
    torch.manual_seed(0)
    net, inputs = network(), images(2, 2, (4, 4))
    exact = logdet.Exact().estimate(net, inputs).logabsdet
    estimator = logdet.RussianRoulette(num_probes=200, exact_trace=exact_trace)
    with torch.no_grad():
        estimate = estimator.estimate(net, inputs)
    assert estimate.standard_error is not None
    error = (estimate.logabsdet - exact).abs()
    assert bool((error <= 6 * estimate.standard_error).all())
    assert bool((estimate.standard_error < 0.2).all())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"hidden_channels": [4], "kernel_sizes": (3, 1, 3)}, "kernel_sizes"),
        ({"hidden_channels": 4}, "hidden_channels"),
        ({"channels": 0}, "channels"),
        ({"kernel_sizes": (3, 2, 3)}, "odd"),
        ({"padding_mode": "reflect"}, "padding_mode"),
        ({"coeff": 1.0}, "coeff"),
        ({"norm": nn.SpectralNorm()}, "ConvNorm"),
        ({"norm": nn.ConvPowerIteration((3, 3), "circular")}, "iterates with"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        nn.LipschitzCNN(**{"channels": 2, "hidden_channels": [4, 4], **options})


def test_dense_layers_refuse_norms_of_convolutions() -> None:
    with pytest.raises(ValueError, match="MatrixNorm"):
        nn.LipschitzLinear(2, 2, norm=nn.FourierNorm())  # type: ignore[arg-type]


def test_bad_inputs_are_refused() -> None:
    net = network(padding_mode="circular", kernels=(5, 1, 3))
    with pytest.raises(ValueError, match="images of shape"):
        net(torch.zeros(2, 3, 3).double())
    with pytest.raises(ValueError, match="more than once"):
        net(images(1, 2, (1, 4)))
    with pytest.raises(ValueError, match="context_features"):
        net(images(1, 2, (4, 4)), torch.zeros(1, 1).double())
