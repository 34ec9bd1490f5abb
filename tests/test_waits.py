"""In training nothing makes the host wait for the device; elsewhere it waits where it must.

Each call is counted by `Operations`, and whatever waits beyond what is listed here fails by its
name. The tests run where there is a device: `pytest --device cuda`, or `--device pretended`, for
which the last test starts a process of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from nflows.flows import Flow as NflowsFlow
from torch import Tensor, nn

from nflows_iresnet import flows, logdet, solvers, transforms
from nflows_iresnet import nn as lipschitz_nn
from nflows_iresnet.classifiers import InvertibleClassifier
from tests import device
from tests.operations import Operations

Waits = Mapping[str, int]
LOOK = "solvers/base.py:read"
NONE: Waits = {}


@dataclass(frozen=True)
class Kind:
    """A model, its batch, and how many blocks and maps that start from a batch it has."""

    model: Callable[[], Any]
    shape: tuple[int, ...] = (3,)
    blocks: int = 2
    norms: int = 3
    whitenings: int = 0
    splines: int = 0
    context: int | None = None

    def batch(self) -> Tensor:
        torch.manual_seed(1)
        return torch.randn(16, *self.shape) if len(self.shape) == 1 else pixels(*self.shape)

    def conditions(self) -> Tensor | None:
        torch.manual_seed(2)
        return None if self.context is None else torch.randn(16, self.context)

    def starts(self) -> Waits:
        """At the first batch: what was learned, whether the rows are finite, and how many."""
        return {
            "transforms/normalization.py:_start": self.norms + self.whitenings + self.splines,
            "transforms/normalization.py:_largest_over_processes": self.norms,
            "transforms/normalization.py:_start_from": self.norms,
            "transforms/linear.py:<genexpr>": 2 * self.whitenings,
            "transforms/linear.py:_joined_moments": 3 * self.whitenings,
            "transforms/linear.py:_whitening": 3 * self.whitenings,
            "transforms/splines.py:_require_finite": self.splines,
        }


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 16, (4, *shape)) + torch.rand(4, *shape)


def vectors(
    features: int = 3, activation: Callable[[], nn.Module] | None = None, **options: Any
) -> Kind:
    context = options.get("context_features")

    def model() -> nn.Module:
        torch.manual_seed(0)
        chosen = activation and activation()
        return flows.ResidualFlow(features, 8, 2, activation=chosen, **options)

    splines = 2 if 3 <= features <= 32 else 1
    return Kind(model, shape=(features,), norms=3, whitenings=1, splines=splines, context=context)


def whitened() -> nn.Module:
    torch.manual_seed(0)
    block = transforms.ResidualTransform(lipschitz_nn.LipschitzMLP(3, [8]))
    linear = transforms.LinearTransform(3, initialization="whitening")
    chain = transforms.CompositeTransform([linear, block])
    return NflowsFlow(chain, flows.StandardNormal([3]))


def images(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return flows.ImageResidualFlow((1, 8, 8), 4, 2, num_scales=2, levels=16, **options)


FLOWS = {
    "default-2d": vectors(2),
    "default-8d": vectors(8),
    "exact": vectors(estimator=logdet.Exact()),
    "series": vectors(estimator=logdet.PowerSeries()),
    "roulette": vectors(estimator=logdet.RussianRoulette()),
    "two-probes": vectors(estimator=logdet.PowerSeries(num_probes=2)),
    "no-spline": vectors(marginal_bins=0),
    "recomputed": vectors(recompute=True),
    "maxmin": vectors(activation=lipschitz_nn.MaxMin),
    "clipswish": vectors(activation=lipschitz_nn.CLipSwish),
    "conditional": vectors(context_features=2),
    "dense-net": vectors(net=lipschitz_nn.LipschitzDenseNet),
    "dense-net-conditional": vectors(net=lipschitz_nn.LipschitzDenseNet, context_features=2),
    "schatten": vectors(norm=lipschitz_nn.SchattenNorm()),
    "frobenius": vectors(norm=lipschitz_nn.FrobeniusNorm()),
    "picard": vectors(solver=solvers.FixedPointIteration()),
    "invertible-resnet": Kind(lambda: flows.InvertibleResNet(3, 8, 2)),
    "whitened": Kind(whitened, blocks=1, norms=0, whitenings=1),
    "images": Kind(images, shape=(1, 8, 8), blocks=4, norms=6),
    "images-recomputed": Kind(lambda: images(recompute=True), shape=(1, 8, 8), blocks=4, norms=6),
}


@pytest.fixture(autouse=True)
def needs_a_device(request: pytest.FixtureRequest) -> None:
    is_of_all = request.function is test_all_of_this_on_a_device_that_is_pretended
    if not is_of_all and device.current().type == "cpu":
        pytest.skip("on a CPU nothing waits: run with --device pretended, as the last test does")


def waits_of(call: Callable[[], object]) -> Counter[str]:
    with Operations(device.current()) as seen:
        call()
    return seen.waits


def require_only(allowed: Waits, call: Callable[[], object]) -> None:
    """Require that a call waits at the places that are named alone, at most so often."""
    unexpected = waits_of(call) - Counter(allowed)
    assert not unexpected, f"the host waits where it may not: {dict(unexpected)}"


def train(model: Any, kind: Kind) -> None:
    arguments = [each for each in (kind.batch(), kind.conditions()) if each is not None]
    (-model.log_prob(*arguments).mean()).backward()


@pytest.mark.parametrize("kind", FLOWS.values(), ids=FLOWS)
def test_a_training_step_never_waits(kind: Kind) -> None:
    model = kind.model()
    require_only(kind.starts(), lambda: train(model, kind))
    require_only(NONE, lambda: train(model, kind))


@pytest.mark.parametrize("kind", FLOWS.values(), ids=FLOWS)
def test_density_and_samples_wait_for_the_solver_alone(kind: Kind) -> None:
    model, rows, context = kind.model(), kind.batch(), kind.conditions()
    train(model, kind)
    model.eval()
    looks = {LOOK: 2 * kind.blocks}
    with torch.no_grad():
        require_only(NONE, lambda: model.log_prob(rows, context))
        require_only(looks, lambda: model.sample(5, context))
        noise = torch.randn_like(model._transform(rows, context)[0])
        require_only(looks, lambda: model._transform.inverse(noise, context))


def test_the_gradient_of_an_inverse_waits_for_its_solvers_alone() -> None:
    kind = FLOWS["default-2d"]
    model = kind.model()
    train(model, kind)

    def step() -> None:
        samples, log_prob = model.sample_and_log_prob(16)
        (log_prob - samples.square().sum(1)).mean().backward()

    require_only({LOOK: 2 * 2 * kind.blocks}, step)


def test_sampling_six_vector_blocks_waits_at_most_twelve_times() -> None:
    torch.manual_seed(0)
    flow = flows.ResidualFlow(8, 16, 6).eval()
    with torch.no_grad():
        waits = waits_of(lambda: flow.sample(100))
    assert set(waits) == {LOOK}
    assert waits[LOOK] <= 12


def test_a_deeper_image_flow_waits_in_proportion_to_its_blocks() -> None:
    for layers in (1, 3):
        torch.manual_seed(0)
        flow = flows.ImageResidualFlow((1, 8, 8), 4, layers, num_scales=2).eval()
        with torch.no_grad():
            require_only({LOOK: 2 * 2 * layers}, partial(flow.sample, 4))


def test_the_classifier_learns_without_waiting_and_checks_what_it_decodes() -> None:
    torch.manual_seed(0)
    model = InvertibleClassifier((1, 8, 8), 10, 4, num_blocks=2, padding=1, levels=16)
    batch = torch.randint(0, 16, (4, 1, 8, 8))

    def step() -> None:
        model(batch).square().mean().backward()

    require_only(Kind(whitened, norms=3).starts(), step)
    require_only(NONE, step)
    model.eval()
    with torch.no_grad():
        features = model.encode(batch)
        allowed = {LOOK: 4, "transforms/image.py:inverse": 1}
        require_only(allowed, lambda: model.decode(features))


FEW = "new_wait or twelve or (training and (default or roulette or conditional or images))"

BOUNDS = {
    "nn/bounds.py",
    "nn/dense.py",
    "transforms/normalization.py",
    "transforms/splines.py",
    "flows/lipschitz.py",
}


@pytest.mark.parametrize("name", ["default-2d", "dense-net", "schatten", "whitened", "images"])
def test_a_certificate_waits_for_its_bounds_alone(name: str) -> None:
    kind = FLOWS[name]
    model = kind.model()
    train(model, kind)
    waits = waits_of(lambda: flows.lipschitz.lipschitz_constants(model._transform))
    assert {place.split(":")[0] for place in waits} <= BOUNDS


class Impatient(transforms.ActNorm):
    """Reads a value in each step: for a norm, for a plot, for a check."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = super().forward(inputs, context)
        self.seen = self.read(outputs[0])
        return outputs

    def read(self, values: Tensor) -> object:
        return float(values.detach().sum())


class ByMask(Impatient):
    def read(self, values: Tensor) -> object:
        return values[values > 0]


class FromTheHost(Impatient):
    def read(self, values: Tensor) -> object:
        return torch.tensor([1.0, 2.0], device=values.device)


class ToTheHost(Impatient):
    def read(self, values: Tensor) -> object:
        return values.cpu()


@pytest.mark.parametrize("fault", [Impatient, ByMask, FromTheHost, ToTheHost])
def test_a_new_wait_is_seen(fault: type[Impatient]) -> None:
    if fault is FromTheHost and device.current().type == "cuda":
        pytest.skip("torch tells nobody of it there; a capture would refuse it")
    norm = fault(3)
    norm(torch.randn(4, 3))
    with pytest.raises(AssertionError, match="the host waits where it may not"):
        require_only(NONE, lambda: norm(torch.randn(4, 3)))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-k", FEW], id="a few"),
        pytest.param(["-k", f"not ({FEW})"], id="the others", marks=pytest.mark.slow),
    ],
)
def test_all_of_this_on_a_device_that_is_pretended(
    request: pytest.FixtureRequest, arguments: list[str]
) -> None:
    device.run_on(request.config, [__file__, *arguments])
