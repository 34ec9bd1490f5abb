"""What threads, tasks and processes see of each other: of `using`, and of one flow that they share.

A strategy that answers with a number of its own tells which one was asked.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from nflows_iresnet import ResidualFlow, flows, logdet, solvers, tensor_float, transforms
from nflows_iresnet.graphs import GraphedStep, NotCapturedWarning
from nflows_iresnet.linearization import Linearization
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.transforms import MonotoneTransform, ResidualTransform, using
from tests.emulated_graph import EmulatedRecorder, recorder

__all__ = ["recorder"]


@dataclass(frozen=True)
class Says(logdet.LogDetEstimator):
    """An estimator that answers with one number, which moves with the point."""

    number: float

    def logabsdet(
        self,
        at_inputs: Linearization,
        lipschitz: float | None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        values = at_inputs.value.flatten(start_dim=1).sum(1)
        return self.number + self.number * (values - values.detach()), None


def block(number: float = 0.0) -> ResidualTransform:
    torch.manual_seed(0)
    return ResidualTransform(LipschitzMLP(2, [8]), estimator=Says(number))


def answer(module: Any) -> float:
    with torch.no_grad():
        return float(module(torch.zeros(1, 2))[1])


def in_thread(function: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_two_threads_use_different_estimators_on_one_flow() -> None:
    flow, meeting = block(), threading.Barrier(2)

    def work(number: float) -> list[float]:
        heard = []
        for _ in range(20):
            with using(flow, estimator=Says(number)):
                meeting.wait(30)
                heard.append(answer(flow))
                meeting.wait(30)
                heard.append(answer(flow))
            heard.append(answer(flow))
        return heard

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(work, (1.0, 2.0))
    assert one == [1.0, 1.0, 0.0] * 20
    assert two == [2.0, 2.0, 0.0] * 20


def test_two_threads_get_the_exact_and_the_truncated_value_of_a_real_flow() -> None:
    torch.manual_seed(0)
    flow = ResidualFlow(3, 8, 2).double().eval()
    rows = torch.randn(5, 3, dtype=torch.float64)
    estimators = [logdet.Exact(), logdet.PowerSeries(num_terms=1, exact_trace=True)]
    meeting = threading.Barrier(2)

    def work(estimator: logdet.LogDetEstimator) -> list[Tensor]:
        with using(flow, estimator=estimator), torch.no_grad():
            meeting.wait(30)
            return [flow.log_prob(rows) for _ in range(10)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(work, estimators))
    for estimator, values in zip(estimators, found, strict=True):
        with using(flow, estimator=estimator), torch.no_grad():
            expected = flow.log_prob(rows)
        for value in values:
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)
    assert float((found[0][0] - found[1][0]).abs().min()) > 1e-6


def test_a_thread_that_is_started_inside_has_it_if_it_is_given_the_context() -> None:
    flow = block()
    with using(flow, estimator=Says(1.0)):
        context = contextvars.copy_context()
        assert in_thread(lambda: answer(flow)) == 0.0
        assert in_thread(lambda: context.run(answer, flow)) == 1.0
        assert asyncio.run(asyncio.to_thread(answer, flow)) == 1.0
    assert in_thread(lambda: context.run(answer, flow)) == 0.0


def test_tasks_that_take_turns_keep_their_own() -> None:
    flow = block()

    async def work(number: float | None) -> list[float]:
        heard = []
        for _ in range(5):
            if number is None:
                await asyncio.sleep(0)
                heard.append(answer(flow))
                continue
            with using(flow, estimator=Says(number)):
                await asyncio.sleep(0)
                heard.append(answer(flow))
        return heard

    async def together() -> list[list[float]]:
        return await asyncio.gather(*map(work, (1.0, 2.0, None)))

    assert asyncio.run(together()) == [[1.0] * 5, [2.0] * 5, [0.0] * 5]


def test_a_task_that_is_started_inside_has_it_until_the_block_ends() -> None:
    flow = block()

    async def work(seen: list[float], go_on: asyncio.Event) -> None:
        seen.append(answer(flow))
        await go_on.wait()
        seen.append(answer(flow))

    async def main() -> list[float]:
        seen: list[float] = []
        go_on = asyncio.Event()
        with using(flow, estimator=Says(1.0)):
            task = asyncio.create_task(work(seen, go_on))
            await asyncio.sleep(0)
        go_on.set()
        await task
        return seen

    assert asyncio.run(main()) == [1.0, 0.0]


def test_the_innermost_counts_for_each_strategy_by_itself() -> None:
    first, second, inner = block(1.0), block(2.0), solvers.Anderson(atol=1e-3)
    flow = nn.Sequential(first, second)
    with using(flow, estimator=Says(3.0)):
        with using(first, solver=inner):
            assert (answer(first), answer(second)) == (3.0, 3.0)
            assert (first.solver, second.solver) == (inner, solvers.Anderson())
            with using(first, estimator=Says(4.0)):
                assert (answer(first), answer(second)) == (4.0, 3.0)
                assert first.solver == inner
        assert first.solver == solvers.Anderson()
        assert answer(first) == 3.0
    assert (answer(first), answer(second)) == (1.0, 2.0)


def test_an_error_ends_it_in_its_own_thread_alone() -> None:
    flow, inside, leave = block(), threading.Event(), threading.Event()

    def work() -> list[float]:
        with using(flow, estimator=Says(1.0)):
            inside.set()
            assert leave.wait(30)
            return [answer(flow)]

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(work)
        assert inside.wait(30)
        with pytest.raises(KeyError), using(flow, estimator=Says(2.0)):
            raise KeyError(answer(flow))
        assert answer(flow) == 0.0
        leave.set()
        assert other.result() == [1.0]


def used(flow: nn.Module, number: float) -> Iterator[float]:
    with using(flow, estimator=Says(number)):
        yield answer(flow)
        yield answer(flow)


def test_blocks_that_end_in_any_order_leave_nothing_behind() -> None:
    flow = block()
    first, second = used(flow, 1.0), used(flow, 2.0)
    assert [next(first), next(second)] == [1.0, 2.0]
    first.close()  # type: ignore[attr-defined]
    assert answer(flow) == 2.0
    second.close()  # type: ignore[attr-defined]
    assert answer(flow) == 0.0


def test_a_generator_that_is_closed_in_another_thread_ends_it_where_it_began() -> None:
    flow = block()
    generator = used(flow, 1.0)
    assert next(generator) == 1.0
    in_thread(generator.close)  # type: ignore[attr-defined]
    assert answer(flow) == 0.0
    with using(flow, estimator=Says(2.0)):
        assert answer(flow) == 2.0


def test_it_decorates_functions_that_threads_run() -> None:
    flow = block()

    @using(flow, estimator=Says(1.0))
    def decorated() -> float:
        return answer(flow)

    assert [decorated(), in_thread(decorated), answer(flow)] == [1.0, 1.0, 0.0]


def test_what_is_assigned_inside_is_in_force_afterwards() -> None:
    flow = block(1.0)
    with using(flow, estimator=Says(2.0)):
        flow.estimator = Says(3.0)
        assert answer(flow) == 2.0
    assert answer(flow) == 3.0


def through_file(flow: nn.Module, folder: Path) -> nn.Module:
    torch.save(flow, folder / "flow.pt")
    loaded: nn.Module = torch.load(folder / "flow.pt", weights_only=False)
    return loaded


TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
compiles = pytest.mark.skipif(TORCH < (2, 9), reason="older compilers do not take our networks")

COPIES: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "deepcopy": lambda flow, _: copy.deepcopy(flow),
    "copy": lambda flow, _: copy.copy(flow),
    "pickle": lambda flow, _: pickle.loads(pickle.dumps(flow)),
    "torch.save": through_file,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_that_is_made_inside_has_the_own_strategies(name: str, tmp_path: Path) -> None:
    flow = block(1.0)
    with using(flow, estimator=Says(2.0), solver=solvers.FixedPointIteration()):
        made = COPIES[name](flow, tmp_path)
        assert answer(made) == 1.0
        with using(made, estimator=Says(3.0)):
            assert (answer(made), answer(flow)) == (3.0, 2.0)
    assert (answer(made), answer(flow)) == (1.0, 1.0)
    assert made.solver == solvers.Anderson()


def test_a_pickle_of_before_has_its_strategies() -> None:
    older = block(1.0)
    state = vars(older).copy()
    del state["_uses"]
    state["estimator"], state["solver"] = state.pop("_estimator"), state.pop("_solver")
    younger = ResidualTransform.__new__(ResidualTransform)
    younger.__setstate__(state)
    assert answer(younger) == 1.0
    assert younger.solver == solvers.Anderson()
    with using(younger, estimator=Says(2.0)):
        assert answer(younger) == 2.0


def test_replicas_for_other_threads_have_what_is_in_force_where_they_are_made() -> None:
    """`torch.nn.DataParallel` makes replicas in the caller's thread, and runs each in one."""
    flow = block(1.0)
    with using(flow, estimator=Says(2.0)):
        replica = flow._replicate_for_data_parallel()
        replica.net = flow.net
        assert in_thread(lambda: answer(replica)) == 2.0
    assert answer(flow) == 1.0


def test_distributed_data_parallel_uses_what_is_in_force(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(block(1.0))
        with using(parallel, estimator=Says(2.0)):
            logabsdet = parallel(torch.zeros(1, 2))[1]
        logabsdet.sum().backward()
        assert float(logabsdet) == 2.0
        assert answer(parallel) == 1.0
    finally:
        distributed.destroy_process_group()


@compiles
@pytest.mark.parametrize("first", ["outside", "inside"])
def test_what_is_compiled_follows(first: str) -> None:
    torch.compiler.reset()
    flow = block(1.0)
    compiled = torch.compile(lambda: flow(torch.zeros(1, 2))[1].detach(), backend="eager")
    for place in ([first] + ["outside", "inside"] * 2) + ["outside"]:
        with ExitStack() as stack:
            if place == "inside":
                stack.enter_context(using(flow, estimator=Says(2.0)))
            assert float(compiled()) == {"outside": 1.0, "inside": 2.0}[place]
            assert float(in_thread(compiled)) == 1.0


@compiles
def test_other_flows_are_compiled_to_one_graph_inside() -> None:
    torch.compiler.reset()
    flow, other = block(1.0), block(2.0)
    compiled = torch.compile(
        lambda: other(torch.zeros(1, 2))[1].detach(), backend="eager", fullgraph=True
    )
    with using(flow, estimator=Says(3.0)):
        assert float(compiled()) == 2.0


def gradient(make: Callable[[ResidualTransform, Tensor], Tensor], later: Any) -> Tensor:
    """Return the gradient of what is made inside of `using` 2, when `later` runs the backward."""
    flow, inputs = block(1.0), torch.ones(3, 2, requires_grad=True)
    with using(flow, estimator=Says(2.0)):
        loss = make(flow, inputs)
    later(flow, loss.backward)
    assert inputs.grad is not None
    return inputs.grad


def backward_inside_another(flow: nn.Module, backward: Callable[[], None]) -> None:
    with using(flow, estimator=Says(3.0)):
        backward()


BACKWARDS: dict[str, Any] = {
    "afterwards": lambda flow, backward: backward(),
    "in a thread": lambda flow, backward: in_thread(backward),
    "inside another": backward_inside_another,
}


def plain(flow: ResidualTransform, inputs: Tensor) -> Tensor:
    return flow(inputs)[1].sum()


def recomputing(flow: ResidualTransform, inputs: Tensor) -> Tensor:
    return transforms.CompositeTransform([flow], recompute=True)(inputs)[1].sum()


def checkpointed(flow: ResidualTransform, inputs: Tensor) -> Tensor:
    def function(rows: Tensor) -> Tensor:
        with using(flow, estimator=Says(2.0)):
            return plain(flow, rows)

    return checkpoint(function, inputs, use_reentrant=False)


@pytest.mark.parametrize("later", BACKWARDS.values(), ids=BACKWARDS)
@pytest.mark.parametrize("make", [recomputing, checkpointed])
def test_the_backward_pass_is_that_of_what_the_forward_pass_used(make: Any, later: Any) -> None:
    expected = gradient(plain, BACKWARDS["afterwards"])
    assert float(expected.abs().max()) > 1e-3
    torch.testing.assert_close(gradient(make, later), expected)


@dataclass(frozen=True)
class Noted(solvers.FixedPointIteration):
    """A solver that notes its name when it is asked."""

    name: str = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ASKED.append(self.name)
        return super().__call__(*args, **kwargs)


ASKED: list[str] = []


@pytest.mark.parametrize("later", BACKWARDS.values(), ids=BACKWARDS)
def test_the_solver_of_a_recomputed_block_is_that_of_the_forward_pass(later: Any) -> None:
    own, its = Noted(name="own"), Noted(name="used")
    monotone = MonotoneTransform(LipschitzMLP(2, [8]), estimator=logdet.Exact(), solver=own)
    flow = transforms.CompositeTransform([monotone], recompute=True)
    ASKED.clear()
    with using(flow, solver=its):
        loss = flow(torch.randn(3, 2))[0].sum()
    later(flow, loss.backward)
    assert set(ASKED) == {"used"}
    assert len(ASKED) > 2


def train_step(flow: nn.Module) -> GraphedStep:
    optimizer = torch.optim.Adam(flow.parameters(), 1e-3, capturable=True)
    return GraphedStep(
        flow, optimizer, torch.zeros(4, 2), loss=lambda flow, rows: flow(rows)[1].mean()
    )


def test_a_graph_is_not_replayed_for_another_estimator(recorder: EmulatedRecorder) -> None:
    flow = block(1.0)
    step, rows = train_step(flow), torch.zeros(4, 2)
    assert step.is_captured
    step(rows)
    assert float(step(rows)) == 1.0
    replays = recorder.replays
    with (
        using(flow, estimator=Says(2.0)),
        pytest.warns(NotCapturedWarning, match=r"estimator .*Says\(number=2.0\).*Says\(number=1"),
    ):
        assert float(step(rows)) == 2.0
    assert recorder.replays == replays
    assert float(step(rows)) == 1.0
    assert recorder.replays == replays + 1


def test_a_graph_is_captured_with_the_estimator_in_force(recorder: EmulatedRecorder) -> None:
    flow, rows = block(1.0), torch.zeros(4, 2)
    with using(flow, estimator=Says(2.0)):
        step = train_step(flow)
        assert step.is_captured
        losses = [float(step(rows)) for _ in range(3)]
    assert losses == [2.0] * 3
    assert recorder.replays > 0


def image_flow() -> flows.ImageResidualFlow:
    return flows.ImageResidualFlow((1, 4, 4), 4, 1)


SHARED = {
    "default": (lambda: ResidualFlow(3, 8, 2), (3,)),
    "image": (image_flow, (1, 4, 4)),
}


@pytest.mark.parametrize("name", SHARED)
def test_two_threads_that_call_one_flow_get_what_one_gets(name: str) -> None:
    make, shape = SHARED[name]
    torch.manual_seed(0)
    flow: Any = make()
    rows = 256 * torch.rand(2, 6, *shape)
    flow.log_prob(rows[0])
    flow.eval()

    def work(half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = half.clone().requires_grad_()
        with using(flow, estimator=logdet.Exact()):
            noise, logabsdet = flow._transform(inputs)
        (gradient,) = torch.autograd.grad(logabsdet.sum(), inputs)
        with torch.no_grad():
            return logabsdet.detach(), gradient, flow._transform.inverse(noise)[0]

    expected = [work(half) for half in rows]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            for found, wanted in zip(pool.map(work, rows), expected, strict=True):
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_copy_is_evaluated_while_the_flow_is_trained() -> None:
    torch.manual_seed(0)
    flow, rows = ResidualFlow(2, 8, 2), torch.randn(16, 2)
    flow.initialize(rows)
    twin, still = copy.deepcopy(flow), copy.deepcopy(flow).eval()

    def train(model: ResidualFlow) -> list[float]:
        optimizer = torch.optim.Adam(model.parameters(), 1e-2)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = -model.log_prob(rows).mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return losses

    def evaluate() -> list[Tensor]:
        with torch.no_grad():
            return [still.log_prob(rows) for _ in range(20)]

    expected, value = train(twin), evaluate()[0]
    with ThreadPoolExecutor(2) as pool:
        training, evaluation = pool.submit(train, flow), pool.submit(evaluate)
    assert training.result() == pytest.approx(expected, rel=1e-5)
    for each in evaluation.result():
        torch.testing.assert_close(each, value, rtol=0, atol=1e-6)


class Scored(Dataset[Tensor]):
    """Rows with what a flow says of them, asked in the process that loads them."""

    def __init__(self, flow: nn.Module) -> None:
        self.flow = flow

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, index: int) -> Tensor:
        return self.flow(torch.zeros(1, 2))[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_workers_that_are_forked_inside_have_it() -> None:
    flow = block(1.0)
    loader = DataLoader(Scored(flow), num_workers=2, multiprocessing_context="fork")
    with using(flow, estimator=Says(2.0)):
        assert [float(each) for each in loader] == [2.0] * 4
    assert [float(each) for each in loader] == [1.0] * 4


@pytest.mark.slow
def test_workers_that_are_spawned_have_the_own_strategies() -> None:
    flow = block(1.0)
    loader = DataLoader(Scored(flow), num_workers=2, multiprocessing_context="spawn")
    with using(flow, estimator=Says(2.0)):
        assert [float(each) for each in loader] == [1.0] * 4


def exit_code(child: int) -> int:
    """Return what a forked process says, or kill it where it hangs."""
    for _ in range(300):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


def forked(function: Callable[[], bool]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = 0 if function() else 2
        finally:
            os._exit(code)
    return exit_code(child)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("moment", ["switches", "computes"])
def test_a_process_forked_while_a_thread_computes_does_not_wait_for_it(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """The lock and the count of those inside are the parent's: nobody would give them back."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with tensor_float._HELD._lock if moment == "switches" else tensor_float.switched_off():
            inside.set()
            leave.wait(60)

    def works() -> bool:
        found = torch.backends.cudnn.allow_tf32
        with tensor_float.switched_off():
            off = not torch.backends.cudnn.allow_tf32
        return bool(found and off and torch.backends.cudnn.allow_tf32)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert inside.wait(30)
        assert forked(works) == 0
    finally:
        leave.set()
        holder.join()
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_inside_leaves_it_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def still_off() -> bool:
        return not torch.backends.cudnn.allow_tf32

    with tensor_float.switched_off():
        assert forked(still_off) == 0
        assert still_off()
    assert torch.backends.cudnn.allow_tf32
