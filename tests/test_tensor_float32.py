"""Nothing that the package computes depends on TensorFloat-32: shown on a CPU by an emulation."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch import nn as torch_nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nflows_iresnet import (
    ResidualFlow,
    ResidualTransform,
    classifiers,
    flows,
    linearization,
    logdet,
    nn,
    precision,
    solvers,
    tensor_float,
    transforms,
)

_MATRICES = {"mm", "bmm", "addmm", "baddbmm"}
_CONVOLUTIONS = {"convolution", "convolution_backward"}
_HAS_NEW = hasattr(torch.backends, "fp32_precision")
_NEW = [
    ("generic", "all"),
    *[(family, kind) for family in ("cuda", "mkldnn") for kind in ("all", "matmul", "conv", "rnn")],
]


def rounded(value: Any) -> Any:
    """Return a float32 tensor with ten bits after the leading one, to nearest."""
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    pieces = (value.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)
    return pieces.view(torch.float32).view(value.shape)


def is_short(family: str) -> bool:
    """Whether a GPU would round here, with the settings as they are, old ones first."""
    try:
        if family in _CONVOLUTIONS:
            return bool(torch.backends.cudnn.allow_tf32)
        return family in _MATRICES and torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:
        if family in _CONVOLUTIONS:
            convolutions: Any = torch.backends.cudnn
            return str(convolutions.conv.fp32_precision) == "tf32"
        return family in _MATRICES and str(torch.backends.cuda.matmul.fp32_precision) == "tf32"


class Emulation(TorchDispatchMode):
    """Rounds the inputs of products wherever torch's settings allow it, and counts how many."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if is_short(func._schema.name.split("::")[-1]):
            self.count += any(
                isinstance(each, Tensor) and each.dtype == torch.float32 for each in args
            )
            args = tuple(rounded(each) for each in args)
        return func(*args, **(kwargs or {}))


def settings() -> list[object]:
    """Return all settings, None for old ones that cannot be read."""
    found: list[object] = []
    for getter in (
        torch.get_float32_matmul_precision,
        torch._C._get_cudnn_allow_tf32,
        torch._C._get_cublas_allow_tf32,
    ):
        try:
            found.append(getter())
        except RuntimeError:
            found.append(None)
    if _HAS_NEW:
        found += [torch._C._get_fp32_precision_getter(*key) for key in _NEW]
    return found


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Leave the settings as torch has them."""
    yield
    torch.set_float32_matmul_precision("highest")
    for key in _NEW if _HAS_NEW else ():
        torch._C._set_fp32_precision_setter(*key, "none")
    torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def short() -> None:
    """Allow TensorFloat-32 everywhere."""
    torch.set_float32_matmul_precision("high")


def set_new(module: str, value: str = "tf32") -> Callable[[], None]:
    def change() -> None:
        target: Any = torch.backends
        for name in module.split(".") if module else []:
            target = getattr(target, name)
        target.fp32_precision = value

    return change


def set_both() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.allow_tf32 = True


OLD: dict[str, Callable[[], None]] = {
    "by default": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cublas": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cudnn off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
}
NEW: dict[str, Callable[[], None]] = {
    "everything": set_new(""),
    "nothing": set_new("", "ieee"),
    "cudnn": set_new("cudnn"),
    "products": set_new("cuda.matmul"),
    "convolutions": set_new("cudnn.conv"),
    "no convolutions": set_new("cudnn.conv", "ieee"),
    "recurrent": set_new("cudnn.rnn"),
    "CPU": set_new("mkldnn"),
    "CPU products": set_new("mkldnn.matmul"),
    "CPU products in bfloat16": set_new("mkldnn.matmul", "bf16"),
    "CPU convolutions": set_new("mkldnn.conv"),
    "both": set_both,
}
WAYS = {**OLD, **(NEW if _HAS_NEW else {})}


class Shrunk(torch_nn.Sequential):
    """What a user may write: a contraction, with no certificate."""

    def __init__(self, *layers: torch_nn.Module) -> None:
        super().__init__(*layers)
        with torch.no_grad():
            for each in self.parameters():
                each.mul_(0.4)


class Einsum(torch_nn.Module):
    """Products by every name that torch has for them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch_nn.Parameter(0.1 * torch.randn(3, 3))
        self.bilinear = torch_nn.Bilinear(3, 3, 3)
        with torch.no_grad():
            self.bilinear.weight.mul_(0.01)

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight
        outputs = torch.einsum("bi,ji->bj", inputs, weight) + inputs @ weight + inputs.mm(weight)
        outputs = outputs + torch.matmul(weight, inputs[..., None])[..., 0]
        outputs = outputs + torch.addmm(inputs, inputs, weight, beta=0.1, alpha=0.5)
        outputs = outputs + torch.addmm(inputs, mat2=weight, mat1=inputs)
        outputs = outputs + torch.tensordot(inputs, weight, 1)
        outputs = outputs + torch.bmm(inputs[:, None], weight.expand(len(inputs), 3, 3))[:, 0]
        return 0.5 * (outputs + self.bilinear(inputs.tanh(), inputs.cos())).tanh()


def vectors() -> Tensor:
    return torch.randn(6, 3)


def images() -> Tensor:
    return torch.randn(3, 2, 4, 4)


Case = tuple[Callable[[], Any], Callable[[], Tensor]]
SERIES = logdet.PowerSeries(num_terms=4)
NETS: dict[str, Case] = {
    "mlp": (lambda: nn.LipschitzMLP(3, [8, 8]), vectors),
    "mlp of one hidden layer": (lambda: nn.LipschitzMLP(3, [8]), vectors),
    "mlp of three hidden layers": (lambda: nn.LipschitzMLP(3, [8, 8, 8]), vectors),
    "mlp with an activation of torch": (
        lambda: nn.LipschitzMLP(3, [8], activation=torch_nn.Softplus()),
        vectors,
    ),
    "densely connected": (lambda: nn.LipschitzDenseNet(3, [8, 8]), vectors),
    "power iteration": (lambda: nn.LipschitzMLP(3, [8], norm=nn.PowerIteration()), vectors),
    "convolutional": (lambda: nn.LipschitzCNN(2, [6, 6]), images),
    "circular": (lambda: nn.LipschitzCNN(2, [6], padding_mode="circular"), images),
    "large kernels": (lambda: nn.LipschitzCNN(2, [6, 6], kernel_sizes=[3, 3, 3]), images),
    "convolutional with an activation of torch": (
        lambda: nn.LipschitzCNN(2, [6], activation=torch_nn.Softplus()),
        images,
    ),
    "user's": (
        lambda: Shrunk(torch_nn.Linear(3, 8), torch_nn.ELU(), torch_nn.Linear(8, 3)),
        vectors,
    ),
    "user's by other names": (Einsum, vectors),
    "user's convolutions": (
        lambda: Shrunk(
            torch_nn.Conv2d(2, 4, 3, padding="same"),
            torch_nn.ELU(),
            torch_nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2),
            torch_nn.ConvTranspose2d(4, 2, 3, padding=1),
        ),
        images,
    ),
}


def block(net: torch_nn.Module, estimator: logdet.LogDetEstimator = SERIES) -> ResidualTransform:
    return ResidualTransform(net, estimator=estimator, solver=solvers.Anderson(max_steps=500))


def forward_and_gradients(transform: Any, inputs: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    transform.zero_grad()
    points = inputs.detach().requires_grad_()
    outputs, logabsdet = transform(points)
    (outputs.square().sum() + logabsdet.sum()).backward()
    gradients = [points.grad, *[each.grad for each in transform.parameters()]]
    return [outputs.detach(), *[each.clone() for each in gradients if each is not None]]


def everything(transform: Any, inputs: Tensor, context: Tensor | None = None) -> list[Tensor]:
    """Return values, log-determinants and gradients, forward and backward."""
    found = []
    for direction in (transform, transform.inverse):
        torch.manual_seed(1)
        leaves = [each.detach().requires_grad_() for each in (inputs, context) if each is not None]
        transform.zero_grad()
        outputs, logabsdet = direction(*leaves)
        (outputs.square().sum() + logabsdet.sum()).backward()
        found += [outputs.detach(), logabsdet.detach(), *[each.grad for each in leaves]]
        found += [each.grad.clone() for each in transform.parameters() if each.grad is not None]
    return found


def assert_unaffected(function: Callable[[], list[Tensor]]) -> None:
    """Assert that nothing is rounded, that results are the same, and the settings."""
    before = settings()
    with Emulation() as seen:
        found = function()
    assert seen.count == 0
    assert settings() == before
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for left, right in zip(found, function(), strict=True):
        torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-6)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", NETS)
def test_blocks_their_inverses_and_all_gradients_are_unaffected(name: str) -> None:
    torch.manual_seed(0)
    net, inputs = NETS[name][0](), NETS[name][1]()
    transform = block(net)
    everything(transform, inputs)
    transform.eval()
    assert_unaffected(lambda: everything(transform, inputs))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("estimator", [logdet.Exact(), logdet.RussianRoulette(), logdet.Auto()])
@pytest.mark.parametrize("name", ["mlp", "densely connected", "circular"])
def test_estimators_are_unaffected(name: str, estimator: logdet.LogDetEstimator) -> None:
    torch.manual_seed(0)
    transform, inputs = block(NETS[name][0](), estimator), NETS[name][1]()
    assert_unaffected(lambda: everything(transform, inputs))


def conditional() -> Any:
    return block(nn.LipschitzMLP(3, [8], context_features=2))


WHOLE: dict[str, Case] = {
    "linear": (lambda: transforms.LinearTransform(3), vectors),
    "of other packages": (
        lambda: transforms.CompositeTransform([block(nn.LipschitzMLP(3, [8])), lu()]),
        vectors,
    ),
    "recomputed": (
        lambda: transforms.CompositeTransform(
            [block(nn.LipschitzMLP(3, [8])) for _ in range(2)], recompute=True
        ),
        vectors,
    ),
    "flow": (lambda: ResidualFlow(3, 8, 2)._transform, vectors),
}


def lu() -> Any:
    from nflows.transforms import LULinear

    return LULinear(3)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", WHOLE)
def test_other_transforms_are_unaffected(name: str) -> None:
    torch.manual_seed(0)
    transform, inputs = WHOLE[name][0](), WHOLE[name][1]()
    everything(transform, inputs)
    assert_unaffected(lambda: everything(transform, inputs))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    "make",
    [conditional, lambda: transforms.ConditionalAffine(3, 2)],
    ids=["block", "affine"],
)
def test_contexts_and_their_gradients_are_unaffected(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    transform, inputs, context = make(), vectors(), torch.randn(6, 2)
    with torch.no_grad():
        for each in transform.parameters():
            each.add_(0.1 * torch.randn(each.shape))
    assert_unaffected(lambda: everything(transform, inputs, context))


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["residual", "glow"])
def test_flows_of_normflows_are_unaffected(name: str) -> None:
    nf = pytest.importorskip("normflows")
    from nflows_iresnet.interop.normflows import FromNormflows

    torch.manual_seed(0)
    if name == "glow":
        flow, inputs = nf.flows.GlowBlock(channels=2, hidden_channels=8), images()
    else:
        net = nf.nets.LipschitzMLP([2, 8, 2], lipschitz_const=0.7)
        flow, inputs = (
            nf.flows.Residual(net, reduce_memory=False, brute_force=True),
            vectors()[:, :2],
        )
    transform = FromNormflows(flow).eval()
    forward_and_gradients(transform, inputs)
    assert_unaffected(lambda: forward_and_gradients(transform, inputs))


def log_prob(flow: Any, inputs: Tensor, context: Tensor | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    flow.zero_grad()
    leaves = [each.detach().requires_grad_() for each in (inputs, context) if each is not None]
    values = flow.log_prob(*leaves)
    values.sum().backward()
    found = [values.detach(), *[each.grad for each in leaves if each.grad is not None]]
    found += [each.grad.clone() for each in flow.parameters() if each.grad is not None]
    torch.manual_seed(2)
    with torch.no_grad():
        found.append(flow.sample(3, context))
    return found


@pytest.mark.usefixtures("short")
def test_flows_and_embeddings_are_unaffected() -> None:
    torch.manual_seed(0)
    embedding = torch_nn.Sequential(torch_nn.Unflatten(1, (1, 4)), torch_nn.Conv1d(1, 2, 3))
    embedding.append(torch_nn.Flatten())
    net = nn.LipschitzMLP(3, [8], context_features=4)
    flow = flows.Flow(block(net), flows.StandardNormal([3]), embedding)
    inputs, context = vectors(), torch.randn(6, 4)
    log_prob(flow, inputs, context)
    assert_unaffected(lambda: log_prob(flow, inputs, context))


@pytest.mark.usefixtures("short")
def test_image_flows_are_unaffected() -> None:
    torch.manual_seed(0)
    flow = flows.ImageResidualFlow((1, 4, 4), 6, 1, 1, num_scales=1, levels=16, estimator=SERIES)
    pixels = torch.randint(0, 16, (3, 1, 4, 4)).float()
    log_prob(flow, pixels)
    assert_unaffected(lambda: log_prob(flow, pixels))


@pytest.mark.usefixtures("short")
def test_classifiers_and_what_they_decode_are_unaffected() -> None:
    torch.manual_seed(0)
    model = classifiers.InvertibleClassifier((1, 4, 4), 3, 4, num_blocks=1, levels=17)
    pixels = torch.randint(0, 17, (5, 1, 4, 4)).float()

    def results() -> list[Tensor]:
        model.zero_grad()
        logits = model(pixels)
        F.cross_entropy(logits, torch.arange(5) % 3).backward()
        gradients = [each.grad.clone() for each in model.parameters() if each.grad is not None]
        with torch.no_grad():
            decoded = model.decode(model.encode(pixels))
        return [logits.detach(), *gradients, decoded, torch.tensor(model.lipschitz_bound())]

    results()
    assert_unaffected(results)
    with torch.no_grad(), Emulation():
        torch.set_float32_matmul_precision("high")
        error = (model.decode(model.encode(pixels)) - pixels).abs().max()
    assert error < 1e-3


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["mlp", "circular", "user's convolutions"])
def test_an_inverse_takes_no_more_steps_and_is_as_exact(name: str) -> None:
    """With ten bits the residual stays above the tolerance, and hundreds of steps are taken."""
    torch.manual_seed(0)
    net, inputs = NETS[name][0](), NETS[name][1]()
    errors, counts = [], []
    for context in (nullcontext(), Emulation()):
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        hooked = Hooked(net, count)
        transform = block(hooked, logdet.Exact())
        with context, torch.no_grad():
            outputs = transform(inputs)[0]
            calls = 0
            errors.append(float((transform.inverse(outputs)[0] - inputs).abs().max()))
        counts.append(calls)
    assert counts[0] == counts[1]
    assert errors[1] < 1e-5


class Hooked(torch_nn.Module):
    def __init__(self, net: torch_nn.Module, called: Callable[[], None]) -> None:
        super().__init__()
        self.net, self.called = net, called

    def forward(self, inputs: Tensor) -> Tensor:
        self.called()
        outputs: Tensor = self.net(inputs)
        return outputs


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["mlp", "densely connected", "circular", "user's by other names"])
def test_second_derivatives_are_unaffected(name: str) -> None:
    torch.manual_seed(0)
    transform, inputs = block(NETS[name][0](), logdet.Exact()), NETS[name][1]()
    inputs = inputs[:2, :, :2, :2] if inputs.dim() == 4 else inputs

    def results() -> list[Tensor]:
        points = inputs.clone().requires_grad_()
        leaves = [points, *transform.parameters()]
        outputs, logabsdet = transform(points)
        loss = logabsdet.sum() + outputs.cos().sum()
        (gradient,) = torch.autograd.grad(loss, points, create_graph=True)
        return list(
            torch.autograd.grad(
                gradient.square().sum(), leaves, allow_unused=True, materialize_grads=True
            )
        )

    assert_unaffected(results)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["mlp", "circular", "user's", "user's convolutions"])
def test_function_transforms_are_unaffected(name: str) -> None:
    torch.manual_seed(0)
    transform, inputs = block(NETS[name][0](), logdet.Exact()), NETS[name][1]()
    inputs = inputs[:2, :, :3, :3] if inputs.dim() == 4 else inputs

    def log_density(points: Tensor) -> Tensor:
        outputs, logabsdet = transform(points)
        return (logabsdet - outputs.square().flatten(1).sum(1)).sum()

    def results() -> list[Tensor]:
        tangent = torch.ones_like(inputs)
        pushed = torch.func.jvp(log_density, (inputs,), (tangent,))[1]
        per_row = torch.func.vmap(torch.func.grad(lambda row: log_density(row[None])))(inputs)
        twice = torch.func.jvp(torch.func.grad(log_density), (inputs,), (tangent,))[1]
        return [each.detach() for each in (pushed, per_row, twice)]

    assert_unaffected(results)


CERTIFIED: list[Callable[[], Any]] = [
    lambda: nn.LipschitzMLP(20, [32, 32]),
    lambda: nn.LipschitzDenseNet(20, [32]),
    lambda: nn.LipschitzCNN(3, [20, 20]),
]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("make", CERTIFIED, ids=["mlp", "densely connected", "convolutional"])
def test_certificates_and_weights_are_unaffected(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    net = make()
    with torch.no_grad():
        for layer in net.layers:
            layer.weight.mul_(3)

    def results() -> list[Tensor]:
        effective = net.effective_weights()
        weights = effective[0] if isinstance(effective, tuple) else effective
        return [torch.tensor(net.lipschitz_bound()), *[each.detach() for each in weights]]

    assert_unaffected(results)


@pytest.mark.usefixtures("short")
def test_norms_and_layers_are_unaffected() -> None:
    torch.manual_seed(0)
    weight, kernel = torch.randn(40, 30), torch.randn(6, 5, 3, 3)
    linear, convolution = nn.LipschitzLinear(30, 40), nn.LipschitzConv2d(5, 6, 3)
    rows, pictures = torch.randn(4, 30), torch.randn(2, 5, 6, 6)

    def results() -> list[Tensor]:
        norms = [nn.SchattenNorm(), nn.SpectralNorm(), nn.FrobeniusNorm()]
        found = [norm(weight) for norm in norms]
        found += [nn.SchattenNorm().value_and_gradient(weight, {})[1], nn.FourierNorm()(kernel)]
        for norm, each in (
            (nn.PowerIteration(), weight),
            (nn.ConvPowerIteration((6, 6)), kernel),
        ):
            state = norm.initial_state(each)
            norm.advance(each, state)
            found += [*state.values(), norm(each, state)]
        for layer, values in ((linear, rows), (convolution, pictures)):
            layer.zero_grad()
            outputs = layer(values)
            outputs.square().sum().backward()
            found += [outputs.detach(), _gradient(layer.weight)]
        return found

    assert_unaffected(results)


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad.clone()


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["mlp", "densely connected", "convolutional"])
def test_networks_and_estimators_by_themselves_are_unaffected(name: str) -> None:
    torch.manual_seed(0)
    net, inputs = NETS[name][0](), NETS[name][1]()

    def results() -> list[Tensor]:
        torch.manual_seed(1)
        net.zero_grad()
        outputs = net(inputs)
        logabsdet = SERIES(net, inputs)[1]
        (outputs.square().sum() + logabsdet.sum()).backward()
        gradients = [each.grad.clone() for each in net.parameters() if each.grad is not None]
        return [outputs.detach(), logabsdet.detach(), *gradients]

    assert_unaffected(results)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_allow_it_is_seen_through_and_restored(way: str) -> None:
    torch.manual_seed(0)
    cases = [
        (block(NETS[name][0]()), NETS[name][1]()) for name in ("mlp", "large kernels", "user's")
    ]
    cases.append((block(NETS["user's convolutions"][0]()), images()))
    for transform, inputs in cases:
        everything(transform, inputs)
    WAYS[way]()
    before = settings()
    with Emulation() as seen:
        for transform, inputs in cases:
            everything(transform, inputs)
            transform.forward(inputs)
            assert settings() == before
    assert seen.count == 0


@pytest.mark.parametrize("way", WAYS)
def test_inside_no_setting_allows_it(way: str) -> None:
    WAYS[way]()
    before = settings()
    with tensor_float.switched_off() as allowed:
        inside = settings()
        assert "tf32" not in inside
        assert "bf16" not in inside
        assert not is_short("mm")
        assert not is_short("convolution")
    assert settings() == before
    if way in ("high", "medium", "everything", "products", "cudnn", "both"):
        assert allowed.products
    if way in ("by default", "everything", "convolutions", "CPU convolutions"):
        assert allowed.convolutions
    if way == "cudnn off":
        assert not any(allowed)


@pytest.mark.parametrize("way", OLD)
def test_the_old_settings_are_enough(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.9 there are no others."""
    monkeypatch.setattr(tensor_float, "_HAS_KEYS", False)
    OLD[way]()
    before = settings()[:3]
    with tensor_float.switched_off():
        assert not is_short("mm")
        assert not is_short("convolution")
    assert settings()[:3] == before


@pytest.mark.skipif(not _HAS_NEW, reason="torch has the old settings only")
def test_what_inherits_from_a_family_still_does() -> None:
    set_new("")()
    with tensor_float.switched_off():
        pass
    set_new("", "none")()
    assert torch.backends.cuda.matmul.fp32_precision == "none"


class Failing(torch_nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        raise KeyError("mine")


@pytest.mark.parametrize("way", WAYS)
def test_errors_leave_the_settings_as_they_were(way: str) -> None:
    WAYS[way]()
    before = settings()
    transform = block(nn.LipschitzMLP(3, [8]))
    with pytest.raises(ValueError, match="expected inputs of shape"):
        transform(torch.zeros(2, 5))
    assert settings() == before
    with pytest.raises(KeyError, match="mine"):
        block(Failing())(vectors())
    assert settings() == before
    steep = Shrunk(torch_nn.Linear(3, 3))
    with torch.no_grad():
        steep[0].weight.copy_(5 * torch.eye(3))  # type: ignore[operator]
    with pytest.raises(solvers.FixedPointNotConverged):
        block(steep).inverse(vectors())
    assert settings() == before
    outputs = block(Shrunk(torch_nn.Conv2d(2, 2, 3, padding=1)))(images())[0]
    outputs.register_hook(lambda gradient: gradient[:, :1])
    with pytest.raises(RuntimeError):
        outputs.sum().backward()
    assert settings() == before


@pytest.mark.parametrize("way", WAYS)
def test_several_threads_leave_the_settings_as_they_were(way: str) -> None:
    torch.manual_seed(0)
    WAYS[way]()
    before = settings()
    cases = [(block(NETS[name][0]()), NETS[name][1]()) for name in ("mlp", "circular", "user's")]
    start = threading.Barrier(len(cases))
    counts: list[int] = []

    def work(transform: Any, inputs: Tensor) -> None:
        start.wait()
        with Emulation() as seen:
            for _ in range(3):
                transform.zero_grad()
                outputs, logabsdet = transform(inputs)
                (outputs.sum() + logabsdet.sum()).backward()
                with pytest.raises((ValueError, RuntimeError)):
                    transform(inputs[:, :1])
        counts.append(seen.count)

    threads = [threading.Thread(target=work, args=each) for each in cases]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert settings() == before
    assert len(counts) == len(cases)


def test_overlapping_blocks_of_threads_restore_once_the_last_has_left() -> None:
    torch.set_float32_matmul_precision("high")
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with tensor_float.switched_off():
            entered.set()
            leave.wait()

    other = threading.Thread(target=hold)
    other.start()
    try:
        entered.wait()
        assert torch.get_float32_matmul_precision() == "highest"
        with precision.full_precision(torch.device("cpu")):
            leave.set()
            other.join()
            assert torch.get_float32_matmul_precision() == "highest"
    finally:
        leave.set()
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["mlp", "circular", "user's", "user's convolutions"])
def test_inside_autocast_too(name: str) -> None:
    torch.manual_seed(0)
    transform, inputs = block(NETS[name][0]()), NETS[name][1]()

    def results(is_on: bool) -> list[Tensor]:
        torch.manual_seed(1)
        transform.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            outputs, logabsdet = transform(inputs)
            found = transform.inverse(outputs.detach())[0]
        (outputs.square().sum() + logabsdet.sum() + found.square().sum()).backward()
        gradients = [each.grad for each in transform.parameters() if each.grad is not None]
        return [outputs.detach(), logabsdet.detach(), found.detach(), *gradients]

    expected = results(False)
    assert_unaffected(lambda: results(True))
    for left, right in zip(results(True), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=2e-5, atol=2e-6)


def test_dense_flows_change_no_setting_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not needed costs nothing, and is not seen by other threads."""
    flow, inputs = ResidualFlow(3, 8, 2), vectors()

    def refuse(self: object) -> None:
        raise AssertionError("a setting was changed")

    monkeypatch.setattr(tensor_float._Settings, "switch_off", refuse)
    flow.log_prob(inputs).sum().backward()


def training_step(flow: Any, inputs: Tensor) -> tuple[int, list[Tensor]]:
    flow.zero_grad()
    torch.manual_seed(1)
    with Emulation() as seen:
        with precision.allow_tf32_in_training():
            loss = flow.log_prob(inputs).sum()
        loss.backward()
    return seen.count, [each.grad.clone() for each in flow.parameters() if each.grad is not None]


@pytest.mark.usefixtures("short")
def test_training_may_be_allowed_short_products() -> None:
    torch.manual_seed(0)
    flow = flows.ImageResidualFlow((1, 4, 4), 6, 1, 1, num_scales=1, levels=16, estimator=SERIES)
    pixels = torch.randint(0, 16, (3, 1, 4, 4)).float()
    log_prob(flow, pixels)
    before = settings()
    forward, backward = 0, 0
    with Emulation() as seen:
        with precision.allow_tf32_in_training():
            loss = flow.log_prob(pixels).sum()
        forward = seen.count
        loss.backward()
        backward = seen.count - forward
    assert forward > 0
    assert backward > 0
    assert settings() == before


@pytest.mark.usefixtures("short")
def test_the_backward_pass_may_be_as_short_as_the_forward_pass() -> None:
    """Each product has two in its backward pass, most of them in nodes derived by hand."""
    torch.manual_seed(0)
    flow, inputs = ResidualFlow(3, 8, 2), vectors()
    flow.log_prob(inputs)
    with Emulation() as seen:
        with precision.allow_tf32_in_training():
            loss = flow.log_prob(inputs).sum()
        forward = seen.count
        loss.backward()
    assert seen.count - forward > forward > 0


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("end", ["done", "an error"])
def test_the_permission_ends_with_its_block(end: str) -> None:
    torch.manual_seed(0)
    flow, inputs = ResidualFlow(3, 8, 2), vectors()
    flow.log_prob(inputs)
    with suppress(ArithmeticError), precision.allow_tf32_in_training():
        with precision.allow_tf32_in_training():
            pass
        with Emulation() as seen:
            flow.log_prob(inputs)
        assert seen.count > 0
        if end == "an error":
            raise ArithmeticError
    with Emulation() as seen:
        flow.log_prob(inputs).sum().backward()
    assert seen.count == 0


@pytest.mark.usefixtures("short")
def test_nothing_but_training_is_allowed_short_products() -> None:
    torch.manual_seed(0)
    flow = flows.ImageResidualFlow((1, 4, 4), 6, 1, 1, num_scales=1, levels=16, estimator=SERIES)
    pixels = torch.randint(0, 16, (3, 1, 4, 4)).float()
    log_prob(flow, pixels)
    noise = flow.transform_to_noise(pixels).detach()
    with Emulation() as seen, precision.allow_tf32_in_training():
        with torch.no_grad():
            flow.log_prob(pixels)
            flow.sample(2)
        flow.lipschitz_bound()
        flow._transform.inverse(noise)
        net = next(each for each in flow.modules() if isinstance(each, nn.LipschitzCNN))
        net.effective_weights()
        flow.eval()
        flow.log_prob(pixels).sum().backward()
    assert seen.count == 0


@pytest.mark.usefixtures("short")
def test_what_is_recomputed_is_as_short_as_it_was() -> None:
    torch.manual_seed(0)
    blocks = [block(nn.LipschitzCNN(2, [6, 6], kernel_sizes=[3, 3, 3])) for _ in range(2)]
    results = []
    for recompute in (False, True):
        transform = transforms.CompositeTransform(blocks, recompute=recompute)
        transform.zero_grad()
        torch.manual_seed(1)
        with Emulation():
            with precision.allow_tf32_in_training():
                outputs, logabsdet = transform(torch.ones(2, 2, 4, 4))
            (outputs.sum() + logabsdet.sum()).backward()
        results.append([each.grad.clone() for each in transform.parameters()])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.usefixtures("short")
def test_a_dense_flow_trains_with_short_products_where_allowed_and_learns_the_same() -> None:
    torch.manual_seed(0)
    flow, inputs = ResidualFlow(3, 16, 2), torch.randn(64, 3)
    flow.log_prob(inputs)
    count, gradients = training_step(flow, inputs)
    assert count > 0
    torch.set_float32_matmul_precision("highest")
    exact = training_step(flow, inputs)
    assert exact[0] == 0
    short, long = [torch.cat([each.flatten() for each in part]) for part in (gradients, exact[1])]
    assert 0 < float((short - long).norm()) < 0.02 * float(long.norm())


def emptied() -> Any:
    @contextmanager
    def nothing(*_: object, **__: object) -> Iterator[tensor_float.Allowed]:
        yield tensor_float.Allowed(products=False, convolutions=False)

    return nothing


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["mlp", "large kernels", "user's", "user's convolutions"])
def test_planted_it_is_seen_if_nothing_is_switched_off(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    transform, inputs = block(NETS[name][0]()), NETS[name][1]()
    monkeypatch.setattr(tensor_float, "switched_off", emptied())
    with Emulation() as seen, torch.no_grad():
        transform(inputs)
    assert seen.count > 0


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["densely connected", "user's convolutions"])
def test_planted_it_is_seen_if_products_are_torchs_nodes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    transform, inputs = block(NETS[name][0]()), NETS[name][1]()
    monkeypatch.setattr(tensor_float, "_is_recorded", lambda: False)
    with Emulation() as seen:
        outputs, logabsdet = transform(inputs)
        assert seen.count == 0
        (outputs.sum() + logabsdet.sum()).backward()
    assert seen.count > 0


def operators(function: Callable[..., Any], *args: Any) -> list[str]:
    """Return the names of what compiled graphs call, forward and backward."""
    from torch._dynamo.backends.common import aot_autograd

    names: list[str] = []

    def keep(module: Any, _: object) -> Any:
        names.extend(str(each.target) for each in module.graph.nodes if each.op == "call_function")
        return _boxed(module.forward)

    torch.compiler.reset()
    compiled = torch.compile(
        function, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    outputs, logabsdet = compiled(*args)
    (outputs.sum() + logabsdet.sum()).backward()
    return names


def _boxed(function: Any) -> Any:
    from torch._functorch import aot_autograd

    compiler: Any = aot_autograd
    return compiler.make_boxed_func(function)


@pytest.mark.slow
@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("name", ["mlp", "large kernels"])
def test_compiled_graphs_use_operators_of_ours(name: str) -> None:
    torch.manual_seed(0)
    transform, inputs = block(NETS[name][0]()), NETS[name][1]()
    everything(transform, inputs)
    inputs.requires_grad_()
    names = operators(transform, inputs)
    assert any("nflows_iresnet" in each for each in names)
    assert not any("aten.convolution" in each or "aten.mm" in each for each in names)
    assert not any("aten.addmm" in each for each in names)
    torch.compiler.reset()


@pytest.mark.parametrize("setting", ["highest", "high"])
def test_nodes_are_differentiated_as_torchs_own(setting: str) -> None:
    """Their first and second derivatives, by finite differences in float64."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision(setting)
    form = tensor_float._Matrices()
    left, right = torch.randn(3, 4, dtype=torch.double), torch.randn(4, 2, dtype=torch.double)
    leaves = [left.requires_grad_(), right.requires_grad_()]
    bias = torch.randn(2, dtype=torch.double, requires_grad=True)

    def product(left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
        return tensor_float._product(form, 2, left, right, None, bias=bias)

    assert torch.autograd.gradcheck(product, [*leaves, bias], check_forward_ad=True)
    assert torch.autograd.gradgradcheck(product, [*leaves, bias])
    pictures = torch.randn(2, 4, 5, 4, dtype=torch.double, requires_grad=True)
    weight = torch.randn(6, 2, 3, 2, dtype=torch.double, requires_grad=True)
    shift = torch.randn(6, dtype=torch.double, requires_grad=True)

    def convolution(inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return tensor_float._convolve(None, inputs, weight, bias, (2, 1), (1, 0), (1, 2), 2)

    given = [pictures, weight, shift]
    assert torch.autograd.gradcheck(convolution, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(convolution, given)
    torch.testing.assert_close(
        convolution(*given),
        F.conv2d(pictures, weight, shift, (2, 1), (1, 0), (1, 2), 2),
    )


def test_linearisations_by_themselves_are_unaffected() -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    net, inputs = NETS["user's"][0](), vectors()

    def results() -> list[Tensor]:
        at = linearization.linearize(net, inputs)
        return [each.detach() for each in (at.value, at.jvp(inputs), at.vjp(inputs), at.trace())]

    assert_unaffected(results)


def hybrid(partner: Any) -> Any:
    return flows.HybridFlow(4, 8, 2, context_features=2, partner=partner)


PARTNERS: dict[str, Callable[[], Any]] = {
    "spline-coupling": lambda: hybrid(flows.spline_coupling),
    "affine-coupling": lambda: hybrid(flows.affine_coupling),
    "residual": lambda: ResidualFlow(4, 8, 2, context_features=2),
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("build", PARTNERS.values(), ids=PARTNERS)
def test_inverses_of_what_is_trained_have_no_short_products(build: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    flow, rows, context = build(), torch.randn(5, 4), torch.randn(5, 2)
    flow.log_prob(rows, context)
    with Emulation() as seen, precision.allow_tf32_in_training():
        flow._transform.inverse(rows, context)
        flow.sample(3, context)
        assert seen.count == 0
        flow.log_prob(rows, context)
        assert seen.count > 0


@pytest.mark.usefixtures("short")
def test_monotone_blocks_solve_in_full_precision_where_training_may_be_short() -> None:
    torch.manual_seed(0)
    block = transforms.MonotoneTransform(nn.LipschitzMLP(3, [16, 16]))
    inputs = torch.randn(64, 3)
    expected = block(inputs)[0]
    with Emulation(), precision.allow_tf32_in_training():
        found = block(inputs)[0]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
