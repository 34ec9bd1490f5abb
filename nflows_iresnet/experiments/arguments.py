"""How a command line is read: dataclasses whose fields are options, and remarks on mistakes.

By argparse and not by tyro, whose errors are frames of five to fifteen lines that show the types'
repr, which takes `None` for a number and nothing for `--models`, and is missing without the extra.
Nothing here imports torch, so that a help and the remark on a mistake are there at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nflows_iresnet import __version__
from nflows_iresnet.experiments.config import UsageError, flag, suggest

PROGRAM = "nflows-iresnet"
Number = TypeVar("Number", int, float)

# --- values ---------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Parse 1, 2, 3, ..."""
    wanted = "a positive integer below 2147483648, such as 100"
    return _parse(text, int, lambda value: 0 < value < 2**31, wanted)


def natural_int(text: str) -> int:
    """Parse 0, 1, 2, ..."""
    return _parse(text, int, lambda value: 0 <= value < 2**31, "an integer from 0 to 2147483647")


def positive_float(text: str) -> float:
    """Parse a positive, finite number."""
    return _parse(text, float, lambda value: 0 < value < math.inf, "a positive number, such as 0.5")


def duration(text: str) -> float:
    """Parse a time in seconds: 150, 150s or 2.5min."""
    units = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
    number = text.strip().rstrip("acehimnst ")
    unit = units.get(text.strip()[len(number) :].strip() or "s")
    with suppress(argparse.ArgumentTypeError):
        if unit is not None:
            return unit * positive_float(number)
    raise argparse.ArgumentTypeError(f"{text!r} is not a time, such as 150s or 2.5min")


def address(text: str) -> str:
    """Parse the address of a scheduler."""
    protocol, _, place = text.partition("://")
    host, _, port = place.rpartition(":")
    if protocol and host and port.isdecimal():
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not an address, such as tcp://scheduler:8786")


def nonempty(text: str) -> str:
    """Refuse what an unset variable of a shell leaves of a name."""
    if text.strip():
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is not a name")


def one_of(*known: str) -> Callable[[str], str]:
    """Return what parses one of several words."""

    def parse(text: str) -> str:
        if text in known:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(known)}")

    return parse


def _parse(
    text: str, kind: Callable[[str], Number], accept: Callable[[Number], bool], wanted: str
) -> Number:
    with suppress(ValueError):
        value = kind(text)
        if accept(value):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")


# --- options --------------------------------------------------------------------------------------

WHAT, IMAGES = "what is done", "images"
HOW, WHERE = "how it is done", "where the results go"
_LENGTH = "length"


def option(
    text: str,
    kind: Callable[[str], object] | None = None,
    metavar: str = "N",
    *,
    group: str = WHAT,
    default: Any = None,
    many: bool = False,
    is_length: bool = False,
    known: tuple[str, Callable[[], Iterable[str]]] | None = None,
) -> Any:
    """Declare a field as an option: of a kind of values, or a flag.

    Args:
        text: what the help says.
        kind: parses a value, None for a flag.
        is_length: whether it is a length of training, of which one excludes another.
        known: what its values are the names of, and those that there are.
    """
    how: dict[str, Any] = {"type": kind, "metavar": metavar, "default": argparse.SUPPRESS}
    if kind is None:
        how, default = {"action": "store_true", "default": argparse.SUPPRESS}, False
    elif many:
        how |= {"nargs": "+", "action": "extend"}
    told = {"help": text, "group": group, "is_length": is_length, "how": how, "known": known}
    return field(default=default, metadata=told)


@dataclass(frozen=True)
class Command:
    """A command.

    Args:
        about: one line.
        module: where `run` takes the options, imports torch and does the work.
        options: without any that was given.
        closing: what the help says at its end.
        catalogue: what `--list` prints.
        words: the option that takes words without a flag, and its help.
    """

    about: str
    module: str
    options: Any
    closing: Callable[[], str]
    catalogue: Callable[[], str]
    words: tuple[str, str] | None = None


# --- command lines --------------------------------------------------------------------------------

_TYPED_DASHES = tuple("\u2010\u2011\u2012\u2013\u2014\u2212")
"""What typography makes of the hyphen, in pages from which command lines are copied."""
_FILES = (".csv", ".tsv", ".txt", ".npy", ".gz")


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def __init__(self, prog: str, about: str, closing: str) -> None:
        raw = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, description=about, epilog=closing, formatter_class=raw, allow_abbrev=False
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def refuse_option(self, word: str) -> NoReturn:
        """Raise, and say which option was probably meant, or that a file was."""
        if "=" not in word and Path(word).suffix in _FILES:
            self.error(f"unknown option {word!r}: a file of that name is {f'./{word}'!r}")
        flag = "--" + word.lstrip("-" + "".join(_TYPED_DASHES)).split("=")[0]
        known = [each for each in self._option_string_actions if each.startswith("--")]
        longer = [each for each in known if each.startswith(flag)]
        hint = suggest(flag, longer or known)
        self.error(f"unknown option {word!r}" + (f": {hint}" if hint.startswith("did") else ""))


def read_without_command(argv: Sequence[str], commands: Mapping[str, Command]) -> NoReturn:
    """Read a command line that begins with no command: it may ask for help or the version.

    Raises:
        UsageError: it does not.
        SystemExit: it does, and that is printed.
    """
    abouts = listed({name: command.about for name, command in commands.items()}, 10)
    closing = f"commands, of which each has a --help:\n{abouts}"
    parser = _Parser(PROGRAM, "Invertible residual networks for nflows.", closing)
    parser.usage = f"{PROGRAM} [-h] [--version] COMMAND ..."
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    _, rest = parser.parse_known_args(argv)
    if rest and rest[0].startswith("-"):
        parser.refuse_option(rest[0])
    parser.error(f"name a COMMAND: {', '.join(commands)}")


def read(name: str, command: Command, words: Sequence[str]) -> Any:
    """Read the words behind a command into its options.

    Raises:
        UsageError: they cannot be read; the message says what to do about it.
        SystemExit: they ask for help, which is printed.
    """
    parser = _Parser(f"{PROGRAM} {name}", command.about, command.closing())
    _declare(parser, command)
    parsed, rest = parser.parse_known_args(words)
    given: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in vars(parsed).items()
    }
    front = given.pop("WORDS", ())
    for word in (*rest, *front):
        if word[:1] in _TYPED_DASHES or (word in rest and word.startswith("-") and word != "--"):
            parser.refuse_option(word)
    found = (*front, *(word for word in rest if word != "--"))
    return replace(command.options, **{**given, **_words(parser, command, found)})


def _words(parser: _Parser, command: Command, found: tuple[str, ...]) -> dict[str, Any]:
    """Return the field that takes words without a flag; argparse leaves some behind options."""
    name = command.words[0] if command.words else ""
    many = isinstance(getattr(command.options, name, None), tuple)
    taken = len(found) if many else int(bool(name))
    if len(found) > taken:
        parser.error(f"{found[taken]!r} is one word too many")
    if not found:
        return {}
    return {name: found if many else found[0]}


def _declare(parser: _Parser, command: Command) -> None:
    if command.words is not None:
        name, text = command.words
        text = f"{text} (default: {shown(command.options.default_of(name))})"
        parser.add_argument(
            "WORDS", nargs="*", metavar="DATASET", help=text, default=argparse.SUPPRESS
        )
    declared = [each for each in fields(command.options) if each.metadata]
    groups = {title: parser.add_argument_group(title) for title in (WHAT, IMAGES, HOW, WHERE)}
    if any(each.metadata["is_length"] for each in declared):
        groups[_LENGTH] = groups[HOW].add_mutually_exclusive_group()
    for each in declared:
        told, default = each.metadata, command.options.default_of(each.name)
        text = told["help"]
        if "(default:" not in text and default is not None and default is not False:
            text += f" (default: {shown(default)})"
        group = groups[_LENGTH if told["is_length"] else told["group"]]
        group.add_argument(flag(each.name), help=text, **told["how"])


def shown(value: object) -> str:
    """Return a default as one would type it."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


# --- names ----------------------------------------------------------------------------------------


def listed(described_names: Mapping[str, str], width: int = 32) -> str:
    """Return a line for each name."""
    return "\n".join(f"  {name:{width}}{text}".rstrip() for name, text in described_names.items())


def check_names(kind: str, names: Iterable[str] | None, known: Iterable[str]) -> None:
    """Check names of a kind, such as "model".

    Raises:
        UsageError: one is not known; the message says which was probably meant.
    """
    every = list(known)
    for name in names or ():
        if name not in every:
            raise UsageError(f"unknown {kind} {name!r}: {suggest(name, every)}")
