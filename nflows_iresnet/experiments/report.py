"""report.html: tables and pictures in one file that needs nothing else."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Sequence
from html import escape

from nflows_iresnet.experiments import published
from nflows_iresnet.experiments.cells import Column, R, best
from nflows_iresnet.experiments.columns import columns_for
from nflows_iresnet.experiments.memory import MEASURE
from nflows_iresnet.experiments.record import DatasetSummary, Folder, Record
from nflows_iresnet.experiments.summary import caption, captures, early_stops, rows_of, verdict

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>nflows-iresnet {subcommand}: {names}</title>
<style>{style}</style>
</head>
<body>
<h1>Flows compared on {names}</h1>
<p class="meta">{started} · {device} · nflows-iresnet {version} · torch {torch} · {length} ·
seed {seed}</p>
{sections}
<h2>How to read it</h2>
<dl>{glossary}</dl>
<p>{fairness}</p>
<h2>Reproduce it</h2>
<pre>{command}</pre>
<p>The learning curves and every number of this page are in <code>results.json</code>.</p>
<div class="columns"><table>{arguments}</table><table>{environment}</table></div>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light; --ink: #1b1b3a; --soft: #6b7085; --line: #e3e5ec; --best: #0b7a4b; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 74rem;
       margin: 2.5rem auto; padding: 0 1.25rem; background: #fff; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { margin-top: 2.6rem; font-size: 1.25rem; }
.meta, figcaption, .caption { color: var(--soft); }
.scroll { overflow-x: auto; } figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line);
         vertical-align: bottom; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 600; }
.best { font-weight: 700; color: var(--best); } .failed { color: #b3261e; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 0; }
pre { background: #f5f6f9; padding: .8rem 1rem; overflow-x: auto; border-radius: 6px; }
.columns { display: flex; flex-wrap: wrap; gap: 2rem; align-items: flex-start; }
.columns td { white-space: normal; text-align: left; }
"""

_FAIRNESS = (
    "Every model sees the same splits and the same batches in the same order, has the parameter "
    "count of ResidualFlow within 10%, or as near as a flow on flattened images comes (its width "
    "is chosen for that; masked weights count), and is "
    "trained by Adam with the same cosine schedule after a short rise and the same gradient "
    "clipping, at the same learning rate unless several were tried on the validation rows. What is "
    "validated and tested is the moving average of the weights; training stops when the validation "
    "NLL has not fallen for a while, and the state with the best one is kept. The test rows select "
    "nothing. The best value of a column is bold. "
)
_ROWS = (
    "Validation and test likelihoods are exact for every model. Rows that were quantised get fresh "
    "uniform noise in each training batch, the same for every model, and fixed noise in tests. "
)
_IMAGES = (
    "Images are dequantised with fresh uniform noise in training, the same for every model, and "
    "with fixed noise in tests. "
    "Coupling flows and their log-determinants are exact. Residual flows are validated by their "
    "unbiased estimator, also where they are trained by a truncated series, and may start from "
    "training images; on the test images they are exact, or estimated where the table says so, "
    "and then compared with the exact value on the first of them. "
)


def render(record: Record, folder: Folder) -> str:
    """Render the page from the record, the arrays and the pictures of a folder."""
    versions = record.environment["versions"]
    return _PAGE.format(
        names=escape(", ".join(dataset.name for dataset in record.datasets)),
        style=STYLE,
        subcommand=record.command,
        started=escape(record.started),
        device=escape(str(record.environment["device_name"])),
        version=versions["nflows-iresnet"],
        torch=versions["torch"],
        length=_length(record),
        seed=record.arguments["seed"],
        sections="\n".join(_section(record, folder, dataset) for dataset in record.datasets),
        glossary=_glossary(record),
        fairness=_FAIRNESS
        + _exactness(record)
        + f"Memory counts {MEASURE[record.environment['device']]}.",
        command=escape(command_line(record)),
        arguments=pairs(record.arguments),
        environment=pairs({**versions, **_rest(record.environment)}),
    )


def _exactness(record: Record) -> str:
    return _ROWS if all(dataset.shape is None for dataset in record.datasets) else _IMAGES


def command_line(record: Record) -> str:
    """Return the command that repeats the run."""
    words = [f"nflows-iresnet {record.command}", *map(shlex.quote, record.arguments["datasets"])]
    for name, value in record.arguments.items():
        if name == "datasets" or value is None or value is False or value == []:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name.replace('_', '-')}", *(shlex.quote(str(item)) for item in values)]
    return " ".join(words)


def _length(record: Record) -> str:
    if record.is_race:
        unit = "CPU-seconds" if record.environment["device"] == "cpu" else "seconds"
        return f"{record.arguments['race']:g} {unit} of training per model"
    steps, budget = record.arguments["steps"], record.arguments["budget"]
    return f"{steps} steps per model" if budget is None else f"{budget:g} s of training per model"


def _rest(environment: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in environment.items() if name != "versions"}


def _section(record: Record, folder: Folder, dataset: DatasetSummary) -> str:
    parts = [
        f"<h2>{escape(dataset.name)}</h2>",
        f'<p class="caption">{escape(caption(dataset))}. Source: {escape(dataset.source)}. '
        f"{escape(' '.join(dataset.notes))}</p>",
        f"<p><strong>{escape(verdict(record, folder, dataset.name))}</strong></p>",
        table(columns_for(record, dataset), rows_of(record, dataset.name)),
        _published(dataset),
        _failures(record, dataset),
        *(
            f'<p class="caption">{escape(line)}</p>'
            for say in (early_stops, captures)
            for line in say(record, dataset.name)
        ),
        *_pictures(record, folder, dataset),
    ]
    return "\n".join(parts)


def _published(dataset: DatasetSummary) -> str:
    """Render what papers report for these rows."""
    rows = published.beside(dataset.name, dataset.notes)
    caption = f'<p class="caption">{escape(published.TABLE_CAPTION)}</p>'
    return caption + table(published.TABLE_COLUMNS, rows) if rows else ""


def table(columns: Sequence[Column[R]], rows: Sequence[R]) -> str:
    """Render rows and columns, the best of each column in bold."""
    head = "".join(f"<th>{_lines(c.title)}</th>" for c in columns)
    winners = [best(rows, column) for column in columns]
    body = "".join(
        "<tr>"
        + "".join(
            _cell(column.text(row), row.model in models)
            for column, models in zip(columns, winners, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _cell(text: str, is_best: bool) -> str:
    return f"<td{' class=best' if is_best else ''}>{_lines(text)}</td>"


def _lines(text: str) -> str:
    return escape(text).replace("\n", "<br>")


def _failures(record: Record, dataset: DatasetSummary) -> str:
    return "".join(
        f'<p class="failed">{escape(row.model)} failed: {escape(failure)}</p>'
        for row in rows_of(record, dataset.name)
        for failure in row.failures
    )


def _pictures(record: Record, folder: Folder, dataset: DatasetSummary) -> list[str]:
    models = dict.fromkeys(result.model for result in record.of(dataset.name))
    kinds = ("samples", "reconstructions")
    parts = [
        (dataset.name, "bars"),
        (dataset.name, "race"),
        (dataset.name,),
        *((dataset.name, model, kind) for model in models for kind in kinds),
    ]
    return [_picture(folder, each) for each in parts if folder.picture(*each).exists()]


def _picture(folder: Folder, parts: tuple[str, ...]) -> str:
    return f"<figure>{embed(folder.picture(*parts).read_bytes(), ' '.join(parts))}</figure>"


def embed(png: bytes, name: str) -> str:
    """Return a picture as an element that needs no other file."""
    content = base64.b64encode(png).decode()
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{content}">'


def _glossary(record: Record) -> str:
    columns = {c.title: c for dataset in record.datasets for c in columns_for(record, dataset)}
    return glossary(list(columns.values()))


def glossary(columns: Sequence[Column[R]]) -> str:
    """Render what each column means."""
    return "".join(
        f"<dt>{escape(_one_line(column.title))}</dt><dd>{escape(column.help)}</dd>"
        for column in columns
    )


def _one_line(title: str) -> str:
    return title.replace("-\n", "").replace("\n", " ")


def pairs(values: dict[str, object]) -> str:
    """Render the rows of a table of names and values."""
    return "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(_plain(value))}</td></tr>"
        for name, value in values.items()
        if value is not None
    )


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
