"""Pictures of images: learning curves, and for each model its samples and its reconstructions."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflows_iresnet.experiments.evaluation import Array
from nflows_iresnet.experiments.plots import INK, STYLE, as_png, draw_curves
from nflows_iresnet.experiments.record import DatasetSummary, Folder, Record

SIDE = 8
_NOISE_RANGE = 3.0


def draw(record: Record, folder: Folder, dataset: DatasetSummary) -> dict[Path, bytes]:
    """Draw the pictures of a set of images from what its folder holds.

    Returns:
        PNGs by their paths: the learning curves beside a grid of the data, then for each model
        samples, and reconstructions.
    """
    pictures = {}
    with mpl.rc_context(STYLE):
        data = folder.load_arrays((dataset.name,))
        pictures[folder.picture(dataset.name)] = as_png(_overview(record, dataset, data))
        for result in record.of(dataset.name):
            arrays = folder.load_arrays(result.key)
            if result.repeat == 0 and "samples" in arrays:
                path = folder.picture(dataset.name, result.model, "samples")
                pictures[path] = as_png(_samples(dataset, result.model, arrays["samples"]))
            if result.repeat == 0 and "decoded" in arrays:
                path = folder.picture(dataset.name, result.model, "reconstructions")
                pictures[path] = as_png(_reconstructions(dataset, result.model, arrays))
    return pictures


def _overview(record: Record, dataset: DatasetSummary, data: dict[str, Array]) -> Figure:
    figure = Figure(figsize=(11.5, 3.2), layout="constrained")
    *curves, grid = figure.subplots(1, 3, width_ratios=(2, 2, 1.4))
    draw_curves(
        curves,
        record.of(dataset.name),
        lambda nats: dataset.bits_per_dim(nats) or math.nan,
        "validation, bits per dimension",
    )
    show_tiles(grid, tile(data["train"][: SIDE**2], SIDE), dataset)
    grid.set_title("data", color=INK)
    return figure


def _samples(dataset: DatasetSummary, model: str, samples: Array) -> Figure:
    figure = Figure(figsize=(4.0, 4.3), layout="constrained")
    axes = figure.subplots()
    show_tiles(axes, tile(np.floor(samples[: SIDE**2]), SIDE), dataset)
    axes.set_title(f"{dataset.name}: samples of {model}", color=INK)
    return figure


def _reconstructions(dataset: DatasetSummary, model: str, arrays: dict[str, Array]) -> Figure:
    """Draw rows of x, f(x) and its inverse; noise is grey at 0, black and white at -3 and 3."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    rows = figure.subplots(3, 1)
    shown, decoded = arrays["shown"], arrays["decoded"]
    noise = (arrays["encoded"] / _NOISE_RANGE + 1) / 2 * (_levels(dataset) - 1)
    for axes, images, label in zip(
        rows, (shown, noise, decoded), ("x", "f(x)", "f⁻¹"), strict=True
    ):
        show_tiles(axes, tile(images, len(images)), dataset)
        axes.set_title(label, color=INK, loc="left")
    error = float(np.abs(decoded - shown).max())
    figure.suptitle(f"{dataset.name}: {model}, largest error of a pixel {error:.1e}", color=INK)
    return figure


def _levels(dataset: DatasetSummary) -> int:
    return dataset.levels or 256


def show_tiles(axes: Axes, mosaic: Array, dataset: DatasetSummary) -> None:
    """Show what `tile` returns, in the grey levels or colours of the data set."""
    axes.set_axis_off()
    pixels = np.clip(mosaic / (_levels(dataset) - 1), 0, 1)
    axes.imshow(
        pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=1
    )


def tile(images: Array, columns: int) -> Array:
    """Lay images (N, C, H, W) out in rows, with a white line between: (rows H', columns W', C)."""
    rows = -(-len(images) // columns)
    count, channels, height, width = images.shape
    tiles = np.full((rows * columns, channels, height + 1, width + 1), 1e9)
    tiles[:count, :, :-1, :-1] = images
    tiles = tiles.reshape(rows, columns, channels, height + 1, width + 1)
    joined = tiles.transpose(0, 3, 1, 4, 2).reshape(rows * (height + 1), -1, channels)
    return joined[:-1, :-1]
