"""`print(flow)`: what a flow is made of, in a few lines and without computing anything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain

import pytest
import torch
from torch import nn as torch_nn

from nflows_iresnet import flows, logdet, nn, solvers, transforms

PRESETS: dict[str, Callable[[], flows.Flow]] = {
    "residual": lambda: flows.ResidualFlow(6, 64, 6),
    "deep": lambda: flows.ResidualFlow(4, 8, 60),
    "i-resnet": lambda: flows.InvertibleResNet(2, 16, 3),
    "context": lambda: flows.ResidualFlow(2, 8, 3, context_features=2, net=nn.LipschitzDenseNet),
    "image": lambda: flows.ImageResidualFlow(
        (1, 32, 32), 8, 2, num_scales=5, levels=17, marginal_bins=4, linear=True
    ),
    "hybrid": lambda: flows.HybridFlow(4, 16, 7),
}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_printed_in_at_most_25_lines(name: str) -> None:
    flow = PRESETS[name]()
    text = str(flow)
    assert text == repr(flow) == flow.summary()
    assert len(text.splitlines()) <= 25
    assert text.startswith(f"{type(flow).__name__}: ")
    assert f"{sum(each.numel() for each in flow.parameters()):,} parameters" in text
    for word in ("certified bound: Lip(g) <= 0.9", "estimator=", "solver=", "wait for data"):
        assert word in text


def test_layers_that_repeat_are_written_once() -> None:
    lines = flows.ResidualFlow(6, 16, 6).summary().splitlines()
    spline, linear = "ElementwiseRationalQuadraticSpline", "LinearTransform(features=6, bias=True)"
    assert [line.strip() for line in lines[1:8]] == [
        "ActNorm",
        f"{spline}(features=6, num_bins=16, bound=4.0)",
        linear,
        "ResidualTransform",
        f"5 x [{linear}, {spline}(features=6, num_bins=8, bound=4.0), ResidualTransform]",
        "ActNorm",
        "StandardNormal",
    ]
    images = PRESETS["image"]().summary()
    spline = "ElementwiseRationalQuadraticSpline(features=16, num_bins=8, bound=4.0)"
    mixed = f"2 x [ActNorm, LinearTransform(features=16, bias=True), {spline}, ResidualTransform]"
    assert f"scale 3: SqueezeTransform, {mixed}, ActNorm" in images
    hybrid = flows.HybridFlow(4, 16, 7).summary()
    linear, spline = "LinearTransform(features=4, bias=True)", "ElementwiseRationalQuadraticSpline"
    coupling = "SplineCoupling(num_bins=8, bound=5.0)"
    before = f"{spline}(features=4, num_bins=8, bound=4.0)"
    mixed = f"3 x [{linear}, {coupling}, {linear}, {before}, ResidualTransform]"
    assert mixed in hybrid


def test_layers_that_all_differ_are_shortened_and_counted() -> None:
    blocks = [
        transforms.ResidualTransform(
            nn.LipschitzMLP(4, [width], coeff=width / 100),
            estimator=logdet.PowerSeries(num_terms=width),
            solver=solvers.Anderson(max_steps=width),
        )
        for width in range(3, 60)
    ]
    splines = (
        transforms.ElementwiseRationalQuadraticSpline(4, num_bins=bins) for bins in range(2, 59)
    )
    parts = chain.from_iterable(zip(splines, blocks, strict=True))
    flow = flows.Flow(
        transforms.CompositeTransform(parts),
        flows.StandardNormal([4]),
        torch_nn.Sequential(torch_nn.Linear(3, 3), torch_nn.Linear(3, 3)),
    )
    lines = flow.summary().splitlines()
    assert len(lines) <= 25
    assert any("more ..." in line for line in lines[1:14])
    assert "57 residual blocks" in flow.summary()
    assert "estimator=PowerSeries(num_probes=1, probe=Rademacher()" in flow.summary()
    assert "context through Sequential" in flow.summary()


def test_the_start_is_told() -> None:
    flow = flows.ResidualFlow(2, 8, 2)
    assert "start: 4 of 4 parts wait for data: initialize(rows)" in flow.summary()
    flow.initialize(torch.randn(100, 2))
    assert "start: made from data, in all 4 parts" in flow.summary()
    assert flow.summary() == copy.deepcopy(flow).summary()
    restored = flows.ResidualFlow(2, 8, 2)
    restored.load_state_dict(flow.state_dict())
    assert restored.summary() == flow.summary()
    with torch.device("meta"):
        assert "start: unknown" in flows.ResidualFlow(2, 8, 2).summary()


def test_nothing_is_computed_from_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = flows.ResidualFlow(2, 8, 2)
    for function in ("matrix_norm", "svdvals", "eigvalsh"):
        monkeypatch.setattr(torch.linalg, function, None)
    with torch.no_grad():
        next(flow.parameters()).fill_(torch.nan)
    assert "Lip(g) <= 0.97" in flow.summary()


def test_what_is_not_certified_is_said_to_be_none() -> None:
    estimated = flows.InvertibleResNet(2, 8, 2, norm=nn.PowerIteration()).summary()
    assert "certified bound: none for all weights; lipschitz_bound() computes" in estimated
    assert "Lip(g)" not in estimated
    foreign = flows.Flow(
        transforms.ResidualTransform(torch_nn.Linear(2, 2)), flows.StandardNormal([2])
    )
    assert "g=Linear\n  certified bound: none\n" in foreign.summary()


def test_a_flow_without_residual_blocks_has_a_summary_too() -> None:
    flow = flows.Flow(transforms.LinearTransform(2), flows.StandardNormal([2]))
    assert flow.summary().splitlines()[1:] == [
        "  LinearTransform(features=2, bias=True)",
        "  StandardNormal",
        "start: nothing depends on data",
    ]


def test_frozen_and_lazy_parameters_are_counted_apart() -> None:
    flow = flows.Flow(
        transforms.LinearTransform(2), flows.StandardNormal([2]), torch_nn.LazyLinear(3)
    )
    assert "6 parameters, and lazy ones, float32 on cpu" in flow.summary()
    next(flow._transform.parameters()).requires_grad_(False)
    assert "2 parameters, 4 frozen, and lazy ones" in flow.summary()


def test_strategies_in_force_are_shown() -> None:
    flow = flows.ResidualFlow(2, 8, 2)
    with transforms.using(flow, estimator=logdet.Exact()):
        assert "estimator=Exact(" in flow.summary()
    assert "estimator=Auto(" in flow.summary()
