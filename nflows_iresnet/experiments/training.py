"""The library's training loop, as commands run it: with checkpoints, and Ctrl-C after a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor
from torch.nn.parameter import Parameter

from nflows_iresnet.experiments.checkpoints import Keeper
from nflows_iresnet.experiments.interruption import Postponed
from nflows_iresnet.training import (
    Batches,
    History,
    Interruption,
    Training,
    TrainingPlan,
    run,
)


class Trainable(Protocol):
    """What the loop asks of a model."""

    def log_prob(self, inputs: Tensor, /) -> Tensor:
        """Log-density in nats, (B, d) -> (B,), whose mean is maximised."""

    def parameters(self) -> Iterator[Parameter]:
        """Everything the optimiser trains."""

    def train(self, mode: bool = True) -> object:
        """Switch between training and evaluation."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that has to be restored."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> object:
        """Restore it."""

    def after_step(self) -> None:
        """Run after each optimiser step."""


def train(
    model: Trainable,
    stream: Batches,
    validate: Callable[[], float],
    plan: TrainingPlan,
    on_step: Callable[[float, float], None] = lambda done, loss: None,
    keeper: Keeper | None = None,
    interruption: Interruption | None = None,
) -> History:
    """Maximise the log-density of a stream of batches and restore the best state.

    Args:
        model: the model; trained in place.
        stream: batches (B, *), for ever.
        validate: returns the NLL of the validation rows in nats; it must leave the global
            generators as they were.
        plan: how to train.
        on_step: called after each step with the fraction done and the loss in nats.
        keeper: keeps checkpoints, and holds the one to go on from, if there is one: the training
            then goes on exactly as if it had not been interrupted (bit for bit on a CPU).
        interruption: what asks for the end after a step; by default, with a keeper, Ctrl-C.

    Returns:
        The log of the training.

    Raises:
        TrainingDivergedError: a loss, or every validation, was not finite.
        CheckpointError: the checkpoint is damaged or of another run.
        WriteError: a checkpoint cannot be written.
        KeyboardInterrupt: Ctrl-C was pressed; with a keeper, there is a checkpoint of the step that
            was under way.
    """
    training = Training(model, stream, plan, validate, after_step=model.after_step)
    if interruption is None and keeper is not None:
        interruption = Postponed()
    return run(training, on_step, keeper, interruption)
