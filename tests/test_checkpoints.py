"""A training that is interrupted goes on as if it had not been: same curve, same weights."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nflows_iresnet.experiments.models import IMAGE_MODELS, MODELS, Architecture, ImageArchitecture
from nflows_iresnet.training import History
from nflows_iresnet.training.checkpoints import Keeper
from nflows_iresnet.training.loop import WeightAverage
from nflows_iresnet.training.processes import random_state, seed_everything, set_random_state
from nflows_iresnet.training.progress import Steps, TrainingPlan
from nflows_iresnet.training.rows import Batches
from tests.optional import named
from tests.trained import train

STEPS = 20
PLAN = TrainingPlan(1e-2, Steps(STEPS), validations=10, patience=100, average_decay=0.9)


class Noisy(nn.Module):
    """A Gaussian whose loss draws from both global generators, and which has a buffer."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def log_prob(self, inputs: Tensor, /) -> Tensor:
        self.calls += 1
        noise = torch.randn_like(inputs) * (1 + 0.1 * np.random.rand())
        return -(self.net(inputs) + noise).square().sum(dim=1)

    def after_step(self) -> None:
        pass


class StoppedError(Exception):
    pass


def interrupt() -> None:
    raise StoppedError


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run(
    path: Path | None,
    stop_after: int | None = None,
    stop: Callable[[], None] = interrupt,
    every: float = 0.0,
) -> tuple[History, Noisy]:
    """Train for 20 steps with a checkpoint after every step, unless stopped before."""
    seed_everything(0)
    model, steps = Noisy(), 0

    def count(done: float, loss: float) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_after:
            stop()

    data = torch.arange(50.0)[:, None].expand(50, 3).contiguous() / 50
    stream = Batches(data, 8, 0, lambda rows, g: rows + torch.rand(rows.shape, generator=g))
    keeper = None if path is None else Keeper(path, {"of": "test"}, every=every)

    @torch.no_grad()
    def validate() -> float:
        return float((model.net(data) - 1).square().mean())

    return train(model, stream, validate, PLAN, count, keeper), model


def values_of(log: History) -> list[tuple[int, float, float]]:
    return [(point.step, point.train, point.validation) for point in log.curve]


@pytest.mark.parametrize("stop_after", [1, 10, 11, STEPS])
def test_a_resumed_training_has_the_same_curve_and_weights(stop_after: int, tmp_path: Path) -> None:
    straight, first = run(None)
    with pytest.raises(StoppedError):
        run(tmp_path / "run.pt", stop_after)
    resumed, second = run(tmp_path / "run.pt")
    assert values_of(resumed) == values_of(straight)
    assert (resumed.steps, resumed.best_step) == (STEPS, straight.best_step)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("part", ["optimizer", "average", "stream", "progress", "random"])
def test_every_part_of_a_checkpoint_matters(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving one part as it was at the start is seen in the curve."""
    straight, _ = run(None)
    with pytest.raises(StoppedError):
        run(tmp_path / "run.pt", 11)
    start: dict[str, Any] = {}
    load = Keeper.load

    def with_a_fresh_part(self: Keeper) -> dict[str, Any] | None:
        state = load(self)
        return None if state is None else {**state, part: start[part]}

    with pytest.raises(StoppedError):
        run(tmp_path / "start.pt", 2)
    start = Keeper(tmp_path / "start.pt", {"of": "test"}).load() or {}
    monkeypatch.setattr(Keeper, "load", with_a_fresh_part)
    resumed, _ = run(tmp_path / "run.pt")
    assert values_of(resumed) != values_of(straight)


SCRIPT = """
import sys
from pathlib import Path
from tests.test_checkpoints import kill, run
run(Path(sys.argv[1]), stop_after=11, stop=kill)
"""


def test_a_killed_process_is_resumed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    state = Keeper(path, {"of": "test"}).load()
    assert state is not None
    assert len(state["progress"]["seconds"]) == 10
    straight, first = run(None)
    resumed, second = run(path)
    assert values_of(resumed) == values_of(straight)
    assert torch.equal(first.net.weight, second.net.weight)


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    """Its end is saved however long ago the last checkpoint was."""
    log, model = run(tmp_path / "run.pt", every=3600.0)
    again, same = run(tmp_path / "run.pt", stop_after=1)
    assert again == log
    assert torch.equal(model.net.weight, same.net.weight)


MODELS_AND_SIZES = {
    **{name: (spec, Architecture(2, 8, 2, 1)) for name, spec in MODELS.items()},
    **{
        f"images-{name}": (spec, ImageArchitecture(16, 4, 1, 1, (1, 4, 4), 17, num_scales=1))
        for name, spec in IMAGE_MODELS.items()
    },
}


@pytest.mark.parametrize("name", named(MODELS_AND_SIZES))
def test_every_model_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    """Also those that keep state outside their parameters, or draw from numpy."""
    spec, size = MODELS_AND_SIZES[name]
    shape = size.shape if isinstance(size, ImageArchitecture) else (2,)
    rows = 16 * torch.rand(40, *shape, generator=torch.Generator().manual_seed(0))
    logs, ends = [], []
    for path, stop_after in (("straight", None), ("cut", 3), ("cut", None)):
        seed_everything(0)
        model, falling, steps = spec.build(size), iter(range(9, 0, -1)), iter(range(1, 9))

        def count(done: float, loss: float) -> None:
            if next(steps) == stop_after:  # noqa: B023
                raise StoppedError

        plan = TrainingPlan(1e-2, Steps(6), validations=6, average_decay=0.9)
        keeper = Keeper(tmp_path / path, every=0.0)
        stream = Batches(rows, 8, 0)
        with contextlib.suppress(StoppedError):
            logs.append(train(model, stream, lambda: float(next(falling)), plan, count, keeper))  # noqa: B023
            ends.append(model.state_dict())
    assert [point.train for point in logs[0].curve] == [point.train for point in logs[1].curve]
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


# --- the file -------------------------------------------------------------------------------------


def test_checkpoints_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper(tmp_path / "run.pt", {"of": "test"}, every=3600)
    assert keeper.load() is None
    assert not keeper.due
    assert Keeper(tmp_path / "run.pt").every == 60, "a minute, as fit says"
    keeper.save({"step": 1})

    def disk_full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(OSError, match="no space"):
        keeper.save({"step": 2})
    assert keeper.load() == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    keeper.discard()
    keeper.discard()
    assert keeper.load() is None


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    Keeper(path, {"seed": 0}).save({})
    with pytest.raises(ValueError, match="another training: seed was 0 there and is 1"):
        Keeper(path, {"seed": 1}).load()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        Keeper(path, {"seed": 0}).load()


def test_random_states_are_restored() -> None:
    seed_everything(3)
    np.random.randn()
    state = random_state(torch.device("cpu"))
    draws = [(torch.rand(()).item(), np.random.randn(), np.random.rand())]
    torch.rand(7), np.random.rand(700)
    set_random_state(state, torch.device("cpu"))
    draws.append((torch.rand(()).item(), np.random.randn(), np.random.rand()))
    assert draws[0] == draws[1]


def test_a_checkpoint_of_a_gpu_is_taken_up_without_one() -> None:
    cpu = torch.device("cpu")
    state = {**random_state(cpu), "cuda": torch.zeros(16, dtype=torch.uint8)}
    expected = torch.rand(3)
    set_random_state(state, cpu)
    assert torch.equal(torch.rand(3), expected)


# --- the average of the weights -------------------------------------------------------------------


def test_weight_average_is_the_documented_one() -> None:
    parameter = nn.Parameter(torch.tensor([1.0]))
    parameters: Callable[[], Iterator[nn.Parameter]] = lambda: iter([parameter])  # noqa: E731
    average, expected = WeightAverage(parameters(), decay=0.7), 0.0
    for step in range(40):
        with torch.no_grad():
            parameter.fill_(float(step))
        average.update()
        decay = min(0.7, step / (step + 10))
        expected = decay * expected + (1 - decay) * step
    with average.applied():
        assert parameter.item() == pytest.approx(expected)
    assert parameter.item() == 39.0
    with pytest.raises(ValueError, match="decay"):
        WeightAverage(parameters(), decay=1.0)


class Remembering(Noisy):
    """Keeps the weights after each step."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[Tensor] = []

    def after_step(self) -> None:
        self.trained.append(self.net.weight.detach().clone())


def test_what_is_validated_and_kept_is_the_average() -> None:
    seed_everything(0)
    model, seen = Remembering(), []
    validations = iter([3.0, 1.0, 2.0, 4.0])

    def validate() -> float:
        seen.append(model.net.weight.detach().clone())
        return next(validations)

    plan = TrainingPlan(1e-1, Steps(4), validations=4, average_decay=0.9)
    log = train(model, Batches(torch.randn(20, 3), 8, 0), validate, plan)
    assert log.best_step == 2
    assert torch.equal(model.net.weight, seen[1])
    first, second = model.trained[:2]
    torch.testing.assert_close(seen[1], first / 11 + second * 10 / 11)
