"""Paths of points on a line through the layers of a network, and where they cross."""

from __future__ import annotations

import numpy as np

from nflows_iresnet.experiments.evaluation import Array


def count_crossings(paths: Array) -> int:
    """Count how often two paths change their order.

    Paths are straight between layers, so that two of them cross between layers exactly where their
    order changes. Paths that meet and leave each other on the other side cross once, however many
    layers they are together; paths that only touch do not cross.

    Args:
        paths: positions, shape (layers + 1, points).

    Returns:
        The number of crossings over all pairs.

    Example:
        >>> count_crossings(np.array([[0.0, 1.0], [1.0, 0.0]]))
        1
    """
    return len(find_crossings(paths))


def find_crossings(paths: Array) -> Array:
    """Return position and layer of every crossing, shape (crossings, 2); see `count_crossings`."""
    first, second = np.triu_indices(paths.shape[1], k=1)
    gaps = paths[:, second] - paths[:, first]
    sides = _last_side(np.sign(gaps))
    layers, pairs = np.nonzero(sides[1:] * sides[:-1] < 0)
    before, after = gaps[layers, pairs], gaps[layers + 1, pairs]
    share = before / np.where(before == after, 1.0, before - after)
    left = paths[layers, first[pairs]]
    right = paths[layers + 1, first[pairs]]
    return np.stack([left + share * (right - left), layers + share], axis=1)


def _last_side(signs: Array) -> Array:
    """Replace each zero by the last sign before it, along the layers."""
    filled = signs.copy()
    for layer in range(1, len(filled)):
        filled[layer] = np.where(filled[layer] == 0, filled[layer - 1], filled[layer])
    return filled


def smallest_gap(paths: Array) -> float:
    """Return the smallest distance of two neighbours, over all layers."""
    return float(np.diff(np.sort(paths, axis=1), axis=1).min())
