"""Clocks: how long a piece of work took, in seconds of the wall and of the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Reading:
    """The time of one piece of work.

    Args:
        seconds: by the wall clock; on a GPU between two events of its stream.
        cpu_seconds: that all threads of this process were running.
    """

    seconds: float
    cpu_seconds: float


class Clock(Protocol):
    """Runs some work and reads the time."""

    def time(self, work: Work) -> Reading:
        """Run the work once and return its time."""


@dataclass(frozen=True)
class CpuClock:
    """Wall time, and the processor time of this process.

    With one thread the second leaves out what other processes took from it, so that ratios of it
    hold on a busy machine too. With several threads it counts those that wait.
    """

    def time(self, work: Work) -> Reading:
        """Run the work once and return its time."""
        wall, processor = time.perf_counter(), time.process_time()
        work()
        return Reading(time.perf_counter() - wall, time.process_time() - processor)


@dataclass(frozen=True)
class CudaClock:
    """Time between two events on the GPU, which is idle before and done after."""

    def time(self, work: Work) -> Reading:
        """Run the work once and return its time."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        processor = time.process_time()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return Reading(begin.elapsed_time(end) / 1e3, time.process_time() - processor)


def clock_for(device: torch.device) -> Clock:
    """Return the clock of a device."""
    return CudaClock() if device.type == "cuda" else CpuClock()
