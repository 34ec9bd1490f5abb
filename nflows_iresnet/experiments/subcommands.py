"""The subcommands of `nflows-iresnet`, and what is said when they cannot do their work."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from nflows_iresnet import __version__
from nflows_iresnet.experiments import arguments, compare
from nflows_iresnet.experiments.bench import arguments as bench_arguments
from nflows_iresnet.experiments.bench import command as bench_command
from nflows_iresnet.experiments.config import UsageError
from nflows_iresnet.experiments.figures import arguments as figures_arguments
from nflows_iresnet.experiments.figures import command as figures_command
from nflows_iresnet.experiments.files import describe_os_error
from nflows_iresnet.experiments.presets import COMPARE, TABLE2, Preset
from nflows_iresnet.experiments.table1 import arguments as table1_arguments
from nflows_iresnet.experiments.table1 import command as table1_command

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
    return Command(preset.help, arguments.epilog(preset), add_arguments, compare.run)


COMMANDS: dict[str, Command] = {
    **{preset.command: _densities(preset) for preset in (COMPARE, TABLE2)},
    "table1": Command(
        table1_arguments.HELP,
        table1_arguments.EPILOG,
        table1_arguments.add_arguments,
        table1_command.run,
    ),
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


def run(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand that the arguments name.

    Args:
        argv: the arguments; those of the process by default.

    Returns:
        0 if it did its work, 1 if a file could not be written or read, 2 for arguments or data that
        cannot work.
    """
    try:
        parsed = build_parser().parse_args(argv)
        status: int = parsed.run(parsed)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _refuse(str(error), status=2)
    except OSError as error:
        return _refuse(describe_os_error(error), status=1)


def _refuse(message: str, status: int) -> int:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return status


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
