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
        latest_norm: that of the residual of the latest point, infinite for an escape, shape (B,).
        is_latest: whether all rows were open, and the latest point of each is its best.
        tolerance: what the residual was to be at most when the row was closed, shape (B,).
        is_open: whether the row is neither accepted nor given up, shape (B,).
        num_open: how many rows are open.
        num_steps: evaluations until the row was closed, shape (B,).
    """

    def __init__(self, init: Tensor) -> None:
        infinite = init.new_full((len(init),), torch.inf)
        self.value = self.residual = init
        self.residual_norm = self.latest_norm = self._norm_before = infinite
        self.tolerance = torch.zeros_like(infinite)
        self.is_open = torch.ones_like(infinite, dtype=torch.bool)
        self.num_steps = torch.zeros_like(infinite, dtype=torch.int64)
        self._is_best = ~self.is_open
        self.num_open, self.is_latest, self._steps = len(init), False, 0

    @property
    def scale(self) -> Tensor:
        """|value| + |f(value)|, by which rounding is judged, shape (B,)."""
        return row_norm(self.value) + row_norm(self.value + self.residual)

    def update(self, point: Tensor, residual: Tensor, norm: Tensor, is_near: Tensor) -> None:
        """Take a new point of the open rows into account; one that is not a number is no better.

        Args:
            point: the latest point, shape (B, D).
            residual: f(point) - point, shape (B, D).
            norm: its 2-norm, shape (B,).
            is_near: whether the point is no escape, shape (B,).
        """
        self._steps += 1
        is_better = (norm < self.residual_norm) & is_near
        self.is_latest = self.num_open == norm.shape[0] and bool(is_better.all())
        if self.is_latest:
            self.latest_norm, self._is_best = norm, is_better
            self.value, self.residual, self.residual_norm = point, residual, norm
            return
        self.latest_norm = torch.where(is_near, norm, torch.inf)
        self._is_best = is_better & self.is_open
        column = self._is_best[:, None]
        self.value = torch.where(column, point, self.value)
        self.residual = torch.where(column, residual, self.residual)
        self.residual_norm = torch.where(self._is_best, norm, self.residual_norm)

    def accept(self, tolerance: Tensor) -> None:
        """Close the open rows whose latest point is their best and within a tolerance."""
        is_accepted = self.is_open & self._is_best & (self.latest_norm <= tolerance)
        self._close(is_accepted, tolerance)

    def close_stalled(self, tolerance: Tensor) -> None:
        """Close the open rows that have not improved since the last call, at a tolerance."""
        is_stalled = self.is_open & ~(self.residual_norm < self._norm_before)
        self._norm_before = self.residual_norm
        self._close(is_stalled, tolerance)

    def close(self, tolerance: Tensor) -> None:
        """Close all rows that are open, at a tolerance."""
        self._close(self.is_open, tolerance)

    def _close(self, rows: Tensor, tolerance: Tensor) -> None:
        self.tolerance = torch.where(rows, tolerance, self.tolerance)
        self.num_steps = torch.where(rows, self._steps, self.num_steps)
        self.is_open = self.is_open & ~rows
        self.num_open = int(self.is_open.sum())

    def select(self, rows: Tensor) -> Progress:
        """Return the state of some rows."""
        selected = copy(self)
        for name, values in self._tensors():
            setattr(selected, name, values[rows])
        selected.num_open = int(selected.is_open.sum())
        return selected

    def write(self, rows: Tensor, selected: Progress) -> None:
        """Take over the state of rows that were selected."""
        for name, values in selected._tensors():
            setattr(self, name, getattr(self, name).index_copy(0, rows, values))

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [(name, each) for name, each in vars(self).items() if isinstance(each, Tensor)]


def row_norm(rows: Tensor) -> Tensor:
    """Return the 2-norm of each row of (B, D), shape (B,)."""
    return torch.linalg.vector_norm(rows, dim=1)
