"""report.html of a table of classifiers, in one file that needs nothing else."""

from __future__ import annotations

import base64
import shlex
from html import escape

from nflows_iresnet.experiments.report import STYLE, glossary, pairs, table
from nflows_iresnet.experiments.table1.record import Record
from nflows_iresnet.experiments.table1.table import columns_for

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nflows-iresnet table1: {name}</title>
<style>{style}</style>
</head>
<body>
<h1>What a guaranteed inverse costs a classifier: {name}</h1>
<p class="meta">{started} · {device} · nflows-iresnet {version} · torch {torch}</p>
<p class="caption">{caption}</p>
<div class="scroll">{table}</div>
{failures}
<figure><img alt="errors" src="data:image/png;base64,{picture}"></figure>
<h2>How to read it</h2>
<dl>{glossary}</dl>
<p>{fairness}</p>
<h2>Reproduce it</h2>
<pre>{command}</pre>
<div class="columns"><table>{arguments}</table><table>{environment}</table></div>
</body>
</html>
"""

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
    versions, rows, columns = record.environment["versions"], record.rows(), columns_for(record)
    rest = {name: value for name, value in record.environment.items() if name != "versions"}
    return _PAGE.format(
        name=escape(record.data.name),
        style=STYLE,
        started=escape(record.started),
        device=escape(str(record.environment["device_name"])),
        version=versions["nflows-iresnet"],
        torch=versions["torch"],
        caption=escape(f"{caption(record)}. Source: {record.data.source}; {record.data.split}."),
        table=table(columns, rows),
        failures="".join(f'<p class="caption">{escape(line)}</p>' for line in record.captures())
        + "".join(
            f'<p class="failed">{escape(row.model)} failed: {escape(failure)}</p>'
            for row in rows
            for failure in row.failures
        ),
        picture=base64.b64encode(picture).decode(),
        glossary=glossary(columns),
        fairness=FAIRNESS,
        command=escape(command_line(record)),
        arguments=pairs(record.arguments),
        environment=pairs({**versions, **rest}),
    )


def command_line(record: Record) -> str:
    """Return the command that repeats the run."""
    words = ["nflows-iresnet table1", shlex.quote(record.arguments["dataset"])]
    for name, value in record.arguments.items():
        if name != "dataset" and value is not None:
            values = value if isinstance(value, list) else [value]
            words += [f"--{name.replace('_', '-')}", *(shlex.quote(str(item)) for item in values)]
    return " ".join(words)
