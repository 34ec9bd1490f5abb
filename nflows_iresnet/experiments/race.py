"""The outcome of a race so far: race.md, and the validation curves of each data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nflows_iresnet.experiments.cells import Column, R
from nflows_iresnet.experiments.columns import columns_for
from nflows_iresnet.experiments.files import write_atomically
from nflows_iresnet.experiments.record import DatasetSummary, Folder, Record
from nflows_iresnet.experiments.summary import caption, rows_of


def write(record: Record, folder: Folder, dataset: DatasetSummary) -> None:
    """Write what is known after a run on a data set, so that nothing waits for the last one."""
    from nflows_iresnet.experiments import plots

    write_atomically(folder.path / "race.md", render(record).encode())
    if any(result.training is not None for result in record.of(dataset.name)):
        write_atomically(folder.picture(dataset.name, "race"), plots.draw_race(record, dataset))


def render(record: Record) -> str:
    """Return the tables of all data sets, in Markdown."""
    parts = [f"# {_title(record)}", _conditions(record)]
    for dataset in record.datasets:
        rows = rows_of(record, dataset.name)
        parts.append(f"## {dataset.name}\n\n{caption(dataset)}.")
        parts.append(markdown(columns_for(record, dataset), rows) if rows else "Nothing yet.")
        parts += [f"{row.model} failed: {text}" for row in rows for text in row.failures]
        parts += _rates(record, dataset.name)
    return "\n\n".join(parts) + "\n"


def _title(record: Record) -> str:
    unit = "CPU-seconds" if record.environment["device"] == "cpu" else "seconds"
    return f"{record.arguments['race']:g} {unit} of training for every model"


def _conditions(record: Record) -> str:
    versions = record.environment["versions"]
    return (
        f"{record.started}, {record.environment['device_name']}, torch {versions['torch']}, "
        f"{record.arguments['threads']} thread(s), batches of {record.arguments['batch_size']}, "
        f"{record.arguments['repeats']} seed(s). Validation is not counted; states and learning "
        "rates are chosen on the validation rows alone."
    )


def _rates(record: Record, dataset: str) -> Iterator[str]:
    models = dict.fromkeys(each.model for each in record.trials if each.dataset == dataset)
    lines = []
    for model in models:
        trials = record.trials_of(dataset, model)
        tried = (
            f"{each.learning_rate:g}: "
            + ("failed" if each.validation is None else f"{each.validation:.3f}")
            for each in trials
        )
        lines.append(f"- {model}: {', '.join(tried)}")
    if lines:
        spent = sum(each.seconds for each in record.trials if each.dataset == dataset)
        yield (
            f"Validation NLL by learning rate, with the first seed ({spent:.0f} s in all; the best "
            "goes on as the first repeat):\n\n" + "\n".join(lines)
        )


def markdown(columns: Sequence[Column[R]], rows: Sequence[R]) -> str:
    """Render rows and columns in Markdown."""
    head = [column.title.replace("-\n", "").replace("\n", " ") for column in columns]
    body = [[column.text(row).replace("\n", " ") for column in columns] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
