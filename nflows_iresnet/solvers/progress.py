"""The state of a solve: the best point of each row, and which rows are done."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


@runtime_checkable
class SelectableMap(Protocol):
    """A map that can be had for some rows alone, so that rows that are done cost nothing."""

    def __call__(self, point: Tensor, /) -> Tensor:
        """Return f(point), shape (B, *)."""

    def select(self, rows: Tensor, /) -> SelectableMap:
        """Return the map for the rows with these indices."""


class Progress:
    """The best point of each row so far, and which rows are done.

    Attributes:
        value: the best point, shape (B, D).
        residual: f(value) - value, shape (B, D).
        residual_norm: its 2-norm, shape (B,).
        scale: |value| + |f(value)|, by which rounding is judged, shape (B,).
        tolerance: what the residual was asked to be at most, shape (B,).
        latest_norm: that of the residual of the latest point, shape (B,).
        is_latest: whether all rows are open or were until now, and their latest points their best.
        is_open: whether the row is neither accepted nor given up, shape (B,).
        num_open: how many rows are open.
        num_steps: evaluations that the row took part in while it was open, shape (B,).
    """

    def __init__(self, init: Tensor) -> None:
        infinite = init.new_full((len(init),), torch.inf)
        self.value, self.residual = init, torch.zeros_like(init)
        self.residual_norm = self.latest_norm = self._norm_before = infinite
        self.tolerance = self.scale = torch.zeros_like(infinite)
        self.is_open = torch.ones_like(infinite, dtype=torch.bool)
        self.num_steps = torch.zeros_like(infinite, dtype=torch.int64)
        self.num_open, self.is_latest = len(init), False

    def update(
        self, point: Tensor, residual: Tensor, norm: Tensor, scale: Tensor, tolerance: Tensor
    ) -> None:
        """Take a new point of the open rows into account; one that is not a number is no better."""
        is_better = norm < self.residual_norm
        self.latest_norm = norm
        self.is_latest = self.num_open == len(norm) and bool(is_better.all())
        if self.is_latest:
            self.value, self.residual, self.residual_norm = point, residual, norm
            self.scale, self.tolerance = scale, tolerance
        else:
            is_better &= self.is_open
            column = is_better[:, None]
            self.value = torch.where(column, point, self.value)
            self.residual = torch.where(column, residual, self.residual)
            self.residual_norm = torch.where(is_better, norm, self.residual_norm)
            self.scale = torch.where(is_better, scale, self.scale)
            self.tolerance = torch.where(is_better, tolerance, self.tolerance)
        self.num_steps = self.num_steps + self.is_open
        self._close(self.residual_norm > self.tolerance)

    def _close(self, is_left: Tensor) -> None:
        self.is_open = self.is_open & is_left
        self.num_open = int(self.is_open.sum())

    def close_stalled(self, rounding: Tensor) -> None:
        """Close the rows that have not improved since the last call, at best within rounding."""
        is_stalled = self.is_open & ~(self.residual_norm < self._norm_before)
        self._norm_before = self.residual_norm
        self.tolerance = torch.where(is_stalled, self.tolerance.maximum(rounding), self.tolerance)
        self._close(~is_stalled)

    def select(self, rows: Tensor) -> Progress:
        """Return the state of some rows."""
        selected = copy(self)
        for name, values in self._tensors():
            setattr(selected, name, values[rows])
        return selected

    def write(self, rows: Tensor, selected: Progress) -> None:
        """Take over the state of rows that were selected."""
        for name, values in selected._tensors():
            setattr(self, name, getattr(self, name).index_copy(0, rows, values))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, each) for name, each in vars(self).items() if isinstance(each, Tensor)]
