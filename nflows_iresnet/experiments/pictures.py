"""The pictures of a comparison: densities and samples, learning curves, images, bars."""

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
from matplotlib.axis import Axis
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import LogFormatter, MaxNLocator

from nflows_iresnet.experiments.data import Window
from nflows_iresnet.experiments.evaluation import Array
from nflows_iresnet.experiments.folder import Folder
from nflows_iresnet.experiments.record import DatasetSummary, Record, Result
from nflows_iresnet.experiments.tables import Row, in_bits, number, rows_of

INK = "#1b1b3a"
DATA = "#7b8299"
MODEL = "#c8385a"
CELL = 2.35
_PANELS_PER_ROW = 6
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.edgecolor": "#c9ccd6",
    "figure.dpi": 100,
    "text.parse_math": False,  # data sets may be called a$b$
}
_ROW_SIDE = 6
_IMAGE_SIDE = 8
_NOISE_RANGE = 3.0


def draw(record: Record, folder: Folder, dataset: DatasetSummary) -> dict[Path, bytes]:
    """Draw the pictures of a data set from what its folder holds, as PNGs by their paths.

    For rows one shows everything, for images one the learning curves and the data, then others the
    samples and reconstructions of each model; beside published numbers there are bars, too.
    """
    data = folder.load_arrays((dataset.name,))
    with mpl.rc_context(STYLE):
        if dataset.shape is not None:
            pictures = _draw_images(record, folder, dataset, data)
        else:
            draw_rows = _plane if dataset.features == 2 else _high_dimensional
            pictures = {(dataset.name,): draw_rows(record, folder, dataset, data)}
        if record.published:
            pictures[dataset.name, "bars"] = _draw_bars(record, dataset)
        return {folder.picture(*parts): as_png(figure) for parts, figure in pictures.items()}


def draw_race(record: Record, dataset: DatasetSummary) -> bytes:
    """Draw the validation NLL of every model and seed, over steps and over seconds, as a PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.6 * CELL, 1.7 * CELL), layout="constrained")
        draw_curves(figure.subplots(1, 2), record.of(dataset.name))
        figure.suptitle(dataset.name, color=INK)
        return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, facecolor="white")
    return buffer.getvalue()


def label_plainly(axis: Axis) -> None:
    """Label a logarithmic axis by numbers: the usual labels are markup, which `STYLE` leaves alone.

    Between decades there are labels only where the axis spans less than one.
    """
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


# --- learning curves ------------------------------------------------------------------------------


def draw_curves(
    axes: Sequence[Axes],
    results: Sequence[Result],
    unit: Callable[[float], float] = float,
    label: str = "validation NLL (nats)",
) -> None:
    """Draw the validation NLL of every run, over steps and over seconds, with a dot at its best."""
    models = list(dict.fromkeys(result.model for result in results))
    logs = [(result.model, result.training) for result in results if result.training is not None]
    curves = [np.array([unit(point.validation) for point in log.curve]) for _, log in logs]
    for each, attribute, name in zip(axes, ("step", "seconds"), _CURVE_LABELS, strict=True):
        for (model, log), ys in zip(logs, curves, strict=True):
            xs = [getattr(point, attribute) for point in log.curve]
            _draw_curve(each, xs, np.where(np.isfinite(ys), ys, math.nan), model, models)
        each.set(xlabel=name, ylabel=label)
        _set_window(each, [ys[np.isfinite(ys)] for ys in curves])
        each.spines[["top", "right"]].set_visible(False)
    handles, names = axes[-1].get_legend_handles_labels()
    seeds_joined = dict(zip(names, handles, strict=True))
    axes[-1].legend(
        *(seeds_joined.values(), seeds_joined), frameon=False,
        loc="center left", bbox_to_anchor=(1.01, 0.5),
    )  # fmt: skip


_CURVE_LABELS = ("optimiser step", "seconds of training")


def _draw_curve(axes: Axes, xs: list[float], ys: Array, model: str, models: list[str]) -> None:
    colour, dashes = f"C{models.index(model) % 10}", ("-", "--", ":")[models.index(model) // 10 % 3]
    axes.plot(xs, ys, dashes, label=model, lw=1.4, color=colour)
    if not np.isnan(ys).all():
        best = int(np.nanargmin(ys))
        axes.plot(xs[best], ys[best], "o", ms=5, color=colour, mec="white", mew=0.8, zorder=3)


def _set_window(axes: Axes, curves: list[Array]) -> None:
    """Show every best point, and each curve where it is no worse than it began.

    The worst fifth of that, the steep start, may lie above the window, as does what diverged.
    """
    ends = [
        (ys.min(), np.quantile(ys[ys <= ys[0]], 0.8, method="higher")) for ys in curves if ys.size
    ]
    if ends and np.ptp(ends) > 0:
        margin = 0.06 * np.ptp(ends)
        axes.set_ylim(np.min(ends) - margin, np.max(ends) + margin)


# --- rows -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Panel:
    """One column of a picture: the data, or a model."""

    title: str
    arrays: dict[str, Array]
    color: str = MODEL
    is_best: bool = False

    def put_title(self, axes: Axes) -> None:
        axes.set_title(self.title, color=INK, fontweight="bold" if self.is_best else "normal")


def _panels(record: Record, folder: Folder, dataset: DatasetSummary) -> list[_Panel]:
    """Return one panel per model, showing its first repeat, in the order of the run."""
    rows = {row.model: row for row in rows_of(record, dataset.name)}
    results = sorted(record.of(dataset.name), key=lambda each: -each.repeat)
    first, best = {each.model: each for each in results}, next(iter(rows), None)
    bits = in_bits(record, dataset)
    return [
        _Panel(_title(rows[m], bits), folder.load_arrays(first[m].key), is_best=m == best)
        for m in record.arguments["models"]
        if m in first
    ]


def _title(row: Row, bits: bool) -> str:
    score = row.metrics.bits_per_dim if bits else row.metrics.test_nll
    unit = "bits/dim" if bits else "nats"
    return f"{row.model}\n" + ("failed" if score is None else f"{number(score)} {unit}")


def _pairs_of_axes(figure: FigureBase, count: int) -> list[tuple[Axes, Axes]]:
    """Return one axes above another for each panel, in as many rows as keep them readable."""
    rows, columns = _layout(count)
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    pairs = [pair for row in range(rows) for pair in axes[2 * row : 2 * row + 2].T.tolist()]
    for unused in pairs[count:]:
        for each in unused:
            each.set_axis_off()
    return [(above, below) for above, below in pairs[:count]]


def _layout(count: int) -> tuple[int, int]:
    """Return the rows and columns of so many panels."""
    rows = -(-count // _PANELS_PER_ROW)
    return rows, -(-count // rows)


def _plane(
    record: Record, folder: Folder, dataset: DatasetSummary, data: dict[str, Array]
) -> Figure:
    window = Window.from_array(data["window"])
    nats = dataset.optimum
    about = "\ndata" if nats is None else f", true density\n{nats:.3f} nats"
    truth = _Panel(dataset.name + about, {"samples": data["train"], **data}, DATA)
    panels = [truth, *_panels(record, folder, dataset)]
    rows, columns = _layout(len(panels))
    figure = Figure(figsize=(CELL * columns + 0.2, rows * (2 * CELL + 0.65)), layout="constrained")
    axes = _pairs_of_axes(figure, len(panels))
    brightest = find_brightest([panel.arrays for panel in panels])
    for panel, (above, below) in zip(panels, axes, strict=True):
        panel.put_title(above)
        draw_density(above, window, panel.arrays, brightest)
        draw_scatter(below, window, panel.arrays.get("samples"), panel.color)
    for above, below in axes[::columns]:
        above.set_ylabel(f"density, brightest: ≥ {brightest:.2g}", color=INK)
        below.set_ylabel("samples", color=INK)
    outside = int((~window.contains(data["train"])).sum())
    if outside:
        axes[0][1].set_xlabel(f"{outside} of {len(data['train'])} outside", color=INK)
    _put_ticks(axes[0][1])
    return figure


def _put_ticks(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))


def find_brightest(columns: list[dict[str, Array]]) -> float:
    """Return the density shown brightest: of the truth, or else a high quantile of the models."""
    if "grid_log_prob" in columns[0]:
        return float(np.exp(columns[0]["grid_log_prob"].max()))
    tops = [
        np.nanquantile(np.exp(c["grid_log_prob"]), 0.998) for c in columns if "grid_log_prob" in c
    ]
    return float(np.median(tops)) if tops else 1.0


def draw_density(axes: Axes, window: Window, arrays: dict[str, Array], brightest: float) -> None:
    """Show exp(grid_log_prob) in a window, or else a histogram of the training rows."""
    _look_at(axes, window)
    left, right, bottom, top = window.extent
    if "grid_log_prob" in arrays:
        side = math.isqrt(len(arrays["grid_log_prob"]))
        density = np.exp(arrays["grid_log_prob"]).reshape(side, side)
    elif "train" in arrays:
        x, y = arrays["train"].T
        area = ((bottom, top), (left, right))
        density, _, _ = np.histogram2d(y, x, bins=40, range=area, density=True)
    else:
        _say(axes, "no density")
        return
    axes.imshow(
        density, origin="lower", extent=window.extent, cmap="magma", vmin=0.0, vmax=brightest,
        interpolation="bilinear",
    )  # fmt: skip


def draw_scatter(axes: Axes, window: Window, samples: Array | None, color: str) -> None:
    """Show samples (N, 2) in a window."""
    _look_at(axes, window)
    if samples is None:
        _say(axes, "no samples")
        return
    x, y = samples.T
    axes.scatter(x, y, s=2.0, alpha=0.35, linewidths=0, color=color, rasterized=True)


def _look_at(axes: Axes, window: Window) -> None:
    left, right, bottom, top = window.extent
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[], aspect="equal")


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=DATA)


def _high_dimensional(
    record: Record, folder: Folder, dataset: DatasetSummary, data: dict[str, Array]
) -> Figure:
    panels = [_Panel("data", {"samples": data["train"]}), *_panels(record, folder, dataset)]
    rows, columns = _layout(len(panels))
    size = (CELL * max(columns, 3) + 0.2, (1 + 2 * rows) * CELL + 0.5 * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[1, 2 * rows])
    top, bottom = (figure.add_subfigure(grid[row]) for row in range(2))
    draw_curves(top.subplots(1, 2), record.of(dataset.name), *_unit(record, dataset))
    is_square = math.isqrt(dataset.features) ** 2 == dataset.features
    draw_samples = _pixels if is_square and dataset.levels is not None else _components
    axes = _pairs_of_axes(bottom, len(panels))
    for panel, (above, below) in zip(panels, axes, strict=True):
        panel.put_title(above)
        draw_samples(above, data, panel.arrays.get("samples"))
        if panel is panels[0]:
            below.set_axis_off()
        else:
            _quantiles(below, data["train"], panel.arrays.get("samples"))
    return figure


def _unit(record: Record, dataset: DatasetSummary) -> tuple[Callable[[float], float], str]:
    """Return what curves are shown in: a conversion from nats, and a label."""
    if dataset.shape is not None or in_bits(record, dataset):
        return lambda nats: dataset.bits_per_dim(nats) or math.nan, "validation, bits per dimension"
    return float, "validation NLL (nats)"


def _pixels(axes: Axes, data: dict[str, Array], samples: Array | None) -> None:
    """Show the first samples as square images, in the units of the source."""
    axes.set_axis_off()
    if samples is None or len(samples) < _ROW_SIDE**2:
        _say(axes, "no samples")
        return
    side = math.isqrt(samples.shape[1])
    pixels = samples[: _ROW_SIDE**2] * data["scale"] + data["location"]
    mosaic = tile(1 - pixels.reshape(-1, 1, side, side), _ROW_SIDE)
    axes.imshow(mosaic.squeeze(-1), cmap="gray", vmin=0.0, vmax=1.0)


def _components(axes: Axes, data: dict[str, Array], samples: Array | None) -> None:
    """Scatter the samples over the data along the data's first two principal components."""
    train = data["train"]
    centre = train.mean(axis=0)
    directions = np.linalg.svd(train - centre, full_matrices=False)[2][:2].T
    cloud = (train - centre) @ directions
    low, high = np.quantile(cloud, (0.002, 0.998), axis=0)
    x, y = (low + high) / 2
    window = Window(float(x), float(y), 0.6 * float((high - low).max()))
    if samples is not None:
        draw_scatter(axes, window, cloud, DATA)
    if samples is not train:
        projected = None if samples is None else (samples - centre) @ directions
        draw_scatter(axes, window, projected, MODEL)
    _put_ticks(axes)
    axes.set_xlabel("principal components", color=INK)


def _quantiles(axes: Axes, train: Array, samples: Array | None) -> None:
    """Draw one line per dimension: quantiles of the samples against quantiles of the data."""
    levels = np.linspace(0.01, 0.99, 99)
    scale = np.maximum(train.std(axis=0), 1e-6)
    expected, *found = (
        (np.quantile(rows, levels, axis=0) - train.mean(axis=0)) / scale
        for rows in (train, samples)
        if rows is not None
    )
    limit = float(np.quantile(np.abs(expected), 0.99)) * 1.3
    axes.plot([-limit, limit], [-limit, limit], color=DATA, lw=1.0)
    for quantiles in found:
        axes.plot(expected, quantiles, color=MODEL, lw=0.7, alpha=0.5)
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    _put_ticks(axes)
    axes.set_xlabel("quantiles (std): data → samples", color=INK)


# --- images ---------------------------------------------------------------------------------------


def _draw_images(
    record: Record, folder: Folder, dataset: DatasetSummary, data: dict[str, Array]
) -> dict[tuple[str, ...], Figure]:
    pictures: dict[tuple[str, ...], Figure] = {(dataset.name,): _overview(record, dataset, data)}
    for result in record.of(dataset.name):
        arrays = folder.load_arrays(result.key) if result.repeat == 0 else {}
        for array, kind, show in _OF_MODELS:
            if array in arrays:
                figure = show(dataset, result.model, arrays)
                pictures[dataset.name, result.model, kind] = figure
    return pictures


def _overview(record: Record, dataset: DatasetSummary, data: dict[str, Array]) -> Figure:
    figure = Figure(figsize=(11.5, 3.2), layout="constrained")
    *curves, grid = figure.subplots(1, 3, width_ratios=(2, 2, 1.4))
    draw_curves(curves, record.of(dataset.name), *_unit(record, dataset))
    show_tiles(grid, tile(data["train"][: _IMAGE_SIDE**2], _IMAGE_SIDE), dataset)
    grid.set_title("data", color=INK)
    return figure


def _samples(dataset: DatasetSummary, model: str, arrays: dict[str, Array]) -> Figure:
    figure = Figure(figsize=(4.0, 4.3), layout="constrained")
    axes = figure.subplots()
    show_tiles(axes, tile(np.floor(arrays["samples"][: _IMAGE_SIDE**2]), _IMAGE_SIDE), dataset)
    axes.set_title(f"{dataset.name}: samples of {model}", color=INK)
    return figure


def _reconstructions(dataset: DatasetSummary, model: str, arrays: dict[str, Array]) -> Figure:
    """Draw rows of x, f(x) and its inverse; noise is grey at 0, black and white at -3 and 3."""
    figure = Figure(figsize=(7.6, 3.2), layout="constrained")
    shown, decoded = arrays["shown"], arrays["decoded"]
    noise = (arrays["encoded"] / _NOISE_RANGE + 1) / 2 * (_levels(dataset) - 1)
    images = {"x": shown, "f(x)": noise, "f⁻¹": decoded}
    for axes, (label, each) in zip(figure.subplots(3, 1), images.items(), strict=True):
        show_tiles(axes, tile(each, len(each)), dataset)
        axes.set_title(label, color=INK, loc="left")
    error = float(np.abs(decoded - shown).max())
    figure.suptitle(f"{dataset.name}: {model}, largest error of a pixel {error:.1e}", color=INK)
    return figure


_OF_MODELS = (
    ("samples", "samples", _samples),
    ("decoded", "reconstructions", _reconstructions),
)


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
    gaps = ((0, -len(images) % columns), (0, 0), (0, 1), (0, 1))
    tiles = np.pad(images.astype(np.float64), gaps, constant_values=1e9)
    _, channels, height, width = tiles.shape
    mosaic = tiles.reshape(-1, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    return mosaic.reshape(-1, columns * width, channels)[:-1, :-1]


# --- bars -----------------------------------------------------------------------------------------


def _draw_bars(record: Record, dataset: DatasetSummary) -> Figure:
    """Draw the score of every model, best first, and the published ones in the same order."""
    rows = [row for row in rows_of(record, dataset.name) if row.metrics.test_nll is not None]
    names = dict.fromkeys(name for row in record.published.values() for name in row)
    papers, score, unit = list(names), "bits_per_dim", "bits per dimension"
    if dataset.levels is None:
        papers, score, unit = [], "test_nll", "nats"
    size, widths = (4.6 + 2.3 * len(papers), 0.9 + 0.34 * len(rows)), [2, *[1] * len(papers)]
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    bars = {row.model: getattr(row.metrics, score) for row in rows}
    over_repeats = "repeats_se" if dataset.levels is None else "repeats_bits_se"
    errors = [
        math.hypot(getattr(row.metrics, f"{score}_se") or 0.0, getattr(row, over_repeats) or 0.0)
        for row in rows
    ]
    axes[0].errorbar(
        bars.values(), range(len(bars)), xerr=errors, fmt="none", ecolor=INK, capsize=2, zorder=3
    )
    _bars(axes[0], bars, f"{dataset.name}: measured here", unit, MODEL)
    axes[0].invert_yaxis()
    for each, name in zip(axes[1:], papers, strict=True):
        texts = {model: record.published.get(model, {}).get(name, "nan") for model in bars}
        values = {model: float(text.strip("†")) for model, text in texts.items()}
        _bars(each, values, f"{name}: published", unit, DATA)
    return figure


def _bars(axes: Axes, bars: dict[str, float], title: str, unit: str, color: str) -> None:
    axes.barh(list(bars), list(bars.values()), color=color, height=0.62)
    for place, value in enumerate(bars.values()):
        axes.annotate(
            number(value, ".2f"),
            (value, place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set(title=title, xlabel=unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.2)
