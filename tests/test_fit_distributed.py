"""`fit` in two processes: as one process on the joined batches, and the same in both."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import start_processes
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from nflows_iresnet import ResidualFlow, logdet
from nflows_iresnet.training import History, fit

pytestmark = pytest.mark.slow

ROWS = torch.randn(101, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3 + 1
VALIDATION = ROWS[:20] + 0.1


def flow_of(seed: int = 0, **options: Any) -> ResidualFlow:
    torch.manual_seed(seed)
    return ResidualFlow(3, 8, 2, **options).double()


def trained(flow: nn.Module, train: Any = ROWS, **options: Any) -> dict[str, Any]:
    """Return the history, the weights, the last gradients and what the test noted."""
    given: dict[str, Any] = {"max_steps": 12, "validations": 4, "batch_size": 17, **options}
    history = fit(flow, train, given.pop("validation", VALIDATION), **given)
    named = flow.named_parameters()
    gradients = {name: each.grad for name, each in named if each.grad is not None}
    return {"history": history.to_json(), "state": flow.state_dict(), "gradients": gradients}


def one_step(flow: nn.Module, **options: Any) -> dict[str, Any]:
    sgd = torch.optim.SGD(flow.parameters(), lr=0.1)
    return trained(flow, optimizer=sgd, max_steps=1, max_grad_norm=None, **options)


def raised_by(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        work()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


class Line(nn.Module):
    """A "density" of one slope, with a batch norm, and a parameter that it may not use."""

    def __init__(self, *, has_more: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        self.norm = nn.BatchNorm1d(3, affine=False).double()
        if has_more:
            self.unused = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def log_prob(self, inputs: Tensor) -> Tensor:
        return -(self.norm(inputs) - self.weight).square().sum(dim=1)


def gradients(rank: int, folder: str) -> dict[str, Any]:
    return one_step(flow_of(), initialize=False)


def whole(rank: int, folder: str) -> dict[str, Any]:
    return trained(flow_of())


def from_other_weights(rank: int, folder: str) -> dict[str, Any]:
    return trained(flow_of(seed=rank))


def roulette(rank: int, folder: str) -> dict[str, Any]:
    drawn: list[Tensor] = []
    flow = flow_of(estimator=logdet.RussianRoulette())
    found = trained(flow, after_step=lambda: drawn.append(torch.rand(())))
    return {**found, "drawn": torch.stack(drawn)}


def random_gradients(rank: int, folder: str) -> dict[str, Any]:
    """Beside the gradients of both: those of the rows and the random numbers of this process."""
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(flow: Any, rows: Tensor) -> Tensor:
        seen.append((torch.get_rng_state(), rows))
        value: Tensor = -flow.log_prob(rows).mean()
        return value

    flow, alone = (flow_of(estimator=logdet.RussianRoulette()) for _ in range(2))
    for each in (flow, alone):
        each.initialize(ROWS)
    found = one_step(flow, loss=loss, validation=lambda flow: 0.0)
    state, rows = seen[0]
    alone.train()
    with torch.random.fork_rng():
        torch.set_rng_state(state)
        (-alone.log_prob(rows).mean()).backward()
    own = {name: each.grad for name, each in alone.named_parameters() if each.grad is not None}
    return {**found, "own": own}


def buffers(rank: int, folder: str) -> dict[str, Any]:
    return trained(Line())


def loaders_of_uneven_length(rank: int, folder: str) -> dict[str, Any]:
    own = ROWS[:80] if rank == 0 else ROWS[80:]
    return trained(flow_of(), DataLoader(TensorDataset(own), 7, shuffle=True))


def sampler(rank: int, folder: str) -> dict[str, Any]:
    dataset = TensorDataset(torch.arange(20.0, dtype=torch.float64)[:, None].expand(20, 3))
    loader = DataLoader(dataset, 5, sampler=DistributedSampler(dataset))
    seen: list[Tensor] = []

    def loss(flow: Any, rows: Tensor) -> Tensor:
        seen.append(rows[:, 0])
        value: Tensor = -flow.log_prob(rows).mean()
        return value

    fit(Line(), loader, lambda flow: 0.0, loss=loss, max_steps=4, validations=1)
    return {"seen": torch.stack(seen)}


def uneven_rows(rank: int, folder: str) -> dict[str, Any]:
    return raised_by(lambda: trained(flow_of(), ROWS[: 100 + rank]))


def other_rows(rank: int, folder: str) -> dict[str, Any]:
    return raised_by(lambda: trained(flow_of(), ROWS[rank : 100 + rank]))


def rows_that_are_not_finite_in_one(rank: int, folder: str) -> dict[str, Any]:
    rows = ROWS.clone()
    rows[7] = float("nan") if rank == 1 else 0.0
    return raised_by(lambda: trained(flow_of(), rows))


def rows_and_a_loader(rank: int, folder: str) -> dict[str, Any]:
    loader = DataLoader(TensorDataset(ROWS), 7)
    return raised_by(lambda: trained(flow_of(), loader if rank else ROWS))


def too_few_rows(rank: int, folder: str) -> dict[str, Any]:
    return raised_by(lambda: trained(Line(), ROWS[:1]))


def seconds(rank: int, folder: str) -> dict[str, Any]:
    return trained(flow_of(), max_steps=None, max_seconds=0.3)


def objects_gathered(rank: int, folder: str) -> dict[str, Any]:
    """Return how many Python objects processes have sent to all, in a short training and a long."""
    counts: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        gather, sent = distributed.all_gather_object, list[int]()

        def counted(*given: Any) -> None:
            sent.append(1)
            gather(*given)

        patch.setattr(distributed, "all_gather_object", counted)
        for steps in (4, 12):
            sent.clear()
            trained(Line(), max_steps=steps)
            counts.append(len(sent))
    return {"counts": counts}


def patience(rank: int, folder: str) -> dict[str, Any]:
    values = iter([9.0, 1.0, *[2.0] * 40])
    calls: list[int] = []

    def validate(flow: Any) -> float:
        calls.append(1)
        return next(values)

    found = trained(Line(), validation=validate, max_steps=40, validations=40, patience=3)
    return {**found, "calls": len(calls)}


def loss_that_breaks_in_one_process(rank: int, folder: str) -> dict[str, Any]:
    steps: list[int] = []

    def loss(flow: Any, rows: Tensor) -> Tensor:
        steps.append(1)
        value: Tensor = -flow.log_prob(rows).mean()
        return value * (float("nan") if rank == 1 and len(steps) == 3 else 1.0)

    return raised_by(lambda: trained(Line(), loss=loss, validation=lambda flow: 0.0))


def validation_that_fails(rank: int, folder: str) -> dict[str, Any]:
    return raised_by(lambda: trained(Line(), validation=lambda flow: 1 // 0))


def unused_parameter(rank: int, folder: str) -> dict[str, Any]:
    return raised_by(lambda: trained(Line(has_more=True)))


def straight(rank: int, folder: str) -> dict[str, Any]:
    return trained(flow_of(estimator=logdet.RussianRoulette()))


def resumed(rank: int, folder: str) -> dict[str, Any]:
    """One process is told to stop in the fourth step; then both go on."""

    def press(done: float, loss: float) -> None:
        if rank == 1 and abs(done - 4 / 12) < 1e-9:
            os.kill(os.getpid(), signal.SIGINT)

    def again(**options: Any) -> dict[str, Any]:
        flow = flow_of(estimator=logdet.RussianRoulette())
        return trained(flow, checkpoint=f"{folder}/checkpoint", **options)

    stopped = again(on_step=press)["history"]
    return {**again(), "stopped": stopped}


SCENARIOS = (
    gradients,
    whole,
    from_other_weights,
    roulette,
    random_gradients,
    buffers,
    loaders_of_uneven_length,
    sampler,
    uneven_rows,
    other_rows,
    rows_that_are_not_finite_in_one,
    rows_and_a_loader,
    too_few_rows,
    seconds,
    objects_gathered,
    patience,
    loss_that_breaks_in_one_process,
    validation_that_fails,
    unused_parameter,
    straight,
    resumed,
)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {scenario.__name__: scenario(rank, folder) for scenario in SCENARIOS}
    distributed.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """Everything that two processes found, which they are started once for."""
    folder = tmp_path_factory.mktemp("processes")
    start_processes(worker, (str(folder),), nprocs=2, start_method="spawn")
    found = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    return lambda scenario: [each[scenario] for each in found]


Both = Callable[[str], list[dict[str, Any]]]


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_are_those_of_one_process_on_the_joined_batch(both: Both) -> None:
    expected = one_step(flow_of(), batch_size=16, initialize=False)  # 17 are rounded down
    assert len(expected["gradients"]) == len(list(flow_of().parameters()))
    for found in both("gradients"):
        assert_near(found["gradients"], expected["gradients"])


def test_gradients_of_a_random_loss_are_the_mean_of_those_of_each_process(both: Both) -> None:
    first, second = both("random_gradients")
    expected = {name: (each + second["own"][name]) / 2 for name, each in first["own"].items()}
    assert max(float((first["own"][name] - expected[name]).abs().max()) for name in expected) > 1e-3
    for found in (first, second):
        assert_near(found["gradients"], expected)


def test_a_training_is_that_of_one_process(both: Both) -> None:
    expected = trained(flow_of(), batch_size=16)
    history = History.from_json(expected["history"])
    for found in both("whole"):
        assert_near(found["state"], expected["state"])
        curve = History.from_json(found["history"]).curve
        for name in ("step", "train", "validation"):
            values = [getattr(point, name) for point in history.curve]
            mine = [getattr(point, name) for point in curve]
            assert mine == pytest.approx(values, rel=1e-9, nan_ok=True), name


SAME = ["whole", "from_other_weights", "roulette", "buffers", "loaders_of_uneven_length"]
MORE = ["seconds", "patience", "resumed"]


@pytest.mark.parametrize("scenario", [*SAME, *MORE])
def test_history_and_state_are_the_same_in_both(both: Both, scenario: str) -> None:
    first, second = both(scenario)
    assert first["history"] == second["history"]
    for name, value in first["state"].items():
        assert torch.equal(value, second["state"][name]), name


def test_all_start_from_the_flow_of_the_first_process(both: Both) -> None:
    assert_near(both("from_other_weights")[1]["state"], both("whole")[0]["state"])


def test_each_process_draws_random_numbers_of_its_own(both: Both) -> None:
    first, second = both("roulette")
    assert not (first["drawn"] == second["drawn"]).any()


def test_a_distributed_sampler_shows_each_row_once_an_epoch_in_another_order(both: Both) -> None:
    seen = torch.stack([each["seen"].flatten() for each in both("sampler")])
    for epoch in (seen[:, :10], seen[:, 10:]):
        assert sorted(epoch.flatten().tolist()) == list(range(20))
    assert not torch.equal(seen[:, :10], seen[:, 10:])


def test_a_step_sends_no_python_object_which_takes_several_messages(both: Both) -> None:
    for found in both("objects_gathered"):
        assert found["counts"][0] == found["counts"][1] > 0


def test_one_validation_ends_the_training_of_all(both: Both) -> None:
    first, second = both("patience")
    history = History.from_json(first["history"])
    assert (history.stopped, history.steps, history.best_step) == ("patience", 4, 1)
    assert (first["calls"], second["calls"]) == (5, 0)


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        ("uneven_rows", "ValueError: processes have different training rows ([(100, 3)] with sums"),
        ("other_rows", "ValueError: processes have different training rows ([(100, 3)] with sums"),
        ("rows_that_are_not_finite_in_one", "1 of 101 training rows are not finite, first row 7"),
        ("rows_and_a_loader", "processes have different training rows ([(101, 3)] with sums"),
        ("too_few_rows", "ValueError: 2 processes cannot share a batch of 1 rows"),
        ("loss_that_breaks_in_one_process", "TrainingDivergedError: the training loss was nan at"),
        ("validation_that_fails", "ZeroDivisionError: integer division"),
        ("unused_parameter", "ValueError: the loss does not use unused, whose gradients"),
    ],
)
def test_what_fails_fails_in_both(both: Both, scenario: str, message: str) -> None:
    for found in both(scenario):
        assert message in str(found["error"])


def test_an_interruption_of_one_ends_both_and_both_go_on_bit_for_bit(both: Both) -> None:
    for found, whole in zip(both("resumed"), both("straight"), strict=True):
        stopped = History.from_json(found["stopped"])
        assert (stopped.stopped, stopped.steps) == ("interrupted", 5)
        curves = [History.from_json(each["history"]).curve for each in (found, whole)]
        values, expected = ([(p.step, p.validation) for p in curve] for curve in curves)
        assert values == expected
        for name, value in found["state"].items():
            assert torch.equal(value, whole["state"][name]), name
