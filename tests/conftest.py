"""One thread: the networks here are tiny, and threads that wait for each other take longer.

And Ctrl-C as usual: a shell that starts the tests in the background lets them ignore it.
"""

from __future__ import annotations

import signal

import torch

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
