"""Inputs and orders of calls that nobody thought of: each is answered rightly, or refused by us.

The judge is the dense Jacobian, in float64. Examples are the same in each run; to look for others,
`pytest tests/test_generated.py --hypothesis-seed=1` after `HYPOTHESIS_EXAMPLES=1000`.
"""

from __future__ import annotations

import copy
import io
import math
import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from nflows_iresnet import ResidualFlow, ResidualTransform, logdet, transforms
from nflows_iresnet.interop.distributions import ToTorchDistribution, ToTorchTransform
from nflows_iresnet.solvers import FixedPointNotConverged
from tests.cases import CASES

_WANTED = int(os.environ.get("HYPOTHESIS_EXAMPLES", "0"))


def _examples(count: int) -> settings:
    return settings(
        max_examples=_WANTED or count, derandomize=not _WANTED, deadline=None, database=None
    )


def require_refusal(error: Exception, what: str = "") -> None:
    """Require an error that this package raises on purpose, and that says something."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    is_known = isinstance(error, (ValueError, FixedPointNotConverged))
    is_ours = is_known and "nflows_iresnet" in where and len(str(error)) > 20
    if not (is_ours and what in str(error)):
        raise AssertionError(f"neither right nor refused with {what!r}: {error!r}") from error


NAMES = (
    "mlp-2",
    "mlp-context",
    "mlp-maxmin",
    "module-of-a-user",
    "dense-net-clipswish",
    "cnn-3-1-3",
    "monotone-mlp",
    "conditional-affine",
    "marginal-spline",
    "linear",
    "act-norm",
    "act-norm-images",
    "residual-flow",
)
OURS = [name for name in NAMES if name != "module-of-a-user"]
"""A network of a user has errors of its own."""


@cache
def _built(name: str) -> nn.Module:
    torch.manual_seed(4)
    model = CASES[name].factory()
    size = 0.05 if name == "residual-flow" else 0.3  # many maps, whose conditions multiply
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model


def _model(name: str, dtype: torch.dtype) -> Any:
    """Return a copy of a case with weights far from its start and an exact log-determinant."""
    model = copy.deepcopy(_built(name)).to(dtype)
    for block in model.modules():
        if isinstance(block, ResidualTransform):
            block.estimator = logdet.Exact()
    return model


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "offset": lambda x: torch.cat([x.new_full((*x.shape[:-1], 1), 7.0), x], -1)[..., 1:],
    "flipped": lambda x: x.flip(0, -1).contiguous().flip(0, -1),
    "one row for all": lambda x: x.sum(0, keepdim=True).expand_as(x),
    "one value for all": lambda x: torch.full_like(x, float(x.sum())),
    "one value, stride 0": lambda x: x.sum().reshape([1] * x.dim()).expand_as(x),
    "of a larger batch": lambda x: torch.cat([x, x])[: x.shape[0]],
    "with a graph": lambda x: x.clone().requires_grad_() if x.is_floating_point() else x,
}
KINDS = (torch.float64, torch.float32)
OTHER_KINDS = (torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


@dataclass(frozen=True)
class Batch:
    """What a transform is given, described so that a failure can be read and repeated."""

    name: str
    weights: torch.dtype
    rows: int
    exponent: float
    layout: str
    dtype: torch.dtype | None = None
    bad: float | None = None
    seed: int = 0

    def values(self, shape: tuple[int, ...]) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        numbers = torch.randn(self.rows, *shape, generator=generator, dtype=torch.float64)
        numbers = (10.0**self.exponent * numbers).to(self.weights)
        if self.bad is not None and self.rows > 0:
            numbers[-1].flatten()[0] = self.bad
        if self.dtype is not None:
            numbers = numbers.to(self.dtype)
        return LAYOUTS[self.layout](numbers)

    def inputs(self) -> Tensor:
        return self.values(tuple(CASES[self.name].inputs().shape[1:]))

    def context(self) -> Tensor | None:
        features = CASES[self.name].context_features
        if features is None:
            return None
        mild = replace(self, exponent=self.exponent / 30, dtype=None, bad=None)
        return mild.values((features,))


def batches(**fixed: Any) -> st.SearchStrategy[Batch]:
    choices: dict[str, Any] = {
        "name": st.sampled_from(NAMES),
        "weights": st.sampled_from(KINDS),
        "rows": st.sampled_from((3, 1, 2, 0)),
        "exponent": st.one_of(st.floats(-3, 3), st.floats(-30, 30)),
        "layout": st.sampled_from(tuple(LAYOUTS)),
        "seed": st.integers(0, 9),
    }
    return st.builds(Batch, **{**choices, **fixed})


def _dense(model: Any, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return outputs and log|det|, each row by itself, by automatic differentiation in float64."""
    judge = copy.deepcopy(model).double().eval()
    outputs, logabsdets = [], []
    for index in range(inputs.shape[0]):
        row = inputs[index].detach().double().contiguous().clone()
        alone = None if context is None else context[index : index + 1].detach().double()

        def of_row(values: Tensor, given: Tensor | None = alone) -> Tensor:
            mapped: Tensor = judge(values[None], given)[0][0]
            return mapped

        jacobian: Any = torch.autograd.functional.jacobian(of_row, row)
        outputs.append(of_row(row).detach())
        logabsdets.append(torch.linalg.slogdet(jacobian.reshape(row.numel(), -1)).logabsdet)
    if not outputs:
        return inputs.double(), inputs.new_zeros(0).double()
    return torch.stack(outputs), torch.stack(logabsdets)


def _size(*values: Tensor) -> Tensor:
    """Return the largest magnitude of each row, shape (B,)."""
    return torch.stack([each.detach().double().abs().flatten(1).amax(1) for each in values]).amax(0)


def require_right(model: Any, batch: Batch, outputs: Tensor, logabsdet: Tensor) -> None:
    """Compare with the dense Jacobian, as closely as rounding of what goes in permits.

    An activation that oscillates has another derivative an ulp further: where that is visible, the
    log-determinant is only known to be finite.
    """
    inputs, context = batch.inputs(), batch.context()
    assert outputs.shape == inputs.shape
    assert logabsdet.shape == inputs.shape[:1]
    assert outputs.dtype == logabsdet.dtype == batch.weights
    if batch.rows == 0:
        return
    expected, exact = _dense(model, inputs, context)
    unit, size = torch.finfo(batch.weights).eps, _size(inputs, expected)
    error = _size(outputs.double() - expected)
    assert bool((error <= 1e3 * unit * (size + 1e-300)).all() | (error <= 1e3 * unit).all()), error
    assert bool(logabsdet.isfinite().all())
    allowed = 1e4 * unit * (1 + size)
    difference = (logabsdet.double() - exact).abs()
    assert bool(((difference <= allowed) | (allowed > 0.1)).all()), (difference, allowed)


@_examples(70)
@given(batch=batches(), training=st.booleans(), grad=st.booleans())
def test_forward_is_that_of_the_dense_jacobian(batch: Batch, training: bool, grad: bool) -> None:
    model = _model(batch.name, batch.weights).train(training)
    with torch.set_grad_enabled(grad):
        outputs, logabsdet = model(batch.inputs(), batch.context())
    require_right(model, batch, outputs, logabsdet)


@_examples(50)
@given(batch=batches(), training=st.booleans())
def test_the_inverse_undoes_the_forward(batch: Batch, training: bool) -> None:
    model, targets, context = _model(batch.name, batch.weights), batch.inputs(), batch.context()
    model.train(training)
    found, logabsdet = model.inverse(targets, context)
    assert found.shape == targets.shape
    assert found.dtype == logabsdet.dtype == batch.weights
    if batch.rows == 0:
        return
    again, exact = _dense(model, found, context)
    unit, size = torch.finfo(batch.weights).eps, _size(found, targets)
    assert bool((_size(again - targets) <= 1e6 * unit * (1 + size)).all())
    allowed = 1e4 * unit * (1 + size)
    difference = (logabsdet.double() + exact).abs()
    assert bool(((difference <= allowed) | (allowed > 0.1)).all()), (difference, allowed)


@_examples(60)
@given(
    batch=batches(bad=st.sampled_from((math.nan, math.inf, -math.inf))),
    training=st.booleans(),
    inverse=st.booleans(),
)
def test_a_row_that_is_not_finite_stays_alone_or_is_refused(
    batch: Batch, training: bool, inverse: bool
) -> None:
    model = _model(batch.name, batch.weights).train(training)
    inputs, context = batch.inputs(), batch.context()
    call = model.inverse if inverse else model.forward
    try:
        outputs, logabsdet = call(inputs, context)
    except Exception as error:
        require_refusal(error)
        assert not bool(inputs.isfinite().all())
        return
    is_good = inputs.isfinite().flatten(1).all(1)
    assert not bool(outputs[~is_good].isfinite().flatten(1).all(1).any())
    assert bool(outputs[is_good].isfinite().all())
    assert bool(logabsdet[is_good].isfinite().all())
    given_context = None if context is None else context[is_good]
    alone, alone_logabsdet = call(inputs[is_good], given_context)
    if batch.exponent < 2:
        torch.testing.assert_close(outputs[is_good], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logabsdet[is_good], alone_logabsdet, rtol=1e-4, atol=1e-4)


@_examples(50)
@given(
    batch=batches(dtype=st.sampled_from((*KINDS, *OTHER_KINDS)), exponent=st.floats(-2, 2)),
    inverse=st.booleans(),
)
def test_another_precision_is_converted_or_refused(batch: Batch, inverse: bool) -> None:
    model = _model(batch.name, batch.weights).eval()
    inputs, context = batch.inputs(), batch.context()
    call = model.inverse if inverse else model.forward
    try:
        outputs, logabsdet = call(inputs, context)
    except Exception as error:
        require_refusal(error, str(inputs.dtype).removeprefix("torch."))
        assert inputs.dtype != batch.weights
        return
    assert inputs.dtype in (batch.weights, torch.float16, torch.bfloat16)
    expected, expected_logabsdet = call(inputs.to(batch.weights), context)
    torch.testing.assert_close(outputs, expected)
    torch.testing.assert_close(logabsdet, expected_logabsdet)


@_examples(50)
@given(
    batch=batches(
        name=st.sampled_from(OURS),
        exponent=st.floats(-2, 2),
        layout=st.just("contiguous"),
    ),
    change=st.sampled_from(("a row alone", "a number", "more", "fewer", "more dimensions", "list")),
    inverse=st.booleans(),
)
def test_another_shape_is_refused(batch: Batch, change: str, inverse: bool) -> None:
    model, x = _model(batch.name, batch.weights), replace(batch, rows=max(1, batch.rows)).inputs()
    changed: Any = {
        "a row alone": x[0],
        "a number": x.sum(),
        "more": torch.cat([x, x], 1),
        "fewer": x.narrow(1, 0, x.shape[1] - 1),
        "more dimensions": x[:, None],
        "list": x.tolist(),
    }[change]
    call = model.inverse if inverse else model.forward
    with pytest.raises(Exception) as caught:
        call(changed, replace(batch, rows=x.shape[0]).context())
    require_refusal(caught.value)


CONTEXTS: dict[str, Callable[[Tensor], Any]] = {
    "forgotten": lambda c: None,
    "too many rows": lambda c: torch.cat([c, c]),
    "too few rows": lambda c: c[:-1],
    "too many values": lambda c: torch.cat([c, c], 1),
    "too few values": lambda c: c[:, :1],
    "no rows": lambda c: c[0],
    "integers": lambda c: c.long(),
    "a list": lambda c: c.tolist(),
}


@_examples(50)
@given(
    batch=batches(
        name=st.sampled_from([n for n in OURS if CASES[n].context_features]),
        rows=st.just(3),
        exponent=st.floats(-2, 2),
    ),
    change=st.sampled_from(tuple(CONTEXTS)),
    inverse=st.booleans(),
)
def test_another_context_is_refused(batch: Batch, change: str, inverse: bool) -> None:
    model, context = _model(batch.name, batch.weights), batch.context()
    assert context is not None
    call = model.inverse if inverse else model.forward
    with pytest.raises(Exception) as caught:
        call(batch.inputs(), CONTEXTS[change](context))
    require_refusal(caught.value)


class Life(RuleBasedStateMachine):
    """What may happen to a flow, in any order: after each step its density is that of its Jacobian.

    Beside the flow lives a cached `ToTorchTransform` of it, which must never be out of date.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flow = ResidualFlow(2, 8, 2)
        self.rows = torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
        self.adapted = ToTorchTransform(self.flow, cache_size=1)
        self.is_frozen = False

    def _rows(self) -> Tensor:
        return self.rows.to(next(self.flow.parameters()).dtype)

    def _weights(self) -> dict[str, Tensor]:
        return {name: each.detach().clone() for name, each in self.flow.named_parameters()}

    def _replace(self, flow: ResidualFlow) -> None:
        rows = self._rows()
        with torch.no_grad():
            flow.eval(), self.flow.eval()
            torch.testing.assert_close(flow.log_prob(rows), self.flow.log_prob(rows))
        self.flow, self.adapted = flow, ToTorchTransform(flow, cache_size=1)

    @rule(rate=st.sampled_from((1e-3, 0.1, 3.0)), scale=st.sampled_from((1.0, 1e-6, 1e6)))
    def train_a_step(self, rate: float, scale: float) -> None:
        self.flow.train()
        before = self._weights()
        loss = -self.flow.log_prob(scale * self._rows()).mean()
        if self.is_frozen:
            assert not loss.requires_grad
            return
        optimizer = torch.optim.SGD(self.flow.parameters(), rate)
        loss.backward()
        nn.utils.clip_grad_norm_(self.flow.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert any(not torch.equal(each, before[n]) for n, each in self._weights().items())

    @rule(count=st.integers(1, 3))
    def sample(self, count: int) -> None:
        before = self._weights()
        samples, log_prob = self.flow.sample_and_log_prob(count)
        assert samples.shape == (count, 2)
        torch.testing.assert_close(
            self.flow.eval().log_prob(samples), log_prob, atol=1e-2, rtol=1e-3
        )
        assert ToTorchDistribution(self.flow).rsample((count,)).shape == (count, 2)
        assert all(torch.equal(each, before[name]) for name, each in self._weights().items())

    @rule(scale=st.sampled_from((1e-3, 1.0, 100.0)))
    def start_anew(self, scale: float) -> None:
        self.flow.initialize(scale * self._rows() + scale)

    @rule(training=st.booleans())
    def change_mode(self, training: bool) -> None:
        self.flow.train(training)

    @rule(dtype=st.sampled_from((torch.float32, torch.float64)))
    def change_precision(self, dtype: torch.dtype) -> None:
        self.flow.to(dtype)

    @rule()
    def freeze_or_melt(self) -> None:
        self.is_frozen = not self.is_frozen
        self.flow.requires_grad_(not self.is_frozen)

    @rule(size=st.sampled_from((1e-3, 0.3, 30.0)))
    def disturb(self, size: float) -> None:
        with torch.no_grad():
            for name, each in self.flow.named_parameters():
                if "net" in name:
                    each.add_(size * torch.randn_like(each))

    @rule()
    def copy(self) -> None:
        self._replace(copy.deepcopy(self.flow))

    @rule()
    def pickle(self) -> None:
        self._replace(pickle.loads(pickle.dumps(self.flow)))

    @rule()
    def save_and_load(self) -> None:
        stored = io.BytesIO()
        torch.save(self.flow.state_dict(), stored)
        stored.seek(0)
        fresh = ResidualFlow(2, 8, 2).to(next(self.flow.parameters()).dtype)
        fresh.requires_grad_(not self.is_frozen)
        if not self.is_frozen:
            fresh.train().log_prob(7 * self._rows())
        fresh.load_state_dict(torch.load(stored, weights_only=True))
        self._replace(fresh)

    @rule(mode=st.sampled_from((torch.no_grad, torch.inference_mode)))
    def look(self, mode: Callable[[], Any]) -> None:
        with mode():
            assert not self.flow.log_prob(self._rows()).requires_grad
            assert not self.flow.sample(2).requires_grad

    @rule(bad=st.sampled_from((math.nan, math.inf)))
    def train_on_what_is_no_number(self, bad: float) -> None:
        before, rows = self._weights(), self._rows().clone()
        rows[1, 0] = bad
        with pytest.raises(ValueError, match="not finite"):
            self.flow.train().log_prob(rows)
        assert all(torch.equal(each, before[name]) for name, each in self._weights().items())

    @invariant()
    def the_density_is_that_of_the_jacobian(self) -> None:
        was_training, rows = self.flow.training, self._rows()
        self.flow.eval()
        with transforms.using(self.flow, estimator=logdet.Exact()), torch.no_grad():
            log_prob = self.flow.log_prob(rows)
        noise, exact = _dense(self.flow._transform, rows, None)
        expected = exact - noise.square().sum(1) / 2 - math.log(2 * math.pi)
        unit = torch.finfo(rows.dtype).eps
        allowed = 1e5 * unit * (1 + noise.square().sum(1))
        assert bool(((log_prob.double() - expected).abs() <= allowed).all()), (log_prob, expected)
        assert max(self.flow.lipschitz_bound().blocks) <= 0.97
        self.flow.train(was_training)

    @invariant()
    def the_cache_is_never_out_of_date(self) -> None:
        rows = self._rows()
        was_training = self.flow.training
        self.flow.eval()
        for _ in range(2):
            with transforms.using(self.flow, estimator=logdet.Exact()):
                cached, ladj = self.adapted.call_and_ladj(rows)
                noise, logabsdet = self.flow._transform(rows)
            torch.testing.assert_close(cached, noise)
            torch.testing.assert_close(ladj, logabsdet)
        self.flow.train(was_training)


TestLife = Life.TestCase
TestLife.settings = settings(_examples(12), stateful_step_count=12)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("name", OURS)
def test_what_is_no_tensor_is_refused(name: str, inverse: bool) -> None:
    """Found by the tests above: a list as a context, a number as the inputs of a composition."""
    model, case = _model(name, torch.float64), CASES[name]
    call: Any = model.inverse if inverse else model.forward
    with pytest.raises(ValueError, match="must be a tensor, got list"):
        call(case.inputs().tolist(), case.context())
    with pytest.raises(ValueError, match="shape"):
        call(torch.tensor(1.0, dtype=torch.float64), case.context())
    context = case.context()
    if context is not None:
        with pytest.raises(ValueError, match="context must be a tensor, got list"):
            call(case.inputs(), context.tolist())
