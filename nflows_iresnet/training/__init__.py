"""Training that stops by itself: one loop for every flow, and it knows none of them.

    history = fit(flow, train_rows, validation_rows)

`fit` is for users; commands give the same loop, `run`, their batches, checkpoints and validations.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
import zlib
from collections.abc import Callable
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nflows_iresnet.graphs import Loss, negative_log_likelihood, trainable
from nflows_iresnet.interruption import Noted
from nflows_iresnet.training.checkpoints import Keeper
from nflows_iresnet.training.loop import Training, close, options_of, run
from nflows_iresnet.training.processes import Processes, seed_generators, seeded
from nflows_iresnet.training.progress import (
    CLIP_NORM,
    CurvePoint,
    FirstOf,
    History,
    Length,
    Progress,
    Seconds,
    Steps,
    TrainingDivergedError,
    TrainingPlan,
)
from nflows_iresnet.training.rows import GivenRows, Rows, Validator
from nflows_iresnet.transforms.initialization import (
    has_begun,
    has_only_started,
    is_waiting,
    starts_from_rows,
    waits_to_be_told,
)
from nflows_iresnet.validation import validated_size

__all__ = ["CurvePoint", "History", "TrainingDivergedError", "fit"]

START_ROWS = 5_000
"""Rows that a flow is started from."""
MAX_STEPS = 5_000
_NOT_THE_PLAN = {"clock", "validates_start", "captures"}
"""What a training that goes on may have otherwise."""


def fit(
    flow: Any,
    train: Rows,
    validation: Rows | Callable[[Any], float],
    *,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    learning_rate: float = 3e-3,
    batch_size: int = 256,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    max_grad_norm: float | None = CLIP_NORM,
    warmup: float = 0.02,
    average_decay: float | None = 0.999,
    validations: int = 50,
    patience: int = 10,
    initialize: bool | None = None,
    capture: bool = True,
    seed: int | None = 0,
    after_step: Callable[[], None] = lambda: None,
    on_step: Callable[[float, float], None] | None = None,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> History:
    r"""Train a flow by maximum likelihood until it stops by itself, and leave it in its best state.

    A step minimises the mean of -log p over a batch, clips the gradient and lets the optimiser
    step. The learning rate rises over the first `warmup` of the training from a tenth, and falls by
    a cosine, r (1 + cos(pi t)) / 2, where t is the part of the steps or of the time that is done.
    What is validated and kept is a moving average of the weights: a_t = d a_{t-1} + (1 - d) w_t
    with d = min(`average_decay`, t / (t + 10)). The training ends with the steps or the time, or
    earlier: after `patience` validations without a new best. The best state is restored, which may
    be the one before the first step: a flow that was trained before does not come back worse.

    On CUDA a step is one graph where that can be (`graphs.GraphedStep`); `capture_reason` of the
    history says why not.

    **Cost.** Beside the steps: a copy of the weights for the average and one for the best state,
    and the validations, whose time does not count. Up to 64 dimensions they take the exact
    log-determinants of residual blocks, d products for each row and block; beyond that, and for a
    `loss` of your own, they are what the flow says in evaluation mode, with the same random numbers
    each time.

    **Ctrl-C** ends the training after its step, a second one at once, and returns what was reached.
    It is raised if that is nothing: if no validation was finite yet.

    **Checkpoints.** With a `checkpoint`, all that the training needs is written to that file every
    minute, after Ctrl-C and at the end, whole or not at all. The same call on the same rows then
    goes on where it was, bit for bit on a CPU, and returns at once if it was at its end: delete the
    file to train anew. A data loader that draws from torch's generators is run through anew up to
    its place.

    **Several processes**, under `torchrun --nproc-per-node=2 script.py` for example, train one flow
    where the script has called `torch.distributed.init_process_group` before ("gloo" on CPUs,
    "nccl" on GPUs, one for each process, told by `torch.cuda.set_device`). Every process gives the
    same arguments and rows. They start from the first one's flow, share out each batch of
    `batch_size` rows (rounded down to a multiple of their number) and average their gradients
    (torch's DistributedDataParallel): steps are those of one process on the whole batch, if the
    loss is a mean over rows. A data loader is each process's own
    (`torch.utils.data.DistributedSampler`), and its batches count alike. Where a loss is random, as
    under the roulette, each process draws numbers of its own (with `seed=None` those of its global
    generators), and the average is as unbiased. The first process alone validates, writes the
    checkpoint, tells the time and shows the progress; weights, history and the decision to stop are
    the same in all.

    References:
        Kingma, Ba. Adam: a method for stochastic optimization, 2015.
        Loshchilov, Hutter. SGDR: stochastic gradient descent with warm restarts, 2017.
        Polyak, Juditsky. Acceleration of stochastic approximation by averaging, 1992.

    Args:
        flow: any flow of nflows or of this library, or any module with `log_prob(rows)` or
            `log_prob(rows, context)` in nats; with a `loss`, any module. Trained in place. Where
            it is in training mode, its parts in evaluation mode stay there meanwhile, and in later
            calls. It is left in evaluation mode.
        train: rows (N, *), or rows and their context ((N, *), (N, C)), shuffled afresh in each
            epoch; or a data loader of such batches, which is run through again and again. They are
            moved to the device of the flow, and numbers that are not whole to its precision.
        validation: the same, never trained on; or a callable of the flow that returns the number
            to be minimised.
        loss: callable of (flow, rows) or (flow, rows, context) that returns a scalar to be
            minimised: `lambda flow, rows: flow.forward_kld(rows)` for a flow of normflows.
        optimizer: of the flow's parameters and of no others (what a loss trains beside the flow
            belongs into one module with it); its own learning rates are then what the schedule
            scales, whatever a scheduler would make of them. By default Adam (capturable on CUDA)
            with `learning_rate`.
        learning_rate: the largest one.
        batch_size: rows of a step, where `train` is no data loader.
        max_steps: length of the schedule in steps; 5,000 unless there is `max_seconds`.
        max_seconds: its length in seconds of training.
        max_grad_norm: what the norm of the gradient of the optimiser's parameters is clipped to;
            None leaves it as it is.
        warmup: part of the training in which the learning rate rises.
        average_decay: in [0, 1); None validates and keeps the weights themselves.
        validations: how often the flow is validated, at equal intervals of the schedule.
        patience: validations without a new best after which training stops.
        initialize: whether a flow with parts that start from data (`flow.initialize`), none of
            which has started or learned, is started from 5,000 rows from all over `train` (the
            first of a data loader). By default where there is no `loss`, which may give it other
            rows, so that the first batch starts it; or where splines of pixels, or parts of yours,
            would never start.
        capture: whether a step may become one graph on CUDA. A graph keeps what is no tensor:
            numbers of Python that `loss` reads are those of the second step for ever.
        seed: of all that is random in the training, so that the same call on the same weights gives
            the same result (bit for bit on a CPU); the global generators of torch and numpy are
            left as they were. None draws from them.
        after_step: called after each step, for models that ask for it.
        on_step: called with the fraction done and the loss after each step, on a GPU after those
            that ran without a look at their losses.
        progress: whether validations are shown on stderr; by default if that is a terminal.
        checkpoint: a file to go on from, if it is there, and to write.

    Returns:
        Steps, seconds, the validations and the best of them, and why it stopped.

    Raises:
        ValueError: an argument is out of range, there are no rows, or some are not finite, or
            float64 rows of which the flow's precision leaves little, or not the same tensors in
            every process; the checkpoint is damaged, or of another training.
        TrainingDivergedError: a loss, or every validation, was not finite; it names the step.

    Example:
        >>> from nflows_iresnet import ResidualFlow
        >>> rows = torch.randn(600, 2, generator=torch.Generator().manual_seed(0)) * 3 + 1
        >>> flow = ResidualFlow(features=2, hidden_features=16, num_layers=2)
        >>> history = fit(flow, rows[:500], rows[500:], max_steps=40, validations=5)
        >>> history.best_step in [point.step for point in history.curve], history.stopped
        (True, 'length')
    """
    _check_positive(
        learning_rate=learning_rate, max_seconds=max_seconds, max_grad_norm=max_grad_norm
    )
    if not 0 <= warmup < 1:
        raise ValueError(f"warmup must be a part of the training, in [0, 1), got {warmup}")
    if not torch.is_grad_enabled():
        raise ValueError(
            "gradients are switched off here, by torch.no_grad or torch.inference_mode: call fit "
            "outside of it"
        )
    seed = None if seed is None else _validated_seed(seed)
    processes = Processes.present()
    like = max(trainable(flow.parameters()), key=Tensor.numel)  # small ones may have another dtype
    given = GivenRows(train, like, "training", processes)
    with seeded(seed, like.device):
        processes.agree_on_state(flow)
        if initialize is None:
            initialize = loss is None or any(map(waits_to_be_told, flow.modules()))
        if initialize and hasattr(flow, "initialize"):
            if _is_new(flow):
                flow.initialize(*given.some(START_ROWS))
            elif has_only_started(flow):
                warnings.warn(_STARTED, stacklevel=2)
        plan = TrainingPlan(
            learning_rate,
            _length(max_steps, max_seconds),
            clip_norm=max_grad_norm,
            validations=validated_size("validations", validations),
            patience=validated_size("patience", patience),
            average_decay=average_decay,
            warmup=warmup,
            validates_start=not any(map(is_waiting, flow.modules())),
            captures=capture,
        )
        size = validated_size("batch_size", batch_size)
        validate = validation if callable(validation) else Validator(validation, like, loss)
        training = Training(
            flow,
            given.stream(size),
            plan,
            lambda: _number(validate(flow)),
            optimizer=optimizer,
            loss=loss or negative_log_likelihood,
            after_step=after_step,
            processes=processes,
        )
        if seed is not None and processes.rank > 0:
            seed_generators(int(torch.randint(2**31, ())) + processes.rank, like.device)
        keeper = None
        if checkpoint is not None:
            settings = {"batch_size": size, "seed": seed, "training rows": str(given)}
            settings["loss"] = None if loss is None else _name(loss)
            if isinstance(validate, Validator):
                settings["validation rows"] = str(validate.rows)
            else:
                settings["validation"] = _name(validate)
            keeper = _keeper(Path(checkpoint), training, settings)
        shown = processes.rank == 0 and (sys.stderr.isatty() if progress is None else progress)
        display = _Display(training.progress, on_step, shown=shown)
        try:
            return run(training, display, keeper, Noted())
        except KeyboardInterrupt:
            return close(training)


def _keeper(path: Path, training: Training, settings: dict[str, Any]) -> Keeper:
    """Return what keeps the checkpoint of a training of `fit`.

    Raises:
        ValueError: there can be no such file.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"checkpoint {str(path)!r} must be a file in a folder that exists")
    plan, model = vars(training.plan), training.model
    shapes = [(name, list(each.shape)) for name, each in model.named_parameters()]
    about = {
        **{name: plan[name] for name in sorted(plan.keys() - _NOT_THE_PLAN)},
        **settings,
        "optimizer": type(training.optimizer).__name__,
        "options of the optimizer": options_of(training.optimizer),
        "flow": f"{type(model).__name__} {zlib.crc32(repr(shapes).encode()):08x}",
        "processes": training.processes.count,
    }
    return Keeper(path, about)


def _validated_seed(seed: object) -> int:
    """Return a seed as torch and numpy take it."""
    if isinstance(seed, Integral) and 0 <= int(seed) < 2**32:
        return int(seed)
    raise ValueError(f"seed must be None, or an integer from 0 to {2**32 - 1}, got {seed!r}")


def _name(function: object) -> str:
    """Return what tells a callable from another in other processes, too."""
    return getattr(function, "__qualname__", type(function).__qualname__)


def _length(max_steps: int | None, max_seconds: float | None) -> Length:
    lengths: list[Length] = [] if max_seconds is None else [Seconds(max_seconds)]
    if max_steps is not None or not lengths:
        given = MAX_STEPS if max_steps is None else max_steps
        lengths.append(Steps(validated_size("max_steps", given)))
    return FirstOf(tuple(lengths))


def _check_positive(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value}")


def _number(value: Any) -> float:
    """Return what a validation returned, a number or a tensor of one."""
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        given = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"validation must return one number, to be minimised, got {given}"
        ) from None


def _is_new(flow: nn.Module) -> bool:
    """Whether parts of a flow wait for their first rows, and none has started or learned.

    Where some have, those that wait start from the first batch: to start all would undo the others.
    """
    transform = getattr(flow, "_transform", None)
    whole = transform if isinstance(transform, nn.Module) else flow
    parts = [each for each in whole.modules() if starts_from_rows(each) or is_waiting(each)]
    return any(map(is_waiting, parts)) and not any(map(has_begun, parts))


_STARTED = (
    "the flow has started from the rows of an earlier call in training mode, and is not started "
    "again: if it was not trained since, call flow.initialize(rows) before fit, or look at new "
    "flows in evaluation mode"
)


class _Display:
    """Shows validations in one line on stderr, and passes the steps on."""

    def __init__(
        self, progress: Progress, on_step: Callable[[float, float], None] | None, *, shown: bool
    ) -> None:
        self._progress, self._on_step, self._shown = progress, on_step, shown

    def __call__(self, done: float, loss: float) -> None:
        if self._on_step is not None:
            self._on_step(done, loss)
        best = self._progress.best if self._shown and self._progress.due else None
        if best is not None:
            print(
                f"\r{done:4.0%}  step {self._progress.begun}  loss {loss:.3f}  best validation "
                f"{best.validation:.3f} at step {best.step} ",
                end="\n" if done >= 1 else "",
                file=sys.stderr,
                flush=True,
            )
