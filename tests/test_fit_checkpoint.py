"""A training by `fit` that was interrupted goes on where it was, bit for bit."""

from __future__ import annotations

import os
import signal
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from nflows_iresnet import ResidualFlow, logdet
from nflows_iresnet.training import History, fit
from nflows_iresnet.training.checkpoints import Keeper

STEPS = 9
ROWS = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
DATASET = TensorDataset(ROWS)


def shuffled() -> DataLoader[Any]:
    return DataLoader(DATASET, 16, shuffle=True)


def shuffled_by_its_own_generator() -> DataLoader[Any]:
    return DataLoader(DATASET, 16, shuffle=True, generator=torch.Generator().manual_seed(7))


def sampled(generator: torch.Generator) -> RandomSampler:
    return RandomSampler(DATASET, generator=generator)


def shuffled_by_its_sampler() -> DataLoader[Any]:
    return DataLoader(DATASET, 16, sampler=sampled(torch.Generator().manual_seed(7)))


def shuffled_by_the_sampler_of_batches() -> DataLoader[Any]:
    sampler = sampled(torch.Generator().manual_seed(7))
    return DataLoader(DATASET, batch_sampler=BatchSampler(sampler, 16, drop_last=False))


SOURCES: dict[str, Callable[[], Any]] = {
    "rows": lambda: ROWS,
    "loader": shuffled,
    "loader with a generator": shuffled_by_its_own_generator,
    "sampler with a generator": shuffled_by_its_sampler,
    "sampler of batches": shuffled_by_the_sampler_of_batches,
    "list": lambda: list(ROWS.split(16)),
}


class StoppedError(Exception):
    pass


def crash() -> None:
    raise StoppedError


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def trained(
    path: Path | None,
    train: Any = ROWS,
    stop_after: int | None = None,
    stop: Callable[[], None] = press,
    validation: Any = ROWS[:20],
    **options: Any,
) -> tuple[History, dict[str, Tensor]]:
    torch.manual_seed(0)
    flow = ResidualFlow(2, 8, 2, estimator=logdet.RussianRoulette())
    steps = 0

    def count(done: float, loss: float) -> None:
        nonlocal steps
        steps += 1
        if steps == stop_after:
            stop()

    given: dict[str, Any] = {"max_steps": STEPS, "validations": 3, "batch_size": 16, **options}
    history = fit(flow, train, validation, on_step=count, checkpoint=path, **given)
    return history, flow.state_dict()


def assert_same(
    found: tuple[History, dict[str, Tensor]], expected: tuple[History, dict[str, Tensor]]
) -> None:
    values, wanted = (
        [(point.step, repr(point.train), point.validation) for point in history.curve]
        for history, _ in (found, expected)
    )
    assert values == wanted
    for name, value in found[1].items():
        assert torch.equal(value, expected[1][name]), name


@pytest.mark.parametrize("stop_after", [1, 5])
@pytest.mark.parametrize("source", SOURCES)
def test_an_interrupted_training_goes_on(source: str, stop_after: int, tmp_path: Path) -> None:
    path, straight = tmp_path / "fit.pt", trained(None, SOURCES[source]())
    stopped, _ = trained(path, SOURCES[source](), stop_after)
    assert (stopped.stopped, stopped.steps) == ("interrupted", stop_after)
    found = trained(path, SOURCES[source]())
    assert (found[0].stopped, found[0].steps) == ("length", STEPS)
    assert_same(found, straight)


def test_a_training_that_crashed_goes_on_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Keeper, "due", True)
    path = tmp_path / "fit.pt"
    with pytest.raises(StoppedError):
        trained(path, stop_after=5, stop=crash)
    assert len(torch.load(path, weights_only=True)["state"]["progress"]["seconds"]) == 4
    assert_same(trained(path), trained(None))


def test_a_training_that_an_earlier_version_began_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    trained(path, SOURCES["list"](), stop_after=5)
    kept = torch.load(path, weights_only=True)
    kept["settings"] = {
        "average_decay": "0.999",
        "clip_norm": "10.0",
        "learning_rate": "0.003",
        "length": "FirstOf(lengths=(Steps(count=9),))",
        "patience": "10",
        "tf32": "False",
        "validations": "3",
        "warmup": "0.02",
        "batch_size": "16",
        "seed": "0",
        "training rows": "'list'",
        "optimizer": "'Adam'",
        "flow": "'ResidualFlow 13db2969'",
        "processes": "1",
    }
    names = ("seconds", "elapsed", "losses", "curve", "best_state")
    progress = {name: kept["state"]["progress"][name] for name in names}
    kept["state"]["progress"] = {**progress, "best": 1, "validated": 1}
    numpy = kept["state"]["random"]["numpy"]["state"]
    numpy["key"] = torch.tensor(numpy["key"])
    torch.save(kept, path)
    assert_same(trained(path, SOURCES["list"]()), trained(None, SOURCES["list"]()))


def test_a_training_goes_on_with_weights_that_lie_otherwise_in_memory(tmp_path: Path) -> None:
    """One operation for all of Adam, with which it began, would ignore their strides."""

    def moved(path: Path | None, flow: ResidualFlow, **options: Any) -> History:
        given: dict[str, Any] = {"max_steps": STEPS, "validations": 3, "batch_size": 16, **options}
        return fit(flow, ROWS, ROWS[:20], checkpoint=path, **given)

    def strided() -> ResidualFlow:
        flow = fresh()
        for each in flow.parameters():
            if each.dim() == 2:
                each.data = each.data.t().contiguous().t()
        return flow

    def fresh() -> ResidualFlow:
        torch.manual_seed(0)
        return ResidualFlow(2, 8, 2).double()

    path = tmp_path / "fit.pt"
    moved(path, fresh(), on_step=lambda done, loss: press() if done > 0.5 else None)
    there = moved(path, strided())
    whole = moved(None, fresh())
    for found, expected in zip(there.curve, whole.curve, strict=True):
        assert found.validation == pytest.approx(expected.validation, rel=1e-9)


def test_the_options_of_an_optimizer_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"

    def adam(**options: Any) -> None:
        flow = ResidualFlow(2, 8, 2)
        optimizer = torch.optim.Adam(flow.parameters(), **options)
        fit(flow, ROWS, ROWS[:20], optimizer=optimizer, checkpoint=path, max_steps=STEPS)
        assert optimizer.param_groups[0]["foreach"] == options.get("foreach")

    adam()
    adam(foreach=True)
    with pytest.raises(ValueError, match=r"training: options of the optimizer was .*: delete it"):
        adam(weight_decay=0.1)


class Counting(torch.optim.SGD):
    """Keeps a number in its group that each step depends on, as Prodigy and others do."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["count"] = 0

    def step(self, closure: Any = None) -> Any:
        group = self.param_groups[0]
        group["count"] += 1
        for each in group["params"]:
            each.grad.mul_(1 / group["count"])
        return super().step(closure)


def test_what_an_optimizer_keeps_in_its_groups_goes_on(tmp_path: Path) -> None:
    def counted(path: Path | None, press_after: float) -> tuple[int, float]:
        torch.manual_seed(0)
        flow = ResidualFlow(2, 8, 2)
        optimizer = Counting(flow.parameters())

        def look(done: float, loss: float) -> None:
            if done > press_after:
                press()

        given: dict[str, Any] = {"max_steps": STEPS, "validations": 3, "on_step": look}
        history = fit(flow, ROWS, ROWS[:20], optimizer=optimizer, checkpoint=path, **given)
        return optimizer.param_groups[0]["count"], history.curve[-1].validation

    straight = counted(None, 2.0)
    counted(tmp_path / "fit.pt", 0.5)
    assert counted(tmp_path / "fit.pt", 2.0) == straight
    assert straight[0] == STEPS


def test_a_finished_training_is_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    finished = trained(path)
    again = trained(path, stop_after=1, stop=crash)
    assert again[0].to_json() == finished[0].to_json()
    assert_same(again, finished)


def test_a_checkpoint_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fit.pt"
    trained(path, stop_after=2)
    before = path.read_bytes()

    def disk_full(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", disk_full)
    with pytest.raises(OSError, match=r"cannot write .*fit.pt.: no space left"):
        trained(path, stop_after=2)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["fit.pt"]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"batch_size": 8}, "batch_size"),
        ({"max_steps": 99}, "length"),
        ({"seed": 1}, "seed"),
        ({"average_decay": None}, "average_decay"),
        ({"train": ROWS + 1}, "training rows"),
        ({"train": list(ROWS.split(16))}, "training rows"),
        ({"validation": ROWS[:20] + 1}, "validation rows"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    options: Any, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "fit.pt"
    trained(path, stop_after=1)
    with pytest.raises(ValueError, match=f"another training: {name} was .*: delete it"):
        trained(path, **options)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    trained(path, stop_after=1)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        values = max(map(archive.read, archive.namelist()), key=len)
    middle = content.index(values) + len(values) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    for damaged in (content[:1000], b"", b"weights", flipped):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged, of another version, or none: delete it"):
            trained(path)


def test_a_checkpoint_of_another_flow_is_named_and_leaves_this_one_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    trained(path, stop_after=1)
    flow = ResidualFlow(2, 8, 2, coeff=0.9)
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    kept = torch.load(path, weights_only=True)
    options: dict[str, Any] = {"max_steps": STEPS, "validations": 3, "batch_size": 16}
    with pytest.raises(ValueError, match=r"is of another flow \(.*coeff.*\): delete it"):
        fit(flow, ROWS, ROWS[:20], checkpoint=path, **options)
    kept["state"]["stream"]["shuffle"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(kept, path)
    flow = ResidualFlow(2, 8, 2, estimator=logdet.RussianRoulette())
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    with pytest.raises(ValueError, match="is damaged"):
        fit(flow, ROWS, ROWS[:20], checkpoint=path, initialize=False, **options)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_options_of_an_optimizer_may_be_numbers_of_numpy(tmp_path: Path) -> None:
    def once() -> float:
        torch.manual_seed(0)
        flow = ResidualFlow(2, 8, 2)
        decay, betas = np.float64(1e-4), (np.float64(0.9), 0.99)
        optimizer = torch.optim.AdamW(flow.parameters(), weight_decay=decay, betas=betas)
        path = tmp_path / "fit.pt"
        return fit(flow, ROWS, ROWS, optimizer=optimizer, max_steps=4, checkpoint=path).seconds

    assert once() == once(), "the second call finds the training finished"


def test_the_state_of_an_optimizer_may_hold_numbers_of_numpy(tmp_path: Path) -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step(closure)
            for group in self.param_groups:
                for each in group["params"]:
                    self.state[each]["count"] = np.float64(1)

    path, flow = tmp_path / "fit.pt", ResidualFlow(2, 8, 2)
    for _ in range(2):
        optimizer = Counting(flow.parameters(), lr=1e-3)
        fit(flow, ROWS, ROWS, optimizer=optimizer, max_steps=4, checkpoint=path)


def test_what_no_checkpoint_can_hold_is_named_before_the_training(tmp_path: Path) -> None:
    class WithObjects(ResidualFlow):
        def get_extra_state(self) -> Any:
            return {"path": tmp_path}

        def set_extra_state(self, state: Any) -> None:
            pass

    path, steps = tmp_path / "fit.pt", list[int]()
    flow, note = WithObjects(2, 8, 2), lambda: steps.append(1)
    with pytest.raises(ValueError, match=r"could not be read again: .* holds a pathlib.*without a"):
        fit(flow, ROWS, ROWS, max_steps=4, checkpoint=path, after_step=note)
    assert not steps
    assert not path.exists()


def test_a_checkpoint_goes_to_where_a_link_leads(tmp_path: Path) -> None:
    path, scratch = tmp_path / "fit.pt", tmp_path / "scratch"
    scratch.mkdir()
    path.symlink_to(scratch / "fit.pt")
    trained(path, stop_after=1)
    assert path.is_symlink()
    assert [each.name for each in scratch.iterdir()] == ["fit.pt"]
    assert trained(path)[0].steps == STEPS


def test_a_checkpoint_holds_nothing_of_the_device(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    trained(path, stop_after=1)
    assert torch.load(path, weights_only=True)["state"]["stream"]["noise"] is None


def test_what_one_saved_oneself_is_not_to_be_deleted(tmp_path: Path) -> None:
    path, flow = tmp_path / "flow.pt", ResidualFlow(2, 8, 2)
    for saved in (flow.state_dict(), {"state": flow.state_dict()}, torch.zeros(3)):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=r"is no checkpoint .* give another path") as caught:
            trained(path)
        assert "rm" not in str(caught.value)


def test_a_place_where_nothing_can_be_written_is_named_before_the_training(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "fit.pt"):
        with pytest.raises(ValueError, match="must be a file in a folder that exists"):
            trained(path, stop_after=1, stop=crash)
