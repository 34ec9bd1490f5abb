"""One thread: the networks here are tiny, and threads that wait for each other take longer."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
