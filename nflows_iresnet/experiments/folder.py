"""The folder that a command writes into, and goes on from."""

from __future__ import annotations

import io
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from nflows_iresnet.experiments.config import flag, slug
from nflows_iresnet.experiments.evaluation import Array
from nflows_iresnet.experiments.record import Record, Result, RunRecord
from nflows_iresnet.files import WriteError, moved_away, write_atomically

Loaded = TypeVar("Loaded")
Key = tuple[str | int, ...]
"""Data set, model and repeat of a run, and what else tells it apart; or a data set alone."""


def prepare_folder(path: Path) -> None:
    """Make a folder and prove that it can be written.

    Raises:
        ValueError: it cannot.
    """
    probe = path / ".probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write to the output folder {str(path)!r} ({error.strerror}): "
            "choose another one with --out"
        ) from error


@dataclass(frozen=True)
class Folder:
    """The output folder of a run.

    results.json and results.csv, runs/*.npz and runs/*.pt under way, weights/*.pt, tensorboard/,
    *.png and report.html. A race adds race.md.
    """

    path: Path

    @property
    def results(self) -> Path:
        """The file that everything else can be rendered from."""
        return self.path / "results.json"

    def refuse_obstacles(self, files: Iterable[str], folders: Iterable[str] = ()) -> None:
        """Make sure that nothing is in the way of what is written at the end.

        Args:
            files: names of those that are written.
            folders: likewise.

        Raises:
            ValueError: a folder lies where a file is to be, or a file where a folder is.
        """
        for path in map(self.path.joinpath, files):
            if path.is_dir():
                raise _in_the_way(path, "folder", "file")
        for path in map(self.path.joinpath, folders):
            if path.is_file():
                raise _in_the_way(path, "file", "folder")

    def create(self) -> None:
        """Make the folder and prove that it can be written.

        Raises:
            ValueError: it cannot.
        """
        prepare_folder(self.path / "runs")

    def refuse_results(self, from_json: Callable[[str], object]) -> None:
        """Make sure that no results are overwritten.

        Args:
            from_json: rebuilds a record that could be gone on with.

        Raises:
            ValueError: the folder holds some; the message says how to go on.
        """
        if os.path.exists(self.results):
            self._read(from_json, f"{str(self.results)!r} is in the way")
            raise ValueError(
                f"{str(self.path)!r} already holds results: add --resume to go on with them, "
                "or choose another --out"
            )

    def check_same(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        """Make sure that a run goes on as it began.

        Args:
            then: choices by name, as the folder has them.
            now: as they are asked for.

        Raises:
            ValueError: one differs; the message names it.
        """
        for name in {**then, **now}:
            if then.get(name) != now.get(name):
                raise ValueError(
                    f"cannot resume {str(self.path)!r}: {name} was {_shown(then.get(name))} "
                    f"there and is {_shown(now.get(name))} now; use the same, or another --out"
                )

    def save_record(self, record: RunRecord) -> None:
        """Write results.json, and of a comparison results.csv."""
        write_atomically(self.results, record.as_json().encode())
        if isinstance(record, Record):
            write_atomically(self.path / "results.csv", record.as_csv().encode())

    def load(self, from_json: Callable[[str], Loaded]) -> Loaded:
        """Read results.json.

        Args:
            from_json: rebuilds the record that it holds.

        Raises:
            ValueError: it is not there or not readable.
        """
        return self._read(from_json, f"cannot resume from {str(self.results)!r}")

    def _read(self, from_json: Callable[[str], Loaded], complaint: str) -> Loaded:
        try:
            return from_json(self.results.read_bytes().decode())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{complaint}: there is none; start anew without --resume") from error
        except Exception as error:  # a damaged file may raise anything
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ValueError(
                f"{complaint}: {reason}; choose another --out, or move it away "
                f"({moved_away(self.results)}) and start anew without --resume"
            ) from error

    def arrays(self, key: Key) -> Path:
        """Return the path of the arrays of a run, or of a data set."""
        return self.path / "runs" / f"{_name(key)}.npz"

    def save_arrays(self, key: Key, arrays: dict[str, Array]) -> None:
        """Write the arrays of one run, or of one data set."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        write_atomically(self.arrays(key), buffer.getvalue())

    def load_arrays(self, key: Key) -> dict[str, Array]:
        """Read what `save_arrays` wrote; empty if there is nothing.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.arrays(key)
        if not path.exists():
            return {}
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:  # a damaged file may raise anything
            raise ValueError(
                f"{str(path)!r} is damaged; delete it (rm {shlex.quote(str(path))}) to go on "
                "without the pictures that it is for"
            ) from error

    def save_weights(self, key: Key, content: bytes) -> None:
        """Write the trained weights of one run, as `saved.pack` returns them."""
        path = self.weights(key)
        try:
            path.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise WriteError(f"cannot make {str(path.parent)!r}: {error.strerror}") from error
        write_atomically(path, content)

    def weights(self, key: Key) -> Path:
        """Return the path of the trained weights of a run."""
        return self.path / "weights" / f"{_name(key)}.pt"

    def write_scalars(self, result: Result) -> None:
        """Write the learning curve of a finished run for TensorBoard, where that is installed.

        It is a convenience: whatever is wrong with TensorBoard, the run is kept without it.
        """
        log = self.path / "tensorboard" / _name(result.key)
        with suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(log, ignore_errors=True)
            with SummaryWriter(str(log)) as writer:
                for point in result.training.curve if result.training else ():
                    for name in ("train", "validation"):
                        value = getattr(point, name)
                        writer.add_scalar(f"nll/{name}", value, point.step)

    def picture(self, *parts: str) -> Path:
        """Return the path of a picture: of a data set, or of a model on it."""
        return self.path / f"{_name(parts)}.png"

    def checkpoint(self, key: Key) -> Path:
        """Return the path of the checkpoint of a run under way."""
        return self.arrays(key).with_suffix(".pt")

    def kept(self, done: int, total: int, pending: Iterable[Key]) -> str:
        """Say what a later run need not do again.

        Args:
            done: finished runs.
            total: all runs.
            pending: keys of those without a result, which may have a checkpoint.
        """
        saved = [str(path) for key in pending if (path := self.checkpoint(key)).exists()]
        under_way = f", and {len(saved)} under way up to their last checkpoints (in runs)"
        if len(saved) < 2:
            one = ", and the one under way up to its last checkpoint ({})"
            under_way = one.format(*saved) if saved else ""
        return f"{done} of {total} runs are kept in {self.path}{under_way}"

    def resume(self, command_line: str) -> str:
        """Return the command that goes on with the one that filled the folder."""
        return f"{command_line} --out {shlex.quote(str(self.path))} --resume"


def _in_the_way(path: Path, found: str, wanted: str) -> ValueError:
    return ValueError(
        f"{str(path)!r} is a {found}, and a {wanted} of that name is to be written: move it away "
        f"({moved_away(path)}), or choose another --out"
    )


def flags(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments by the names that they have on the command line."""
    return {flag(name): value for name, value in arguments.items()}


def _name(key: Key) -> str:
    return "--".join(slug(str(part)) for part in key)


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
