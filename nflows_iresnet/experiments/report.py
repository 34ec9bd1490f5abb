"""Reports: report.html, in one file that needs nothing else, and race.md."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from nflows_iresnet.datasets.tables import COMPARABLE
from nflows_iresnet.experiments import published
from nflows_iresnet.experiments.config import flag
from nflows_iresnet.experiments.evaluation import MEMORY_MEASURE
from nflows_iresnet.experiments.folder import Folder
from nflows_iresnet.experiments.record import DatasetSummary, Record
from nflows_iresnet.experiments.tables import (
    Column,
    caption,
    captures,
    cells,
    columns_for,
    early_stops,
    markdown,
    rates_tried,
    rows_of,
    verdict,
)
from nflows_iresnet.files import write_atomically

_FAIRNESS = (
    "Every model sees the same splits and the same batches in the same order, has the parameter "
    "count of ResidualFlow within 10%, or as near as a flow on flattened images comes (its width "
    "is chosen for that; masked weights count), and is "
    "trained by Adam with the same cosine schedule after a short rise and the same gradient "
    "clipping, at the same learning rate unless several were tried on the validation rows. What is "
    "validated and tested is the moving average of the weights; training stops when the validation "
    "NLL has not fallen for a while, and the state with the best one, the dot on a learning curve, "
    "is kept. The test rows select nothing. The best value of a column is bold. "
)
_ROWS = "Validation and test likelihoods are exact for every model. "
_QUANTISED = (
    "Rows that were quantised get fresh uniform noise in each training batch, the same for every "
    "model, and fixed noise in tests. "
)
_IMAGES = (
    "Images are dequantised with fresh uniform noise in training, the same for every model, and "
    "with fixed noise in tests. "
    "Coupling flows and their log-determinants are exact. Residual flows are validated by their "
    "unbiased estimator, also where they are trained by a truncated series, and may start from "
    "training images; on the test images they are exact, or estimated where the table says so, "
    "and then compared with the exact value on the first of them. "
)
_PUBLISHED = (
    Column[published.PublishedNLL]("published\nmodel", "Its name there.", lambda row: row.model),
    Column[published.PublishedNLL]("test NLL\n(nats)", "As published.", lambda row: row.text),
    Column[published.PublishedNLL]("paper", "Where it was published.", lambda row: row.paper),
)


@dataclass(frozen=True)
class Section:
    """A part of a page, whose pieces are shown in this order; what is empty is left out.

    Args:
        tables: of each its columns, its rows, and what is said above it.
        pictures: of each its name, the content of the PNG, and what is said below it.
    """

    title: str = ""
    caption: str = ""
    verdict: str = ""
    tables: Sequence[tuple[Sequence[Column[Any]], Sequence[Any], str]] = ()
    failures: Sequence[str] = ()
    notes: Sequence[str] = ()
    pictures: Sequence[tuple[str, bytes, str]] = ()


@dataclass(frozen=True)
class Page:
    """A page of HTML that needs no other file.

    Args:
        title: of the window.
        run: a record or a dictionary with `started`, `environment` and `arguments`.
        command: the command line that repeats the run.
        meta: what else is said below the heading.
        glossary: columns to explain.
        explanation: what is said below the glossary.
        numbers: the file that holds every number.
    """

    title: str
    heading: str
    sections: Sequence[Section]
    run: Any
    command: str
    meta: Sequence[str] = ()
    glossary: Sequence[Column[Any]] = ()
    explanation: str = ""
    numbers: str = "results.json"

    def render(self) -> str:
        """Return the page; every text is escaped."""
        templates = jinja2.Environment(
            loader=jinja2.PackageLoader("nflows_iresnet.experiments", ""),
            autoescape=True,
            trim_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        templates.filters |= {
            "base64": lambda png: base64.b64encode(png).decode(),
            "lines": lambda text: Markup("<br>").join(text.split("\n")),
        }
        return templates.get_template("report.html.jinja").render(
            **vars(self), cells=cells, used=_used
        )


def render(record: Record, folder: Folder) -> str:
    """Render the page of a comparison from the record, the arrays and the pictures of a folder."""
    names = ", ".join(dataset.name for dataset in record.datasets)
    columns = {c.title: c for dataset in record.datasets for c in columns_for(record, dataset)}
    likelihoods = _IMAGES
    if all(dataset.shape is None for dataset in record.datasets):
        levels = any(dataset.levels is not None for dataset in record.datasets)
        likelihoods = _ROWS + _QUANTISED * levels
    memory = f"Memory counts {MEMORY_MEASURE[record.environment['device']]}."
    return Page(
        f"nflows-iresnet {record.command}: {names}",
        f"Flows compared on {names}",
        [_section(record, folder, dataset) for dataset in record.datasets],
        record,
        command_line(record),
        meta=[_length(record), f"seed {record.arguments['seed']}"],
        glossary=list(columns.values()),
        explanation=_FAIRNESS + likelihoods + memory,
    ).render()


def _section(record: Record, folder: Folder, dataset: DatasetSummary) -> Section:
    rows = rows_of(record, dataset.name)
    is_published = COMPARABLE in dataset.notes
    papers = published.table_nlls(dataset.name) if is_published else []
    measured = (columns_for(record, dataset), rows, "")
    return Section(
        dataset.name,
        " ".join([f"{caption(dataset)}. Source: {dataset.source}.", *_sentences(dataset)]),
        verdict(record, folder, dataset.name),
        [measured, *([(_PUBLISHED, papers, published.TABLE_CAPTION)] if papers else [])],
        failures=[f"{row.model} failed: {text}" for row in rows for text in row.failures],
        notes=[
            *rates_tried(record, dataset.name),
            *early_stops(record, dataset.name),
            *captures(record, dataset.name),
        ],
        pictures=list(_pictures(record, folder, dataset.name)),
    )


def _sentences(dataset: DatasetSummary) -> list[str]:
    return [f"{note[0].upper()}{note[1:].rstrip('.')}." for note in dataset.notes]


def _pictures(record: Record, folder: Folder, dataset: str) -> Iterator[tuple[str, bytes, str]]:
    models = dict.fromkeys(result.model for result in record.of(dataset))
    kinds = ("samples", "reconstructions")
    of_models = ((dataset, model, kind) for model in models for kind in kinds)
    for parts in ((dataset, "bars"), (dataset, "race"), (dataset,), *of_models):
        path = folder.picture(*parts)
        if path.exists():
            yield " ".join(parts), path.read_bytes(), ""


def command_line(record: Record) -> str:
    """Return the command that repeats a comparison."""
    arguments = dict(record.arguments)
    return command_of(record.command, arguments.pop("datasets"), arguments)


def command_of(command: str, words: Sequence[str], options: Mapping[str, Any]) -> str:
    """Return a command line; an option that is None, False, empty or not used is left out."""
    line = [f"nflows-iresnet {command}", *map(shlex.quote, words)]
    for name, value in _used(options).items():
        if value is None or value is False or value == []:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        line += [flag(name), *(shlex.quote(str(item)) for item in values)]
    return " ".join(line)


def _used(options: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the one learning rate where several were tried."""
    is_tuned = bool(options.get("learning_rates"))
    return {name: options[name] for name in options if not (is_tuned and name == "learning_rate")}


def _length(record: Record) -> str:
    if record.is_race:
        return f"{_race_time(record)} per model"
    steps, budget = record.arguments["steps"], record.arguments["budget"]
    return f"{steps} steps per model" if budget is None else f"{budget:g} s of training per model"


def _race_time(record: Record) -> str:
    unit = "CPU-seconds" if record.environment["device"] == "cpu" else "seconds"
    return f"{record.arguments['race']:g} {unit} of training"


# --- races ----------------------------------------------------------------------------------------


def write_race(record: Record, folder: Folder, dataset: DatasetSummary) -> None:
    """Write what is known after a run on a data set, so that nothing waits for the last one."""
    from nflows_iresnet.experiments.pictures import draw_race

    write_atomically(folder.path / "race.md", render_race(record).encode())
    if any(result.training is not None for result in record.of(dataset.name)):
        write_atomically(folder.picture(dataset.name, "race"), draw_race(record, dataset))


def render_race(record: Record) -> str:
    """Return the tables of all data sets, in Markdown."""
    parts = [f"# {_race_time(record)} for every model", _conditions(record)]
    for dataset in record.datasets:
        rows = rows_of(record, dataset.name)
        parts.append(" ".join([f"## {dataset.name}\n\n{caption(dataset)}.", *_sentences(dataset)]))
        parts.append(markdown(columns_for(record, dataset), rows) if rows else "Nothing yet.")
        parts += [f"{row.model} failed: {text}" for row in rows for text in row.failures]
        about, *tried = rates_tried(record, dataset.name) or [""]
        parts += [about, "\n".join(tried)] if tried else []
    return "\n\n".join(parts) + "\n"


def _conditions(record: Record) -> str:
    return (
        f"{record.started}, {record.environment['device_name']}, torch "
        f"{record.environment['versions']['torch']}, {record.arguments['threads']} thread(s), "
        f"batches of {record.arguments['batch_size']}, {record.arguments['repeats']} seed(s). "
        "Validation and the start from training rows are not counted; states and learning rates "
        "are chosen on the validation rows alone."
    )
