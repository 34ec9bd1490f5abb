"""The command `nflows-iresnet`, which can be interrupted at any moment.

What takes time to import is imported by `main`, after it has taken over Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys

from nflows_iresnet.experiments.interruption import BEFORE_TRAINING, STATUS, EndsTheProcess

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments; those of the process by default, whose end it then is: Ctrl-C no longer
            counts once the status is known.

    Returns:
        0 if the command did its work, 1 if a file could not be written or read, 2 for arguments or
        data that cannot work, 130 after Ctrl-C.
    """
    try:
        with EndsTheProcess():
            from nflows_iresnet.experiments import subcommands
        status = subcommands.run(argv)
    except KeyboardInterrupt:
        print(BEFORE_TRAINING, file=sys.stderr)
        status = STATUS
    if argv is None:
        _settle(status)
    return status


def _settle(status: int) -> None:
    """Let neither Ctrl-C nor what cannot be printed change the status of the process.

    An interpreter in which Ctrl-C hit the start of a compiled module would end by the signal
    itself, so that an interrupted process is left here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if status == STATUS:
        os._exit(status)
