"""report.html of a table of classifiers, in one file that needs nothing else."""

from __future__ import annotations

from nflows_iresnet.experiments.report import Page, Section, command_of
from nflows_iresnet.experiments.table1.record import Record
from nflows_iresnet.experiments.table1.table import columns_for

FAIRNESS = (
    "All rows but resnet are one architecture, with ordinary or with certified convolutions; "
    "resnet has as many blocks and the width that comes nearest to as many parameters. Every "
    "row sees the same images in the same order, is trained by Adam with the same learning "
    "rate, cosine schedule and gradient clipping, without augmentation but the random shifts "
    "named below, if any, and the state with the "
    "best cross-entropy on the validation images is kept. The standard error counts each "
    "distinct test image once, however many repeats saw it. The guarantee is read off the "
    "certified bound of the trained weights."
)


def caption(record: Record) -> str:
    """Describe the images in one line."""
    data, repeats = record.data, record.arguments["repeats"]
    budget = record.arguments.get("budget")
    length = f"{record.arguments['steps']} steps" if budget is None else f"{budget:g} s of training"
    return (
        f"{data.num_train} training and {data.num_test} test images of "
        f"{'x'.join(map(str, data.shape))}, {repeats} repeat{'s' if repeats > 1 else ''}, "
        f"{data.num_distinct} distinct test images, {length}"
    )


def render(record: Record, picture: bytes) -> str:
    """Render the page."""
    rows, columns = record.rows(), columns_for(record)
    section = Section(
        caption=f"{caption(record)}. Source: {record.data.source}; {record.data.split}.",
        tables=[(columns, rows, "")],
        notes=record.captures(),
        failures=[f"{row.model} failed: {text}" for row in rows for text in row.failures],
        pictures=[("errors", picture, "")],
    )
    return Page(
        f"nflows-iresnet table1: {record.data.name}",
        f"What a guaranteed inverse costs a classifier: {record.data.name}",
        [section],
        record,
        command_line(record),
        glossary=columns,
        explanation=FAIRNESS,
    ).render()


def command_line(record: Record) -> str:
    """Return the command that repeats the run."""
    arguments = dict(record.arguments)
    return command_of("table1", [arguments.pop("dataset")], arguments)
