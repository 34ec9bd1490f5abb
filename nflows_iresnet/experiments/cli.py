"""The command `nflows-iresnet`, which can be interrupted at any moment.

What takes time to import is imported by `main`, after it has taken over Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys

from nflows_iresnet.interruption import (
    BEFORE_TRAINING,
    ENDINGS,
    EndsTheProcess,
    TerminatedLikeInterrupted,
    exit_status,
)

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
        data that cannot work, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with TerminatedLikeInterrupted():
            status = _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print(BEFORE_TRAINING, file=sys.stderr)
        status = exit_status()
    except SystemExit:
        status = 0
        if argv is not None:
            raise
    if argv is None:
        _settle(status)
    return status


def _run(argv: Sequence[str]) -> int:
    with EndsTheProcess():
        from contextlib import suppress

        from nflows_iresnet.experiments import options
        from nflows_iresnet.experiments.config import UsageError, check_extra
        from nflows_iresnet.files import describe_os_error
    try:
        with EndsTheProcess():
            parsed = options.parse(argv)
            command = options.COMMANDS[argv[0]]
            if parsed.list:
                with suppress(BrokenPipeError):  # who reads no further, as `head`, has seen enough
                    print(command.catalogue(), flush=True)
                return 0
            check_extra()
            from importlib import import_module

            module = import_module(command.module)
        status: int = module.run(parsed)
        sys.stdout.flush()
        return status
    except UsageError as error:
        return _refuse(str(error), status=2)
    except OSError as error:
        return _refuse(describe_os_error(error), status=1)


def _refuse(message: str, status: int) -> int:
    print(f"nflows-iresnet: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _settle(status: int) -> None:
    """Let neither Ctrl-C nor what cannot be printed change the status of the process.

    An interpreter in which Ctrl-C hit the start of a compiled module would end by the signal
    itself, so that an interrupted process is left here.
    """
    for number in ENDINGS:
        signal.signal(number, signal.SIG_IGN)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if status == exit_status():
        os._exit(status)
