"""The library's loop, as commands run it: with checkpoints, and Ctrl-C after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nflows_iresnet.interruption import Postponed
from nflows_iresnet.training import History
from nflows_iresnet.training.checkpoints import Keeper
from nflows_iresnet.training.loop import Training, run
from nflows_iresnet.training.progress import TrainingPlan
from nflows_iresnet.training.rows import Batches


def train(
    model: Any,
    stream: Batches,
    validate: Callable[[], float],
    plan: TrainingPlan,
    on_step: Callable[[float, float], None] = lambda done, loss: None,
    keeper: Keeper | None = None,
) -> History:
    training = Training(model, stream, plan, validate, after_step=model.after_step)
    return run(training, on_step, keeper, None if keeper is None else Postponed())
