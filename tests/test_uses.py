"""Uses that others make of a module: hooks, pruning, tracing, other states, other dtypes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from nflows_iresnet import ResidualFlow, flows, logdet, nn, solvers, transforms


def block(features: int = 2, **options: Any) -> transforms.ResidualTransform:
    torch.manual_seed(0)
    return transforms.ResidualTransform(nn.LipschitzMLP(features, [8, 8]), **options)


def rows(count: int = 5, features: int = 2) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, features)


PRUNED: dict[str, Callable[[torch.nn.Module], object]] = {
    "l1": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
    "structured": lambda layer: prune.random_structured(layer, "weight", 0.3, dim=0),
    "bias": lambda layer: prune.l1_unstructured(layer, "bias", 0.3),
    "twice": lambda layer: [prune.l1_unstructured(layer, "weight", 0.3) for _ in range(2)],
    "weight-norm": weight_norm,
    "spectral-norm": spectral_norm,
    "parametrized-weight-norm": parametrizations.weight_norm,
    "parametrized-orthogonal": parametrizations.orthogonal,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("is_composite", [False, True])
@pytest.mark.parametrize("how", PRUNED)
def test_weights_that_hooks_compute_are_used_and_learned(how: str, is_composite: bool) -> None:
    part = block()
    net = part.net
    assert isinstance(net, nn.LipschitzMLP)
    PRUNED[how](net.layers[1])
    flow = transforms.CompositeTransform([part, block()]) if is_composite else part
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    before = {name: each.detach().clone() for name, each in flow.named_parameters()}
    for _ in range(3):
        outputs, logabsdet = flow(rows())
        optimizer.zero_grad()
        (outputs.square().sum() - logabsdet.sum()).backward()
        optimizer.step()
    flow(rows())
    moved = [name for name, each in flow.named_parameters() if not torch.equal(each, before[name])]
    assert set(moved) == set(before)
    if how in ("l1", "structured", "twice"):
        mask = net.layers[1].weight_mask
        assert bool((net.effective_weights()[1][mask == 0] == 0).all())
    assert part.lipschitz_bound() <= 0.97


def test_the_certificate_of_a_pruned_network_is_of_the_present_weights() -> None:
    net = nn.LipschitzMLP(2, [8])
    prune.l1_unstructured(net.layers[0], "weight", 0.3)
    with torch.no_grad():
        net.layers[0].get_parameter("weight_orig").mul_(1e3)
    expected = net.lipschitz_bound()
    net(rows())
    assert net.lipschitz_bound() == expected


def test_other_hooks_of_layers_are_refused() -> None:
    part = block()
    part.net.layers[0].register_forward_pre_hook(lambda module, given: None)  # type: ignore[index, union-attr]
    with pytest.raises(ValueError, match="would never run"):
        part(rows())


@pytest.mark.parametrize("is_composite", [False, True])
def test_hooks_of_a_network_fire(is_composite: bool) -> None:
    part, seen = block(), []
    flow = transforms.CompositeTransform([block(), part]) if is_composite else part
    expected = [*flow(rows()), *flow.inverse(rows())]
    part.net.register_forward_hook(lambda *_: seen.append("forward"))
    found = flow(rows())
    assert seen
    seen.clear()
    found = (*found, *flow.inverse(rows()))
    assert seen
    torch.testing.assert_close(list(found), expected, rtol=1e-4, atol=1e-5)


def test_a_hook_that_changes_the_network_changes_the_density() -> None:
    part = block(estimator=logdet.Exact())
    part.net.register_forward_hook(lambda module, given, outputs: 0.5 * outputs)
    inputs = rows().double()
    part.double()
    outputs, logabsdet = part(inputs)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: part(row[None])[0][0]))(inputs)
    torch.testing.assert_close(logabsdet, torch.linalg.slogdet(jacobian).logabsdet)
    torch.testing.assert_close(part.inverse(outputs)[0], inputs)


TRACED: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "block": (block, (2,)),
    "series": (lambda: block(8, estimator=logdet.PowerSeries(num_terms=3)), (8,)),
    "flow": (lambda: ResidualFlow(2, 8, 2)._transform, (2,)),
    "images": (
        lambda: transforms.ResidualTransform(nn.LipschitzCNN(1, [4, 4]), estimator=logdet.Exact()),
        (1, 4, 4),
    ),
    "dense": (lambda: transforms.ResidualTransform(nn.LipschitzDenseNet(2, [4, 4])), (2,)),
}


def prepared(name: str) -> tuple[torch.nn.Module, Tensor, Tensor]:
    """Return a module that has started, and batches of two sizes."""
    factory, shape = TRACED[name]
    torch.manual_seed(0)
    module, batches = factory(), (torch.randn(5, *shape), torch.randn(7, *shape))
    module(batches[0])
    return module.eval(), *batches


@pytest.mark.parametrize("name", TRACED)
def test_export_with_a_dynamic_batch(name: str) -> None:
    module, example, others = prepared(name)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},)).module()
    for given in (example, others):
        torch.manual_seed(0)
        expected = module(given)
        found = program(given)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        if name != "series":  # whose draws are another stream inside a program
            torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", TRACED)
def test_jit_trace_with_another_batch(name: str) -> None:
    module, example, others = prepared(name)
    traced = torch.jit.trace(module, (example,), check_trace=False)
    torch.manual_seed(0)
    expected = module(others)
    torch.manual_seed(0)
    found = traced(others)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    if name != "series":  # whose draws are another stream inside a trace
        torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-5)


OTHERS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], torch.nn.Module], str]] = {
    "coeff": (
        lambda: nn.LipschitzMLP(2, [4]),
        lambda: nn.LipschitzMLP(2, [4], coeff=0.5),
        "coeff=0.97, but has coeff=0.5",
    ),
    "norm": (
        lambda: nn.LipschitzMLP(2, [4]),
        lambda: nn.LipschitzMLP(2, [4], norm=nn.SpectralNorm()),
        "SchattenNorm",
    ),
    "activation": (
        lambda: nn.LipschitzMLP(2, [4], activation=nn.Sine()),
        lambda: nn.LipschitzMLP(2, [4], activation=nn.SmoothAbs()),
        "Sine",
    ),
    "padding": (
        lambda: nn.LipschitzCNN(1, [4]),
        lambda: nn.LipschitzCNN(1, [4], padding_mode="circular"),
        "padding_mode='zeros'",
    ),
    "dense": (
        lambda: nn.LipschitzDenseNet(2, [4]),
        lambda: nn.LipschitzDenseNet(2, [4], coeff=0.5),
        "coeff=0.97",
    ),
    "linear": (
        lambda: nn.LipschitzLinear(2, 2),
        lambda: nn.LipschitzLinear(2, 2, coeff=0.5),
        "coeff",
    ),
    "conv": (
        lambda: nn.LipschitzConv2d(2, 2, 3),
        lambda: nn.LipschitzConv2d(2, 2, 3, coeff=0.5),
        "coeff",
    ),
    "levels": (
        lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, levels=16, num_scales=1),
        lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, levels=17, num_scales=1),
        "levels=16",
    ),
    "levels-without-logit": (
        lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, levels=16, num_scales=1, alpha=None),
        lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, levels=17, num_scales=1, alpha=None),
        "levels=16",
    ),
    "logit-or-not": (
        lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, levels=16, num_scales=1),
        lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, levels=16, num_scales=1, alpha=None),
        "alpha=0.05, but has alpha=None",
    ),
    "not-or-logit": (
        lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, levels=16, num_scales=1, alpha=None),
        lambda: flows.ImageResidualFlow((1, 4, 4), 4, 1, levels=16, num_scales=1),
        "alpha=None, but has alpha=0.05",
    ),
    "flow": (lambda: ResidualFlow(2, 4, 1), lambda: ResidualFlow(2, 4, 1, coeff=0.5), "coeff"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_state_of_another_function_is_refused(name: str) -> None:
    make, make_other, message = OTHERS[name]
    trained, other = make(), make_other()
    kept = {key: each.clone() for key, each in other.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(trained.state_dict())
    stored = io.BytesIO()
    torch.save({key: each.clone() for key, each in trained.state_dict().items()}, stored)
    stored.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    for key, each in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[key], each)
    assert kept.keys() == trained.state_dict().keys()


def test_states_without_settings_load_as_before() -> None:
    trained, other = nn.LipschitzMLP(2, [4]), nn.LipschitzMLP(2, [4], coeff=0.5)
    parameters = {name: each.detach() for name, each in trained.named_parameters()}
    assert other.load_state_dict(parameters).missing_keys == []
    torch.testing.assert_close(dict(other.named_parameters()), dict(trained.named_parameters()))


def test_a_block_on_the_meta_device_is_filled_by_a_state() -> None:
    trained = block()
    for assign in (False, True):
        with torch.device("meta"):
            empty = block()
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(trained.state_dict(), assign=assign)
        torch.testing.assert_close(empty(rows()), trained(rows()))


@pytest.mark.parametrize(
    "wrap", [lambda part: part, lambda part: transforms.CompositeTransform([part])]
)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.zeros(5, 2, dtype=torch.float64), r"inputs are float64.*float32.*\.double\(\)"),
        (torch.zeros(5, 2, dtype=torch.int64), "inputs are int64"),
        (torch.zeros(5, 3), r"\(batch, 2\), got \(5, 3\)"),
        (torch.zeros(2), r"got \(2,\)"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "inverse"])
def test_inputs_of_another_kind_are_named(
    wrap: Callable[[torch.nn.Module], torch.nn.Module], given: Tensor, message: str, method: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(wrap(block()), method)(given)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_a_context_of_another_dtype_is_named(dtype: torch.dtype) -> None:
    part = transforms.ResidualTransform(nn.LipschitzMLP(2, [8], 3))
    with pytest.raises(ValueError, match="context is"):
        part(rows(), torch.zeros(5, 3, dtype=dtype))


def test_a_forgotten_context_is_an_error_unless_it_is_optional() -> None:
    for factory in (nn.LipschitzMLP, nn.LipschitzDenseNet):
        part = transforms.ResidualTransform(factory(2, [8], 3))
        for method in (part.forward, part.inverse):
            with pytest.raises(ValueError, match="optional_context=True"):
                method(rows())
        free = transforms.ResidualTransform(factory(2, [8], 3, optional_context=True))
        assert free(rows())[0].shape == (5, 2)
    with pytest.raises(ValueError, match="model without"):
        block()(rows(), torch.zeros(5, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_are_named_in_training_and_stay_alone_in_evaluation(bad: float) -> None:
    inputs = rows()
    inputs[3, 1] = bad
    for module in (block(), transforms.CompositeTransform([block()])):
        with pytest.raises(
            ValueError, match="1 of 5 rows of the inputs are not finite, first row 3"
        ):
            module(inputs)
        outputs, logabsdet = module.eval()(inputs)
        good = torch.tensor([0, 1, 2, 4])
        assert bool(outputs[good].isfinite().all() and logabsdet[good].isfinite().all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "anderson"}, r"solver must be a Solver such as solvers\.Anderson\(\)"),
        ({"solver": solvers.Anderson}, "got the class Anderson"),
        ({"estimator": "exact"}, r"estimator must be a LogDetEstimator such as logdet\.Exact\(\)"),
        ({"estimator": logdet.Exact}, "got the class Exact"),
    ],
)
def test_strategies_are_checked_where_they_are_given(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block(**options)
    with (
        pytest.raises(ValueError, match=message),
        transforms.using(block(), **options),
    ):
        pass


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LipschitzMLP(2, [4], activation="relu"),  # type: ignore[arg-type]
        lambda: nn.LipschitzMLP(2, 4),  # type: ignore[arg-type]
        lambda: nn.LipschitzMLP(2, [4], 3, context_hidden_features=8),  # type: ignore[arg-type]
        lambda: nn.LipschitzMLP(2, [4], norm="spectral"),  # type: ignore[arg-type]
        lambda: nn.LipschitzMLP(2, [4], coeff="0.9"),  # type: ignore[arg-type]
        lambda: nn.LipschitzCNN(1, 4),  # type: ignore[arg-type]
        lambda: nn.LipschitzCNN(1, [4], kernel_sizes=3),  # type: ignore[arg-type]
        lambda: nn.LipschitzDenseNet(2, 4),  # type: ignore[arg-type]
        lambda: nn.Mixed(nn.Sine(), "sine"),  # type: ignore[arg-type]
        lambda: logdet.PowerSeries(probe="gaussian"),  # type: ignore[arg-type]
        lambda: logdet.PowerSeries(num_terms=2.5),  # type: ignore[arg-type]
        lambda: logdet.RussianRoulette(truncation=logdet.LipschitzTruncation),  # type: ignore[arg-type]
        lambda: logdet.Auto(exact="exact"),  # type: ignore[arg-type]
        lambda: transforms.ResidualTransform("net"),  # type: ignore[arg-type]
    ],
)
def test_settings_of_another_kind_are_refused_when_they_are_given(
    make: Callable[[], object],
) -> None:
    with pytest.raises(ValueError, match=r"must|need|takes"):
        make()


@pytest.mark.parametrize("num_hidden", [0, 1, 2, 3])
def test_convolutional_networks_of_any_depth_have_default_kernels(num_hidden: int) -> None:
    net = nn.LipschitzCNN(3, [8] * num_hidden)
    sizes = [layer.weight.shape[-1] for layer in net.normed_layers]
    assert sizes == ([3] if num_hidden == 0 else [3, *[1] * (num_hidden - 1), 3])
    assert net(torch.zeros(2, 3, 5, 5)).shape == (2, 3, 5, 5)


def test_an_activation_that_replaces_forward_alone_is_refused() -> None:
    with pytest.raises(TypeError, match="value_and_slope"):

        class Loud(nn.Sine):
            def forward(self, inputs: Tensor) -> Tensor:
                return 2 * super().forward(inputs)


def test_a_block_with_a_hook_before_the_call_is_bound_by_itself() -> None:
    """The hook changes the weights, which others' binding would have read before."""
    part = block()

    def halve(module: torch.nn.Module, given: object) -> None:
        with torch.no_grad():
            for each in module.parameters():
                each.mul_(0.5)

    part.register_forward_pre_hook(halve)
    expected = transforms.CompositeTransform([block()])
    for each in expected.parameters():
        each.data.mul_(0.5)
    found = transforms.CompositeTransform([part])(rows())
    torch.testing.assert_close(found, expected(rows()))


def test_states_that_are_averaged_by_hand_load() -> None:
    states = [ResidualFlow(2, 8, 2).state_dict() for _ in range(3)]
    moving = {name: each.clone().float() for name, each in states[0].items()}
    for name, each in states[1].items():
        moving[name] = 0.9 * moving[name] + 0.1 * each.float()
    soup = {name: sum(state[name] for state in states) / 3 for name in moving}
    for mean in (moving, soup):
        ResidualFlow(2, 8, 2).load_state_dict(mean)
    with pytest.raises(RuntimeError, match="coeff"):
        ResidualFlow(2, 8, 2, coeff=0.5).load_state_dict(moving)


@pytest.mark.parametrize("shape", [(1, 2, 2), (5, 2, 2), (5, 1, 2), (5, 2, 2, 2)])
@pytest.mark.parametrize("make", [nn.LipschitzMLP, nn.LipschitzDenseNet])
def test_rows_that_are_no_vectors_are_refused(
    make: Callable[..., torch.nn.Module], shape: tuple[int, ...]
) -> None:
    part = transforms.ResidualTransform(make(2, [8]))
    for method in (part.forward, part.inverse):
        with pytest.raises(ValueError, match=r"expected inputs of shape \(batch, 2\), got"):
            method(torch.randn(shape))


@pytest.mark.parametrize("given", [[[1.0, 2.0]], rows().numpy()], ids=["list", "numpy"])
def test_what_is_no_tensor_is_named(given: Any) -> None:
    for method in (block().forward, block().inverse):
        with pytest.raises(ValueError, match="the inputs must be a tensor, got"):
            method(given)


def test_backward_hooks_of_networks_leave_a_block_as_it_is() -> None:
    part = block()
    expected = part(rows())
    for module in part.modules():
        module.register_full_backward_hook(lambda *_: None)
    outputs, logabsdet = part(rows())
    (outputs.sum() + logabsdet.sum()).backward()
    torch.testing.assert_close((outputs, logabsdet), expected)


def test_networks_and_layers_name_a_wrong_precision() -> None:
    for net in (nn.LipschitzMLP(2, [8]), nn.LipschitzDenseNet(2, [8])):
        with pytest.raises(ValueError, match="inputs are float64, the weights float32"):
            net(rows().double())
    with pytest.raises(ValueError, match="must make a network"):
        ResidualFlow(2, 8, 1, net=nn.LipschitzMLP(2, [8]))
