"""What deserves care in a table before a density is fitted to it, a sentence each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from nflows_iresnet.datasets.files import FloatArray, Names

_FEW_VALUES = 0.05
_COMMON = 0.05
"""Part of the rows that may have one value before it is said."""
_SAME_STEP = 1e-3
_ROUNDING = 1e-7
"""An eigenvalue of the correlations below this is what rounding to four digits leaves of zero."""
_ROWS_PER_COLUMN = 2
"""With fewer rows, columns of noise are nearly dependent, too."""
_INVOLVED = 1e-2
_MOST_NAMES = 8
_FEW = 0.01
"""Part of the rows that may be far from all others, unless they have one value."""
_FAR = 10.0
_LONE, _REPEATED = 10.0, 3.0
"""How many times as far from the median as any other a value is that does not belong there."""


def notes_on(columns: Names, values: FloatArray) -> tuple[str, ...]:
    """Say which columns [rows, columns] number the rows, are quantised, far off, or dependent."""
    if not len(values):
        return ()
    is_far = np.stack([_is_far(column) for column in values.T], axis=1)
    near = values[~is_far.any(axis=1)]
    return (*_column_notes(columns, values, is_far), *_dependence_notes(columns, near))


def _column_notes(
    columns: Names, values: FloatArray, is_far: npt.NDArray[np.bool_]
) -> Iterator[str]:
    for name, column, far in zip(columns, values.T, is_far.T, strict=True):
        for note in (_count_note(column), _quantised_note(column), _far_note(column, far)):
            if note:
                yield f"column {name} {note}"


def _count_note(column: FloatArray) -> str | None:
    steps = np.diff(column)
    slack = 2 * np.spacing(np.abs(column).max(initial=0.0))
    if not len(steps) or steps[0] == 0 or not np.allclose(steps, steps[0], _SAME_STEP, slack):
        return None
    size = f"{abs(column[-1] - column[0]) / len(steps):g}"
    return f"counts the rows{'' if size == '1' else f' in steps of {size}'}: is it a feature?"


def _quantised_note(column: FloatArray) -> str | None:
    """Few distinct values, or one that is common: the density has no upper bound there."""
    distinct, counts = np.unique(column, return_counts=True)
    if len(distinct) < _FEW_VALUES * len(column):
        return (
            f"has only {len(distinct)} distinct values: its density is unbounded; add noise to it"
        )
    most = counts.max(initial=1)
    if most > max(1, _COMMON * len(column)):
        return (
            f"is {distinct[counts.argmax()] + 0:g} in {most / len(column):.0%} of the rows: its "
            "density is unbounded there; add noise to it, or leave them out"
        )
    return None


def _distances(column: FloatArray) -> FloatArray:
    """Return how far each value is from the median, in medians of that; equal ones do not count."""
    distances = np.abs(column - np.median(column))
    apart = distances[distances > 0]
    return distances / np.median(apart) if len(apart) else distances


def _is_far(column: FloatArray) -> npt.NDArray[np.bool_]:
    """Whether values lie beyond a gap that tails hardly have, which are full up to their end.

    Many rows beyond are another part of the data, unless they have one value, as a code for what is
    missing.
    """
    distances = _distances(column)
    levels, counts = np.unique(distances, return_counts=True)
    if len(levels) < _FEW_VALUES * len(column):
        return np.zeros(len(column), dtype=np.bool_)
    gaps = levels[1:] / np.maximum(levels[:-1], 1)
    wanted = np.where(counts[1:] > 2, _REPEATED, _LONE)
    beyond = levels[1:][(levels[1:] > _FAR) & (gaps > wanted)]
    is_far: npt.NDArray[np.bool_] = distances >= beyond.min(initial=np.inf)
    is_code = is_far.any() and np.ptp(column[is_far]) == 0
    return is_far & (is_code or is_far.mean() <= max(_FEW, 1 / len(column)))


def _far_note(column: FloatArray, is_far: npt.NDArray[np.bool_]) -> str | None:
    count = int(is_far.sum())
    if not count:
        return None
    verb = "is" if np.ptp(column[is_far]) == 0 else "has values like"
    return (
        f"{verb} {column[_distances(column).argmax()]:g} in {count} row{'s' * (count > 1)}, far "
        "from all others: such rows spoil the start from data; remove them if that is a mistake, "
        "or means that the value is missing"
    )


def _dependence_notes(columns: Names, values: FloatArray) -> Iterator[str]:
    """Name the columns of which some follow from the others by a linear map."""
    if len(values) <= _ROWS_PER_COLUMN * len(columns):
        return
    varying = np.flatnonzero(np.ptp(values, axis=0))
    if len(varying) < 2:
        return
    names, values = [columns[index] for index in varying], values[:, varying]
    scaled = (values - values.mean(axis=0)) / np.ptp(values, axis=0)
    eigenvalues, directions = np.linalg.eigh(np.corrcoef(scaled.T))
    null = directions[:, eigenvalues < _ROUNDING]
    if count := null.shape[1]:
        involved = [names[index] for index in np.flatnonzero((null**2).sum(axis=1) > _INVOLVED**2)]
        more = len(involved) - _MOST_NAMES
        shown = ", ".join(involved[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
        follow = "1 follows" if count == 1 else f"{count} follow"
        yield (
            f"of columns {shown}, {follow} from the others, or nearly: their density has next "
            f"to no bound, and models race up there; leave {count} of them out"
        )
