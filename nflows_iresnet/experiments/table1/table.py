"""The columns of the table of classifiers."""

from __future__ import annotations

from nflows_iresnet.experiments.table1.record import Record, Row
from nflows_iresnet.experiments.tables import Column, number


def columns_for(record: Record) -> list[Column[Row]]:
    """Return the columns: what is measured, then what was published."""
    names = dict.fromkeys(name for row in record.published.values() for name in row)
    return [*COLUMNS, *map(_published, names)]


def _published(name: str) -> Column[Row]:
    return Column(
        f"published\n{name}",
        f"Not measured here: test error in percent on {name} as published for the i-ResNet "
        "(Behrmann et al., 2019), with hundreds of layers and days of training; resnet is "
        "ResNet-164 there. There c bounds each layer, here each whole block, which is "
        "stricter.",
        lambda row: row.published.get(name, "-"),
    )


def _error(row: Row) -> str:
    if row.error_percent is None or row.error_se is None:
        return "-"
    return f"{row.error_percent:.2f} ± {row.error_se:.2f}"


def _bound(row: Row) -> str:
    return "none" if row.lipschitz_bound is None else f"≤ {row.lipschitz_bound:.3f}"


def _inverted(row: Row) -> str:
    if row.inversion is None:
        return "-"
    found = row.inversion.num_images - row.inversion.num_failed
    return f"{found} of {row.inversion.num_images}"


def _residual(row: Row) -> str:
    return "-" if row.inversion is None else number(row.inversion.residual_max, ".1e")


def _reconstruction(row: Row) -> str:
    return "-" if row.inversion is None else number(row.inversion.error_max, ".1e")


COLUMNS: tuple[Column[Row], ...] = (
    Column("model", "c=0.9 is the invertible classifier with Lip(g) ≤ 0.9.", lambda row: row.model),
    Column(
        "test\nerror %",
        "Misclassified test images over all repeats ± binomial standard error, in percent.",
        _error,
        lambda row: row.error_percent,
    ),
    Column(
        "certified\nbound",
        "Largest certified bound of Lip(g) over the residual blocks and the repeats, from the "
        "weights after training; none where no branch g has one.",
        _bound,
    ),
    Column(
        "guaranteed\ninverse",
        "Whether the certified bound is below 1.",
        lambda row: "yes" if row.guaranteed_inverse else "no",
    ),
    Column(
        "inverse\nfound",
        "Test images for which fixed-point iteration reached its tolerance in every block.",
        _inverted,
    ),
    Column(
        "worst\nresidual",
        "Largest residual ‖x + g(x) - y‖ of a block, where the solver stopped or gave up.",
        _residual,
    ),
    Column(
        "recon-\nstruction",
        "Largest error of a pixel of a test image after encode and decode; a level has width 1. "
        "Where the solver gave up, of the best point that it found.",
        _reconstruction,
    ),
    Column("para-\nmeters", "Trained parameters.", lambda row: f"{row.num_parameters:,}"),
    Column(
        "training\n(s)",
        "Seconds of training per repeat, validation not counted.",
        lambda row: number(row.train_seconds, ".1f"),
    ),
)
