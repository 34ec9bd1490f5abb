"""Jobs side by side: in processes of this machine by joblib, or on a cluster by Dask."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from nflows_iresnet.experiments.config import UsageError, describe, describe_environment
from nflows_iresnet.experiments.folder import Key
from nflows_iresnet.interruption import ENDINGS, Ignored, Postponed
from nflows_iresnet.training import History
from nflows_iresnet.training.checkpoints import Keeper
from nflows_iresnet.training.loop import Interruption, Training
from nflows_iresnet.training.loop import run as run_training

if TYPE_CHECKING:
    from nflows_iresnet.experiments.session import LiveProgress

TakeIn = Callable[[int, Any], None]
OnStep = Callable[[float, float], None]
_STOPPING = "finishing the steps under way, then saving checkpoints"
_GRACE = 30.0
"""Seconds that a process without a parent has for its step and its checkpoint."""
_AT_WORK = threading.Lock()
"""Held while a process does a job."""
_CONNECTING = 10


def _nobody_looks(done: float, loss: float) -> None:
    """Take no notice of a step."""


@dataclass(frozen=True)
class Watch:
    """Who looks at a training, and may stop it.

    Args:
        on_step: called after each step with the fraction done and the loss.
        keeper: keeps its checkpoints.
        interruption: asks it to stop; with a keeper alone that is Ctrl-C.
    """

    on_step: OnStep = _nobody_looks
    keeper: Keeper | None = None
    interruption: Interruption | None = None

    def train(self, training: Training) -> History:
        """Train; a wish to stop is raised after the step, when it is saved."""
        interruption = self.interruption
        if interruption is None and self.keeper is not None:
            interruption = Postponed()
        return run_training(training, self.on_step, self.keeper, interruption)


NOBODY = Watch()


class Job(Protocol):
    """A training and what follows, which can be done here or by another process."""

    @property
    def key(self) -> Key:
        """What its checkpoint is named for."""

    @property
    def label(self) -> str:
        """Name it for people."""

    @property
    def config(self) -> Any:
        """Every choice, among them `threads`."""

    def do(self, watch: Watch = NOBODY) -> Any:
        """Do it, and return what was found."""

    def without_data(self) -> Job:
        """Return what another process is sent, which may run in another folder."""

    def with_data(self) -> Job:
        """Load the data of a job that was sent."""


@dataclass(frozen=True)
class Order:
    """A job for another process, which loads the data itself.

    Args:
        job: without its data.
        label: names it for people.
        keeper: keeps its checkpoints.
    """

    job: Job
    label: str
    keeper: Keeper

    @classmethod
    def of(cls, job: Job, keeper: Keeper) -> Order:
        """Leave the data out, and name files so that it can be done in any folder."""
        kept = replace(keeper, path=keeper.path.absolute())
        return cls(job.without_data(), job.label, kept)

    def do(
        self, wish: Interruption, keeper: Keeper | None, on_step: OnStep = _nobody_looks
    ) -> Any | None:
        """Do it; None if it was to stop, which leaves a checkpoint.

        Raises:
            UsageError: the data cannot be loaded here.
        """
        if wish.was_pressed:
            return None
        torch.set_num_threads(self.job.config.threads)
        warnings.filterwarnings("ignore", module=r"(nflows|normflows)\.")
        try:
            job = self.job.with_data()
        except (ValueError, OSError, ImportError) as error:
            raise UsageError(f"{self.label}: its process cannot load the data: {error}") from error
        try:
            return job.do(Watch(on_step, keeper, wish))
        except KeyboardInterrupt:
            return None


class _Wish(Interruption):
    """Asks a training to stop after its step."""

    def __enter__(self) -> _Wish:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.was_pressed:
            raise KeyboardInterrupt


# --- processes of this machine --------------------------------------------------------------------


class _Board:
    """Numbers that processes share: whether they are to stop, and how far each job is."""

    def __init__(self, path: str, size: int, *, is_new: bool = False) -> None:
        self.path = path
        self._numbers = np.memmap(path, np.float64, "w+" if is_new else "r+", shape=(1 + size,))

    @property
    def is_stopped(self) -> bool:
        return bool(self._numbers[0])

    @property
    def done(self) -> float:
        """How far the jobs under way are together, in jobs."""
        return float(self._numbers[1:].sum())

    def stop(self) -> None:
        self._numbers[0] = 1.0

    def put(self, index: int, done: float) -> None:
        self._numbers[1 + index] = done


@contextmanager
def _board_of(size: int, progress: LiveProgress) -> Iterator[_Board]:
    """Share a board for the duration of a block, and show what is on it."""
    folder, ended = tempfile.mkdtemp(prefix="nflows-iresnet-"), threading.Event()
    board = _Board(os.path.join(folder, "board"), size, is_new=True)

    def show() -> None:
        while not ended.wait(0.5):
            progress.step(board.done, math.nan)

    shows = threading.Thread(target=show, daemon=True)
    shows.start()
    try:
        yield board
    finally:
        ended.set()
        shows.join()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def processes_ended() -> Iterator[None]:
    """Keep processes between the calls of `side_by_side` in a block, and none after it."""
    from joblib.externals.loky import get_reusable_executor

    try:
        yield
    finally:
        executor = get_reusable_executor(reuse=True)
        # joblib's own has `terminate`, which leaves no folder that a tracker would warn of
        getattr(executor, "terminate", executor.shutdown)(kill_workers=True)


def side_by_side(
    orders: Sequence[Order], processes: int, progress: LiveProgress, take_in: TakeIn
) -> None:
    """Do jobs in processes, which save checkpoints when one of them fails, or after Ctrl-C.

    Args:
        orders: what is to be done.
        processes: how many at a time.
        progress: shows it.
        take_in: called with the number of each order that is finished, and what was found.

    Raises:
        ChildProcessError: a process was killed.
        KeyboardInterrupt: Ctrl-C was pressed once, and everything has ended, or twice.
    """
    from joblib import Parallel, delayed, parallel_config

    left = dict(enumerate(orders))
    failure: Exception | None = None
    with (
        _board_of(len(orders), progress) as board,
        Postponed(_STOPPING, board.stop),
        parallel_config("loky", inner_max_num_threads=orders[0].job.config.threads),
    ):
        do = delayed(_do_in_process)
        with Ignored():
            outcomes = Parallel(processes, return_as="generator_unordered", batch_size=1)(
                do(order, index, board.path, len(orders), os.getpid())
                for index, order in enumerate(orders)
            )
        with closing(outcomes), _death_described(left):
            _show(left, progress, processes)
            for index, outcome in outcomes:
                del left[index]
                board.put(index, 0.0)
                try:
                    if isinstance(outcome, Exception):
                        raise outcome
                    if outcome is not None and failure is None:
                        take_in(index, outcome)
                except Exception as error:
                    failure = failure or error
                    board.stop()
                _show(left, progress, processes)
        if failure is not None:
            raise failure


def _show(left: dict[int, Order], progress: LiveProgress, processes: int) -> None:
    count = min(processes, len(left))
    if count:
        label = next(iter(left.values())).label
        several = f"{count} side by side, the first {label}"
        progress.begin(label if count == 1 else several, lambda _: "")


@contextmanager
def _death_described(left: dict[int, Order]) -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process was killed, perhaps for want of memory, while "
            f"{next(iter(left.values())).label} was under way: give fewer --jobs"
        ) from error


def _do_in_process(order: Order, index: int, path: str, size: int, parent: int) -> tuple[int, Any]:
    """Do it; an error is returned, as joblib would kill the others if it were raised."""
    _settle_in(parent, os.path.dirname(path))
    board = _Board(path, size)
    wish = _ToldByParent(board, parent)
    try:
        with _AT_WORK:
            found = order.do(wish, replace(order.keeper), lambda done, loss: board.put(index, done))
        return index, found
    except Exception as error:
        return index, error


class _ToldByParent(_Wish):
    """The process that gave the job says so, or is gone."""

    def __init__(self, board: _Board, parent: int) -> None:
        self._board, self._parent = board, parent

    @property
    def was_pressed(self) -> bool:
        return self._board.is_stopped or os.getppid() != self._parent


@lru_cache(maxsize=1)
def _settle_in(parent: int, folder: str) -> None:
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_outlive_nobody, args=(parent, folder), daemon=True).start()


def _outlive_nobody(parent: int, folder: str) -> None:
    """End this process after the one that started it, as soon as the step is saved."""
    while os.getppid() == parent:
        time.sleep(0.5)
    _AT_WORK.acquire(timeout=_GRACE)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


# --- a cluster ------------------------------------------------------------------------------------


def connect(address: str) -> Any:
    """Return a client of the Dask scheduler at an address.

    Raises:
        ValueError: Dask is not installed, or nobody answers.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError("--dask needs Dask: pip install '.[dask]' in the clone") from error
    try:
        client = Client(address, timeout=_CONNECTING)
    except Exception as error:  # who answers may be no scheduler, and say anything
        raise ValueError(
            f"--dask {address}: no scheduler answers there ({describe(error)}): give the address "
            "that `dask scheduler` prints, such as tcp://scheduler:8786"
        ) from error
    if not client.scheduler_info()["workers"]:
        print(
            f"waiting for workers: start some with `dask worker {address} --nworkers 4 "
            "--nthreads 1`",
            file=sys.stderr,
        )
    return client


def on_cluster(
    orders: Sequence[Order], client: Any, started: str, progress: LiveProgress, take_in: TakeIn
) -> None:
    """Do jobs on the workers of a cluster; those of a worker that dies are done again.

    Workers keep checkpoints where they see the folder of the results, as on a shared disk. Those
    whose jobs are no longer wanted, or whose client is gone, stop after their step.

    Args:
        orders: what is to be done.
        client: of the scheduler.
        started: when the record was begun, by which its folder is known.
        progress: shows it.
        take_in: called with the number of each order that is finished, and what was found.

    Raises:
        UsageError: a worker cannot do its job; the message says why.
        ConnectionError: a job killed several workers, or the cluster is gone.
    """
    from distributed import as_completed

    versions = describe_environment("cpu")["versions"]
    left = {
        client.submit(
            _do_on_worker, order, started, versions, key=f"{order.label}-{uuid.uuid4()}", pure=False
        ): index
        for index, order in enumerate(orders)
    }
    try:
        progress.begin(f"{len(left)} on {client.scheduler.address}", lambda _: "")
        for future in as_completed(list(left)):
            outcome = _outcome_of(future, orders[left[future]].label)
            take_in(left.pop(future), outcome)
            progress.begin(f"{len(left)} on {client.scheduler.address}", lambda _: "")
    finally:
        client.cancel(list(left))


def _outcome_of(future: Any, label: str) -> Any:
    from distributed import KilledWorker

    try:
        return future.result()
    except (KilledWorker, CancelledError, ImportError, RuntimeError) as error:
        raise ConnectionError(f"the cluster could not do {label}: {describe(error)}") from error


def _do_on_worker(order: Order, started: str, versions: dict[str, Any]) -> Any | None:
    from distributed import get_worker

    worker = get_worker()
    here = describe_environment("cpu")["versions"]
    other = [name for name in versions if versions[name] != here.get(name)]
    if other:
        raise UsageError(
            f"{worker.address} has {other[0]} {here.get(other[0])}, and the command "
            f"{versions[other[0]]}: install the same, or the numbers cannot be compared"
        )
    if worker.state.nthreads > 1:
        raise UsageError(
            f"{worker.address} has {worker.state.nthreads} threads, and runs share the generator "
            "of a process: start workers with --nworkers N --nthreads 1"
        )
    keeper = replace(order.keeper) if _is_shared(order.keeper, started) else None
    return order.do(_ToldByScheduler(worker, worker.get_current_task()), keeper)


def _is_shared(keeper: Keeper, started: str) -> bool:
    """Whether the folder that checkpoints are for is there, and not another of its name."""
    try:
        found = json.loads((keeper.path.parents[1] / "results.json").read_bytes())
        return bool(found["started"] == started)
    except (OSError, ValueError, KeyError, TypeError):
        return False


class _ToldByScheduler(_Wish):
    """The result is no longer wanted: the job was cancelled, or its client is gone."""

    def __init__(self, worker: Any, key: str) -> None:
        self._worker, self._key = worker, key

    @property
    def was_pressed(self) -> bool:
        task = self._worker.state.tasks.get(self._key)
        return task is None or task.state != "executing"
