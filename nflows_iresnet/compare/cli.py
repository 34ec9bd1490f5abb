"""The command `nflows-iresnet`: its subcommands and its exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from nflows_iresnet import __version__
from nflows_iresnet.compare import arguments, command
from nflows_iresnet.compare.bench import arguments as bench_arguments
from nflows_iresnet.compare.bench import command as bench_command
from nflows_iresnet.compare.config import UsageError
from nflows_iresnet.compare.figures import arguments as figures_arguments
from nflows_iresnet.compare.figures import command as figures_command
from nflows_iresnet.compare.presets import COMPARE, TABLE2, Preset
from nflows_iresnet.compare.table1 import command as table1

PROGRAM = "nflows-iresnet"


@dataclass(frozen=True)
class Command:
    """A subcommand.

    Args:
        help: one line.
        epilog: what `--help` shows after the arguments.
        add_arguments: declares its arguments.
        run: does the work and returns the exit status; UsageError is for what the user can mend.
    """

    help: str
    epilog: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def _densities(preset: Preset) -> Command:
    add_arguments = partial(arguments.add_arguments, preset=preset)
    return Command(preset.help, arguments.epilog(preset), add_arguments, command.run)


COMMANDS: dict[str, Command] = {
    **{preset.command: _densities(preset) for preset in (COMPARE, TABLE2)},
    "table1": Command(table1.HELP, table1.EPILOG, table1.add_arguments, table1.run),
    "bench": Command(
        bench_arguments.HELP,
        bench_arguments.EPILOG,
        bench_arguments.add_arguments,
        bench_command.run,
    ),
    "figures": Command(
        figures_arguments.HELP,
        figures_arguments.EPILOG,
        figures_arguments.add_arguments,
        figures_command.run,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        0 if the command did its work, 2 for arguments or data that cannot work, 130 after Ctrl-C.
    """
    try:
        parsed = build_parser().parse_args(argv)
        return parsed.run(parsed)
    except UsageError as error:
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted before anything was trained", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with all subcommands."""
    parser = _Parser(prog=PROGRAM, description="Invertible residual networks for nflows.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, entry in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=entry.help,
            description=entry.help,
            epilog=entry.epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        entry.add_arguments(subparser)
        subparser.set_defaults(run=entry.run)
    return parser


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving the process."""
        raise UsageError(f"{message} (see {self.prog} --help)")
