"""Training that stops by itself: one loop for every flow, and it knows none of them.

    history = fit(flow, train_rows, validation_rows)

`fit` is for users; commands give the same loop, `run`, their batches, checkpoints and validations.
"""

from nflows_iresnet.training.fitting import fit
from nflows_iresnet.training.loop import (
    Interruption,
    Keeper,
    Stepper,
    Training,
    WeightAverage,
    adam,
    close,
    run,
    set_learning_rate,
)
from nflows_iresnet.training.processes import (
    Processes,
    random_state,
    seed_everything,
    seeded,
    set_random_state,
    synchronize,
)
from nflows_iresnet.training.progress import (
    CurvePoint,
    FirstOf,
    History,
    Length,
    Seconds,
    Steps,
    TrainingDivergedError,
    TrainingPlan,
    check_finite,
    finite,
)
from nflows_iresnet.training.rows import Batches

__all__ = [
    "Batches",
    "CurvePoint",
    "FirstOf",
    "History",
    "Interruption",
    "Keeper",
    "Length",
    "Processes",
    "Seconds",
    "Stepper",
    "Steps",
    "Training",
    "TrainingDivergedError",
    "TrainingPlan",
    "WeightAverage",
    "adam",
    "check_finite",
    "close",
    "finite",
    "fit",
    "random_state",
    "run",
    "seed_everything",
    "seeded",
    "set_learning_rate",
    "set_random_state",
    "synchronize",
]
