"""One picture per data set: the data, then each model's density and samples, side by side."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nflows_iresnet.experiments.evaluation import Array
from nflows_iresnet.experiments.frame import Frame
from nflows_iresnet.experiments.record import DatasetSummary, Folder, Record, Result
from nflows_iresnet.experiments.summary import Row, rows_of

INK = "#1b1b3a"
DATA = "#7b8299"
MODEL = "#c8385a"
CMAP = "magma"
CELL = 2.35
IMAGES = 6
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.edgecolor": "#c9ccd6", "figure.dpi": 100}


@dataclass(frozen=True, eq=False)
class Panel:
    """One column of a picture: the data, or a model."""

    title: str
    arrays: dict[str, Array]
    is_best: bool = False

    @property
    def weight(self) -> str:
        """Weight of the title's font."""
        return "bold" if self.is_best else "normal"


def draw(record: Record, folder: Folder, dataset: DatasetSummary) -> dict[Path, bytes]:
    """Draw the picture of a data set from what its folder holds.

    Returns:
        A PNG, by its path.
    """
    data = folder.load_arrays((dataset.name,))
    panels = _panels(record, folder, dataset.name)
    with mpl.rc_context(STYLE):
        if dataset.features == 2:
            figure = _plane(dataset, data, panels)
        else:
            figure = _high_dimensional(record, dataset, data, panels)
        return {folder.picture(dataset.name): as_png(figure)}


def as_png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def _panels(record: Record, folder: Folder, dataset: str) -> list[Panel]:
    """Return one panel per model, showing its first repeat, in the order of the run."""
    ranked = rows_of(record, dataset)
    rows = {row.model: row for row in ranked}
    first = {r.model: r for r in sorted(record.of(dataset), key=lambda r: -r.repeat)}
    order = [model for model in record.arguments["models"] if model in first]
    return [
        Panel(_title(rows[m]), folder.load_arrays(first[m].key), is_best=m == ranked[0].model)
        for m in order
    ]


def _title(row: Row) -> str:
    nll = row.metrics.test_nll
    return f"{row.model}\n" + ("failed" if nll is None else f"{nll:.3f} nats")


def _plane(dataset: DatasetSummary, data: dict[str, Array], panels: list[Panel]) -> Figure:
    frame = Frame.from_array(data["frame"])
    columns = [Panel(_data_title(dataset), {"samples": data["train"], **data}), *panels]
    figure = Figure(figsize=(CELL * len(columns) + 0.2, 2 * CELL + 0.65), layout="constrained")
    axes = figure.subplots(2, len(columns), squeeze=False)
    brightest = find_brightest([panel.arrays for panel in columns])
    for panel, (above, below) in zip(columns, axes.T, strict=True):
        draw_density(above, frame, panel.arrays, brightest)
        draw_scatter(below, frame, panel.arrays.get("samples"), MODEL if panel in panels else DATA)
        above.set_title(panel.title, color=INK, fontweight=panel.weight)
    axes[0, 0].set_ylabel("density", color=INK)
    axes[1, 0].set_ylabel("samples", color=INK)
    return figure


def _data_title(dataset: DatasetSummary) -> str:
    if dataset.optimum is None:
        return f"{dataset.name}\ndata"
    return f"{dataset.name}, true density\n{dataset.optimum:.3f} nats"


def find_brightest(columns: list[dict[str, Array]]) -> float:
    """Return the density shown brightest: of the truth, or else a high quantile of the models."""
    if "grid_log_prob" in columns[0]:
        return float(np.exp(columns[0]["grid_log_prob"].max()))
    tops = [
        np.nanquantile(np.exp(c["grid_log_prob"]), 0.998) for c in columns if "grid_log_prob" in c
    ]
    return float(np.median(tops)) if tops else 1.0


def draw_density(axes: Axes, frame: Frame, arrays: dict[str, Array], brightest: float) -> None:
    """Show exp(grid_log_prob) in a window, or else a histogram of the training rows."""
    _window(axes, frame)
    if "grid_log_prob" in arrays:
        side = math.isqrt(len(arrays["grid_log_prob"]))
        density = np.exp(arrays["grid_log_prob"]).reshape(side, side)
    elif "train" in arrays:
        density = _histogram(frame, arrays["train"])
    else:
        _say(axes, "no density")
        return
    axes.imshow(
        density, origin="lower", extent=frame.extent, cmap=CMAP, vmin=0.0, vmax=brightest,
        interpolation="bilinear",
    )  # fmt: skip


def _histogram(frame: Frame, rows: Array) -> Array:
    left, right, bottom, top = frame.extent
    density, _, _ = np.histogram2d(
        rows[:, 1], rows[:, 0], bins=40, range=((bottom, top), (left, right)), density=True
    )
    return density


def draw_scatter(axes: Axes, frame: Frame, samples: Array | None, color: str) -> None:
    """Show samples (N, 2) in a window."""
    _window(axes, frame)
    if samples is None:
        _say(axes, "no samples")
        return
    axes.scatter(
        samples[:, 0], samples[:, 1], s=2.0, alpha=0.35, linewidths=0, color=color, rasterized=True
    )


def _window(axes: Axes, frame: Frame) -> None:
    left, right, bottom, top = frame.extent
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=DATA)


def _high_dimensional(
    record: Record,
    dataset: DatasetSummary,
    data: dict[str, Array],
    panels: list[Panel],
) -> Figure:
    columns = max(len(panels) + 1, 3)
    figure = Figure(figsize=(CELL * columns + 0.2, 3 * CELL + 0.9), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 2])
    top, bottom = (figure.add_subfigure(grid[row]) for row in range(2))
    draw_curves(top.subplots(1, 2), record.of(dataset.name))
    axes = bottom.subplots(2, columns, squeeze=False)
    draw_samples = _images if _is_image(dataset) else _components
    titled = [Panel("data", {"samples": data["train"]}), *panels]
    for panel, (above, below) in zip(titled, axes.T, strict=False):
        above.set_title(panel.title, color=INK, fontweight=panel.weight)
        draw_samples(above, data, panel.arrays.get("samples"))
        _quantiles(below, data["train"], panel.arrays.get("samples"))
    for unused in axes[:, len(titled) :].flat:
        unused.set_axis_off()
    return figure


def draw_race(record: Record, dataset: DatasetSummary) -> bytes:
    """Draw the validation NLL of every model and seed, over steps and over seconds, as a PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * CELL, 1.7 * CELL), layout="constrained")
        draw_curves(figure.subplots(1, 2), record.of(dataset.name))
        figure.suptitle(dataset.name, color=INK)
        return as_png(figure)


def draw_curves(
    axes: Sequence[Axes],
    results: list[Result],
    unit: Callable[[float], float] = float,
    label: str = "validation NLL (nats)",
) -> None:
    """Draw the validation NLL of every repeat, over steps and over seconds, with its best."""
    models = list(dict.fromkeys(result.model for result in results))
    for horizontal, attribute, name in zip(axes, ("step", "seconds"), _CURVE_LABELS, strict=True):
        for result in results:
            if result.training is not None:
                points = result.training.curve
                xs = [getattr(point, attribute) for point in points]
                ys = [unit(point.validation) for point in points]
                best = next(k for k, p in enumerate(points) if p.step == result.training.best_step)
                colour = f"C{models.index(result.model)}"
                text = result.model if result.repeat == 0 else None
                horizontal.plot(
                    xs, ys, label=text, lw=1.4, color=colour, marker="o", ms=4, markevery=[best]
                )
        horizontal.set(xlabel=name, ylabel=label)
        _clip_start(horizontal)
        horizontal.spines[["top", "right"]].set_visible(False)
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))


_CURVE_LABELS = ("optimiser step", "seconds of training")


def _clip_start(axes: Axes) -> None:
    """Leave the first, steep part of the curves out of the window, but no curve's best point."""
    curves = [np.asarray(line.get_ydata(), dtype=float) for line in axes.lines]
    parts = [part for curve in curves for part in (curve[len(curve) // 5 :], [np.nanmin(curve)])]
    values = np.concatenate(parts) if parts else np.array([])
    values = values[np.isfinite(values)]
    if values.size and np.ptp(values) > 0:
        axes.set_ylim(values.min() - 0.05 * np.ptp(values), values.max() + 0.1 * np.ptp(values))


def _is_image(dataset: DatasetSummary) -> bool:
    side = math.isqrt(dataset.features)
    return dataset.levels is not None and side * side == dataset.features


def _images(axes: Axes, data: dict[str, Array], samples: Array | None) -> None:
    """Show the first samples as square images, in the units of the source."""
    axes.set_axis_off()
    if samples is None or len(samples) < IMAGES**2:
        _say(axes, "no samples")
        return
    side = math.isqrt(samples.shape[1])
    pixels = samples[: IMAGES**2] * data["scale"] + data["location"]
    tiles = np.pad(
        pixels.reshape(IMAGES, IMAGES, side, side),
        ((0, 0), (0, 0), (0, 1), (0, 1)),
        constant_values=np.nan,
    )
    mosaic = tiles.transpose(0, 2, 1, 3).reshape(IMAGES * (side + 1), -1)[:-1, :-1]
    axes.imshow(mosaic, cmap="gray_r", vmin=0.0, vmax=1.0)


def _components(axes: Axes, data: dict[str, Array], samples: Array | None) -> None:
    """Scatter the samples over the data along the data's first two principal components."""
    train = data["train"]
    centre = train.mean(axis=0)
    directions = np.linalg.svd(train - centre, full_matrices=False)[2][:2].T
    cloud = (train - centre) @ directions
    frame = _frame_of(cloud)
    if samples is not None:
        draw_scatter(axes, frame, cloud, DATA)
    if samples is not train:
        draw_scatter(
            axes, frame, None if samples is None else (samples - centre) @ directions, MODEL
        )
    axes.set_xlabel("principal components", color=INK)


def _frame_of(cloud: Array) -> Frame:
    low, high = np.quantile(cloud, (0.002, 0.998), axis=0)
    x, y = (low + high) / 2
    return Frame(float(x), float(y), 0.6 * float((high - low).max()))


def _quantiles(axes: Axes, train: Array, samples: Array | None) -> None:
    """Draw one line per dimension: quantiles of the samples against quantiles of the data."""
    levels = np.linspace(0.01, 0.99, 99)
    expected = np.quantile(train, levels, axis=0)
    scale = np.maximum(train.std(axis=0), 1e-6)
    limit = float(np.quantile(np.abs((expected - train.mean(axis=0)) / scale), 0.99)) * 1.3
    axes.plot([-limit, limit], [-limit, limit], color=DATA, lw=1.0)
    if samples is not None:
        found = np.quantile(samples, levels, axis=0)
        pairs = ((q - train.mean(axis=0)) / scale for q in (expected, found))
        axes.plot(*pairs, color=MODEL, lw=0.7, alpha=0.5)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", xticks=[], yticks=[])
    axes.set_xlabel("quantiles: data → samples", color=INK)
