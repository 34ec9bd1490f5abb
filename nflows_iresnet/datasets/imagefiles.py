"""Files of labelled images as people have them: IDX, and CIFAR's pickles without running code."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nflows_iresnet.datasets.files import SourceFile, one_line
from nflows_iresnet.datasets.pickles import Recorded, read_pickle, to_array

Bytes = npt.NDArray[np.uint8]

_IDX_UNSIGNED_BYTE = 8


def parse_idx(file: SourceFile, dimensions: int) -> Bytes:
    r"""Parse the IDX format: two zero bytes, a type, the number of dimensions, sizes, values.

    References:
        "The MNIST database of handwritten digits" (LeCun et al., 1998).

    Args:
        file: The file.
        dimensions: How many dimensions it must have: three for images, one for labels.

    Returns:
        The values, uint8.

    Raises:
        ValueError: If the file is not in this format or has another length than it says.

    Example:
        >>> parse_idx(SourceFile("labels", bytes([0, 0, 8, 1, 0, 0, 0, 2, 7, 9])), 1)
        array([7, 9], dtype=uint8)
    """
    start, content = 4 + 4 * dimensions, file.content
    if content[:4] != bytes([0, 0, _IDX_UNSIGNED_BYTE, dimensions]) or len(content) < start:
        raise ValueError(
            f"{file.path} is not an IDX file of unsigned bytes in {dimensions} dimensions: it"
            f" begins with {content[:4].hex()}; get the ubyte file of the data set"
        )
    shape = tuple(np.frombuffer(content, ">u4", count=dimensions, offset=4).tolist())
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{file.path} holds {len(content) - start} values and announces {math.prod(shape)};"
            " it was cut short, get it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def parse_cifar(file: SourceFile, labels_key: str) -> tuple[Bytes, npt.NDArray[np.int64]]:
    """Parse a batch of CIFAR's python version.

    References:
        "Learning multiple layers of features from tiny images" (Krizhevsky, 2009).

    Args:
        file: The file.
        labels_key: ``labels`` for CIFAR-10, ``fine_labels`` for CIFAR-100.

    Returns:
        Images [rows, 3, 32, 32] and labels [rows].

    Raises:
        ValueError: If the file is not such a batch.
    """
    batch = read_pickle(file)
    wanted = (b"data", labels_key.encode())
    if not isinstance(batch, dict) or not all(key in batch for key in wanted):
        raise ValueError(
            f"{file.path} is not a CIFAR batch: it must hold a dictionary with 'data' and"
            f" {labels_key!r}; get the 'python version' of the data set"
        )
    try:
        data, labels = (_array(batch[key]) for key in wanted)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file.path} is not a CIFAR batch: {one_line(error)}; get it again"
        ) from error
    well_formed = data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    if not well_formed or labels.shape != data.shape[:1]:
        raise ValueError(
            f"{file.path} is not a CIFAR batch: 'data' must be uint8 of shape (rows, 3072) with as"
            f" many labels, found {data.shape} and {labels.shape}"
        )
    return data.reshape(-1, 3, 32, 32), labels.astype(np.int64)


def _array(value: object) -> npt.NDArray[Any]:
    if isinstance(value, Recorded):
        return to_array(value)
    return np.asarray(value, dtype=np.int64)
