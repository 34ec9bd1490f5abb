"""`nflows-iresnet table1`: its arguments, and the run."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from nflows_iresnet import datasets
from nflows_iresnet.compare import interruption, published
from nflows_iresnet.compare.arguments import natural_int, positive_float, positive_int
from nflows_iresnet.compare.checkpoints import CheckpointError, Keeper
from nflows_iresnet.compare.config import TRAINING_PRECISIONS, UsageError, resolve_device
from nflows_iresnet.compare.environment import check_extra, describe_environment
from nflows_iresnet.compare.files import WriteError, describe_os_error, write_atomically
from nflows_iresnet.compare.results import Folder, flags
from nflows_iresnet.compare.table1.models import Contestant, contestants
from nflows_iresnet.compare.table1.record import DataSummary, Outcome, Record
from nflows_iresnet.compare.table1.settings import DEFAULT_COEFFS, QUICK, TUNED, Settings
from nflows_iresnet.compare.table1.work import execute
from nflows_iresnet.datasets import ImageDataset

HELP = "Test errors of invertible classifiers for five bounds, a free one and a ResNet."
_ROWS = "\n".join(f"  {each.name:10}{each.description}" for each in contestants(DEFAULT_COEFFS))
EPILOG = f"""\
rows:
{_ROWS}

examples:
  nflows-iresnet table1                                   digits, minutes on a CPU
  nflows-iresnet table1 --quick                           does it run? half a minute
  nflows-iresnet table1 mnist --data-dir data --device cuda       five minutes on a GPU
  nflows-iresnet table1 fashion-mnist --num-train 6000 --num-scales 2 --repeats 1
  nflows-iresnet table1 cifar10 --data-dir data --device cuda --num-scales 2 --num-blocks 8 \\
      --padding 5 --hidden-channels 64 --steps 40000 --repeats 1
  nflows-iresnet table1 --out here --resume               go on after an interruption

"guaranteed inverse" is read off the certified bound of the trained weights. The published columns
are what the i-ResNet paper reports: hundreds of layers. mnist has a size and a training time of its
own: five minutes for all rows on a GPU, two, and the tests, on a CPU. On a GPU a training step is
one CUDA graph where that can be, and it is said where it cannot. The exit status is 0 when the
table is complete (a row that fails is a result), 1 when a file cannot be written, 2 for arguments
or data that cannot work, 130 after Ctrl-C, which saves the training under way at the end of its
step; again, it stops at once.
"""
_NUMBERS: dict[str, tuple[Any, str]] = {
    "repeats": (positive_int, "train each model R times: seeds and splits S, S+1, ..."),
    "seed": (natural_int, "of splits, weights and batches"),
    "batch_size": (positive_int, "images per step"),
    "learning_rate": (positive_float, "of Adam, annealed to zero by a cosine"),
    "hidden_channels": (positive_int, "channels of the hidden layers of each branch g"),
    "num_blocks": (positive_int, "residual blocks per scale"),
    "num_scales": (positive_int, "how often the images are squeezed"),
    "padding": (natural_int, "channels of zeros that are appended to the images"),
    "num_train": (positive_int, "training images to keep"),
    "shift": (natural_int, "largest random shift of training images, in pixels"),
    "threads": (positive_int, "CPU threads"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    defaults = Settings()
    parser.add_argument(
        "dataset",
        nargs="?",
        default=defaults.dataset,
        metavar="DATASET",
        help=f"{', '.join(datasets.available_images())} (default: {defaults.dataset})",
    )
    parser.add_argument(
        "--coeffs",
        nargs="+",
        type=positive_float,
        metavar="C",
        help=f"bounds of Lip(g) (default: {' '.join(map(str, DEFAULT_COEFFS))})",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--steps",
        type=positive_int,
        metavar="X",
        help=f"optimiser steps per model (default: {defaults.steps}; mnist: a time)",
    )
    length.add_argument(
        "--budget", type=positive_float, metavar="SECONDS", help="training time per model instead"
    )
    length.add_argument("--minutes", type=positive_float, metavar="X", help="--budget in minutes")
    for name, (kind, text) in _NUMBERS.items():
        default = getattr(defaults, name)
        shown = "all" if default is None else default
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, metavar="X", help=f"{text} (default: {shown})")
    parser.add_argument("--data-dir", metavar="DIR", help="folder that holds the data sets")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--training-precision",
        choices=TRAINING_PRECISIONS,
        help="tf32 allows TensorFloat-32 in training steps on a GPU, never in examinations "
        "(default: float32)",
    )
    parser.add_argument("--quick", action="store_true", help="few steps of a small table")
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="folder for results.json, table1.png and report.html (default: results/table1-TIME)",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what is finished in --out and do the rest"
    )
    parser.add_argument("--quiet", action="store_true", help="print only the path of the report")


def to_settings(parsed: argparse.Namespace) -> Settings:
    """Turn parsed arguments into settings.

    Raises:
        ValueError: a value cannot work.
    """
    given = {field.name: getattr(parsed, field.name) for field in fields(Settings)}
    if parsed.minutes is not None:
        given["budget"] = 60 * parsed.minutes
    device = resolve_device(parsed.device)
    defaults = dict(TUNED.get(parsed.dataset, {}).get(device, {}))
    if parsed.quick:
        defaults |= QUICK
    if given["budget"] is not None or given["steps"] is not None:
        defaults |= {"steps": None, "budget": None}
    chosen = defaults | {name: value for name, value in given.items() if value is not None}
    coeffs = tuple(dict.fromkeys(chosen.pop("coeffs", DEFAULT_COEFFS)))
    return Settings(**{**chosen, "coeffs": coeffs, "device": device})


def run(parsed: argparse.Namespace) -> int:
    """Run the subcommand and return the exit status.

    Raises:
        UsageError: arguments or data cannot work; nothing was written.
    """
    try:
        session = _Session(parsed)
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(describe_os_error(error)) from error
    torch.set_num_threads(session.settings.threads)
    try:
        session.work()
    except KeyboardInterrupt:
        print(f"interrupted: {session.kept()}\ngo on with: {session.resume()}", file=sys.stderr)
        return interruption.STATUS
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    except WriteError as error:
        raise WriteError(f"{error}; {session.kept()}; go on with: {session.resume()}") from error
    return 0


class _Session:
    """A table under way."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        check_extra()
        if parsed.resume and parsed.out is None:
            raise ValueError("--resume needs the --out folder of the run to go on with")
        self.quiet: bool = parsed.quiet
        self.settings = to_settings(parsed)
        self.data = [_load(self.settings, repeat) for repeat in range(self.settings.repeats)]
        self.contestants = contestants(self.settings.coeffs)
        self.folder = Folder(Path(parsed.out or f"results/table1-{datetime.now():%Y%m%d-%H%M%S}"))
        self.record = self._fresh()
        if parsed.resume:
            self.record = _resumed(self.folder, self.record)
        else:
            self.folder.refuse_results(Record.from_json)
        _check_sizes(self.contestants, self.data[0], self.settings)
        keepers = [self._keeper(*run) for run in self._pending]
        if parsed.resume:
            for keeper in keepers:
                keeper.load()
        self.folder.create()
        self._save(self.record)
        if not parsed.resume:
            for keeper in keepers:
                keeper.discard()

    def _fresh(self) -> Record:
        return Record(
            arguments=self.settings.as_json(),
            environment=describe_environment(self.settings.device),
            started=datetime.now().astimezone().isoformat(timespec="seconds"),
            data=_summarise(self.data),
            published=published.CLASSIFICATION_ERROR,
        )

    @property
    def _runs(self) -> list[tuple[Contestant, int]]:
        return [
            (each, repeat) for each in self.contestants for repeat in range(self.settings.repeats)
        ]

    @property
    def _pending(self) -> list[tuple[Contestant, int]]:
        finished = {outcome.key for outcome in self.record.outcomes}
        return [run for run in self._runs if (run[0].name, run[1]) not in finished]

    def kept(self) -> str:
        """Say what a later run need not do again."""
        pending = ((contestant.name, repeat) for contestant, repeat in self._pending)
        return self.folder.kept(len(self.record.outcomes), len(self._runs), pending)

    def resume(self) -> str:
        """Return the command that goes on."""
        from nflows_iresnet.compare.table1.report import command_line

        return self.folder.resume(command_line(self.record))

    def work(self) -> None:
        """Do what is not done yet, save after each classifier, and show the table."""
        from nflows_iresnet.compare.progress import LiveProgress

        pending, total = self._pending, len(self._runs)
        with LiveProgress(total, total - len(pending), quiet=self.quiet) as progress:
            for contestant, repeat in pending:
                progress.begin(f"{contestant.name} · repeat {repeat + 1}")
                keeper = self._keeper(contestant, repeat)
                data = self.data[repeat]
                outcome = execute(contestant, repeat, data, self.settings, progress.step, keeper)
                self._save(self.record.adding(outcome))
                keeper.discard()
                progress.finish(_line(outcome))
        self._show()

    def _keeper(self, contestant: Contestant, repeat: int) -> Keeper:
        key = (contestant.name, repeat)
        return Keeper(self.folder.checkpoint(key), [self.settings.as_json(), *key])

    def _save(self, record: Record) -> None:
        write_atomically(self.folder.results, record.as_json().encode())
        self.record = record

    def _show(self) -> None:
        from nflows_iresnet.compare.table1 import picture, report, table
        from nflows_iresnet.compare.tables import make_console, print_grid

        image = picture.draw(self.record)
        write_atomically(self.folder.path / "table1.png", image)
        page = self.folder.path / "report.html"
        write_atomically(page, report.render(self.record, image).encode())
        if self.quiet:
            print(page)
            return
        console = make_console(width=140)
        console.print(f"\n[bold]{self.record.data.name}[/]: {report.caption(self.record)}")
        print_grid(console, table.columns_for(self.record), self.record.rows())
        for line in self.record.captures():
            console.print(line, style="yellow", markup=False)
        for row in self.record.rows():
            for failure in row.failures:
                console.print(f"{row.model} FAILED {failure}", style="red", markup=False)
        print(f"\nreport: {page}")


def _load(settings: Settings, repeat: int) -> ImageDataset:
    return datasets.load_images(
        settings.dataset, settings.data_dir, settings.seed + repeat, settings.num_train
    )


def _check_sizes(rows: list[Contestant], data: ImageDataset, settings: Settings) -> None:
    """Build every classifier once, so that impossible sizes are said before anything is trained."""
    from nflows_iresnet.compare.table1.models import Size

    for row in rows:
        row.build(Size(data.shape, data.num_classes, data.levels, settings))


def _summarise(data: list[ImageDataset]) -> DataSummary:
    first = data[0]
    tests = torch.cat([each.test for each in data]).flatten(start_dim=1)
    return DataSummary(
        name=first.name,
        source=first.source,
        split=first.split,
        shape=first.shape,
        levels=first.levels,
        num_classes=first.num_classes,
        num_train=len(first.train),
        num_test=len(first.test),
        num_distinct=len(torch.unique(tests, dim=0)),
    )


def _resumed(folder: Folder, now: Record) -> Record:
    then = folder.load(Record.from_json)
    folder.check_same(flags(then.arguments), flags(now.arguments))
    return then


def _line(outcome: Outcome) -> str:
    label = f"{outcome.model} · repeat {outcome.repeat + 1}: "
    if outcome.failure is not None:
        return f"{label}FAILED {outcome.failure}"
    reason = outcome.capture_reason
    eager = "" if reason is None else f"; steps not captured: {reason}"
    return f"{label}{outcome.num_wrong} of {outcome.num_test} test images wrong{eager}"
