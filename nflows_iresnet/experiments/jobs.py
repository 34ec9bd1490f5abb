"""Where jobs are done: one after the other here, or side by side in processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from multiprocessing.synchronize import Event
from types import TracebackType
from typing import Any, Protocol, cast

import torch

from nflows_iresnet.experiments import runner
from nflows_iresnet.experiments.checkpoints import Keeper
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.evaluation import Array
from nflows_iresnet.experiments.record import Result, Trial
from nflows_iresnet.experiments.runner import Job, OnStep
from nflows_iresnet.experiments.tasks import Task
from nflows_iresnet.training import Interruption

Outcome = tuple[Result | Trial, dict[str, Array]]
_GRACE = 30.0
_STOPPING = (
    "\ninterrupted: finishing the steps under way, then saving checkpoints "
    "(Ctrl-C again stops at once)"
)


@dataclass(frozen=True)
class Order:
    """A job with all that it takes to do it.

    Args:
        job: what is to be done.
        config: every choice.
        dataset: the name or path by which the data are loaded.
        keeper: keeps its checkpoints.
    """

    job: Job
    config: RunConfig
    dataset: str
    keeper: Keeper

    def do(self, on_step: OnStep, interruption: Interruption | None = None) -> Outcome:
        """Do it."""
        job, config = self.job, self.config
        if job.is_trial:
            return runner.try_rate(job, config, on_step, self.keeper, interruption), {}
        return runner.execute(
            job.run, config, on_step, self.keeper, job.learning_rate, interruption
        )


class Workplace(Protocol):
    """Does jobs that are put to it."""

    @property
    def has_room(self) -> bool:
        """Whether another one can begin."""

    @property
    def running(self) -> list[Job]:
        """The jobs under way."""

    def begin(self, order: Order) -> None:
        """Begin a job."""

    def finished(self) -> tuple[Order, Outcome]:
        """Wait for one of them."""


@dataclass
class Here:
    """Does one job at a time, in this process.

    Args:
        on_step: called after each step with the fraction done and the loss in nats.
    """

    on_step: OnStep
    _order: Order | None = None

    @property
    def has_room(self) -> bool:
        """Whether nothing is under way."""
        return self._order is None

    @property
    def running(self) -> list[Job]:
        """The job under way."""
        return [] if self._order is None else [self._order.job]

    def begin(self, order: Order) -> None:
        """Take a job."""
        self._order = order

    def finished(self) -> tuple[Order, Outcome]:
        """Do it."""
        order, self._order = self._order, None
        if order is None:
            raise ValueError("no job was begun")
        return order, order.do(self.on_step)


@dataclass
class SideBySide:
    """Does jobs in processes, and has them save their checkpoints when it is interrupted.

    Args:
        workers: number of processes.
        threads: of torch in each.
    """

    workers: int
    threads: int
    _running: dict[Future[Outcome], Order] = field(default_factory=dict, init=False)

    def __enter__(self) -> SideBySide:
        """Start; a process is started with its first job."""
        context = multiprocessing.get_context("spawn")
        self._stop = context.Event()
        self._pool = ProcessPoolExecutor(
            self.workers, context, _settle_in, (self._stop, os.getpid(), self.threads)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let the steps under way end, and the processes; after a second Ctrl-C kill them."""
        self._stop.set()
        if kind is KeyboardInterrupt:
            print(_STOPPING, file=sys.stderr, flush=True)
        try:
            self._pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():
                process.kill()
            raise

    @property
    def has_room(self) -> bool:
        """Whether a process has nothing to do."""
        return len(self._running) < self.workers

    @property
    def running(self) -> list[Job]:
        """The jobs under way."""
        return [order.job for order in self._running.values()]

    def begin(self, order: Order) -> None:
        """Give a job to a process, which loads the data itself."""
        run = replace(order.job.run, task=cast(Task, _Absent(order.job.run.task.name)))
        order_without_data = replace(order, job=replace(order.job, run=run))
        with _ctrl_c_ignored():
            self._running[self._pool.submit(_work, order_without_data)] = order

    def finished(self) -> tuple[Order, Outcome]:
        """Wait for one of them.

        Raises:
            ChildProcessError: a process was killed.
        """
        done = wait(self._running, return_when=FIRST_COMPLETED).done.pop()
        order = self._running.pop(done)
        try:
            return order, done.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"a process was killed, perhaps for want of memory, while {order.job.label} was "
                "under way: give fewer --jobs"
            ) from error


class _Absent:
    """The name of a task whose data stay where they are."""

    def __init__(self, name: str) -> None:
        self.name = name


@contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Let processes that are started in the block leave Ctrl-C to this one, from their start on."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# --- in the processes -----------------------------------------------------------------------------


class _Told:
    """Asks a training to stop when the process that gave the job says so, or is gone."""

    def __init__(self, stop: Event, parent: int) -> None:
        self._stop, self._parent = stop, parent

    @property
    def was_pressed(self) -> bool:
        """Whether it is to stop."""
        return self._stop.is_set() or os.getppid() != self._parent

    def __enter__(self) -> _Told:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None and self.was_pressed:
            raise KeyboardInterrupt


_told: list[_Told] = []


def _settle_in(stop: Event, parent: int, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", module=r"(nflows|normflows)\.")
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    _told.append(_Told(stop, parent))


def _outlive_nobody() -> None:
    """End this process soon after the one that started it, by when a step has been saved."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        time.sleep(_GRACE)
        os._exit(1)


def _work(order: Order) -> Outcome:
    with_data = replace(order.job.run, task=_task(order.dataset, order.config))
    told = _told[0]
    if told.was_pressed:
        raise KeyboardInterrupt
    job = replace(order.job, run=with_data)
    return replace(order, job=job).do(lambda done, loss: None, told)


@lru_cache(maxsize=8)
def _task(name: str, config: RunConfig) -> Task:
    return runner.load_task(name, config)
