"""Models built on the meta device, then given a state: nothing may stand outside of the state."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from nflows_iresnet import ResidualFlow, flows, nn, transforms
from nflows_iresnet.classifiers import InvertibleClassifier

FLOWS: dict[str, Callable[[], Any]] = {
    "residual": lambda: ResidualFlow(2, 16, 2),
    "conditional": lambda: ResidualFlow(2, 16, 2, context_features=2),
    "iresnet": lambda: flows.InvertibleResNet(2, 16, 2),
    "hybrid": lambda: flows.HybridFlow(2, 8, 2),
    "hybrid-masked": lambda: flows.HybridFlow(2, 8, 2, partner=flows.masked_autoregressive),
    "image": lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, num_scales=1, levels=4),
    "image-without-logit": lambda: flows.ImageResidualFlow(
        (1, 4, 4), 4, 1, num_scales=1, levels=4, alpha=None
    ),
}


def emptied(model: Any, state: dict[str, Tensor]) -> Any:
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def assigned(model: Any, state: dict[str, Tensor]) -> Any:
    model.load_state_dict(state, assign=True)
    return model


WAYS = {"to_empty": emptied, "assign": assigned}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def rebuilt(factory: Callable[[], Any], way: Callable[..., Any], state: dict[str, Tensor]) -> Any:
    with torch.device("meta"):
        model = factory()
    return way(model, deepcopy(state)).eval()


def numbers(flow: Any, rows: Tensor, context: Tensor | None) -> list[Tensor]:
    values = []
    for seed in range(2):
        torch.manual_seed(seed)
        values += [flow.log_prob(rows, context), flow.transform_to_noise(rows, context)]
        values += [flow.sample(3, context), *flow.sample_and_log_prob(3, context)]
    return values


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_gives_the_numbers_of_the_one_whose_state_it_got(
    name: str, dtype: torch.dtype, way: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    original = FLOWS[name]().to(dtype)
    rows = torch.rand(8, 1, 4, 4).mul(4) if "image" in name else torch.randn(8, 2)
    rows, context = rows.to(dtype), torch.randn(8, 2).to(dtype) if name == "conditional" else None
    original.log_prob(rows, context)
    other = rebuilt(lambda: FLOWS[name]().to(dtype), way, original.state_dict())
    wanted = numbers(original.eval(), rows, context)
    torch.testing.assert_close(numbers(other, rows, context), wanted, rtol=0, atol=0)
    other.double()
    assert other.sample(2, None if context is None else context.double()).dtype == torch.float64
    deepcopy(other).to("cpu")


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "act-norm": lambda: transforms.ActNorm(2),
    "marginal-spline": lambda: transforms.ElementwiseRationalQuadraticSpline(2, bound=3.0),
    "conditional-affine": lambda: transforms.ConditionalAffine(2, 2),
}


@every_way
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_the_numbers_of_the_one_whose_state_it_got(
    name: str, way: Callable[..., Any]
) -> None:
    torch.manual_seed(0)
    original, rows, context = TRANSFORMS[name](), torch.randn(8, 2), torch.randn(8, 2)
    original(rows, context)
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    other = rebuilt(TRANSFORMS[name], way, original.state_dict())
    for direction in ("forward", "inverse"):
        found, wanted = (getattr(each, direction)(rows, context) for each in (other, original))
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@every_way
def test_an_unstarted_act_norm_waits_for_data_after_it_was_filled(way: Callable[..., Any]) -> None:
    norm = rebuilt(lambda: transforms.ActNorm(2), way, transforms.ActNorm(2).state_dict()).train()
    outputs, _ = norm(5 + 3 * torch.randn(500, 2))
    assert outputs.std().item() == pytest.approx(1, abs=0.01)


@every_way
def test_a_classifier_gives_the_numbers_of_the_one_whose_state_it_got(
    way: Callable[..., Any],
) -> None:
    def build() -> InvertibleClassifier:
        return InvertibleClassifier((1, 4, 4), 3, 4, num_blocks=1, padding=1, levels=17)

    torch.manual_seed(0)
    original, images = build(), torch.randint(0, 17, (6, 1, 4, 4))
    original(images)
    other = rebuilt(build, way, original.state_dict())
    original.eval()
    torch.testing.assert_close(other(images), original(images), rtol=0, atol=0)
    torch.testing.assert_close(
        other.decode(other.encode(images)), images.float(), rtol=0, atol=1e-3
    )


def test_shapes_are_known_without_values() -> None:
    block = transforms.ResidualTransform(nn.LipschitzMLP(2, [8])).to("meta")
    outputs, logabsdet = block(torch.empty(3, 2, device="meta"))
    assert outputs.shape == (3, 2)
    assert logabsdet.shape == (3,)
