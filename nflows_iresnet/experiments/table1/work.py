"""One classifier: trained by the loop of the comparison, then examined."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nflows_iresnet.classifiers import ResidualClassifier
from nflows_iresnet.datasets import ImageDataset
from nflows_iresnet.experiments.checkpoints import CheckpointError, Keeper
from nflows_iresnet.experiments.config import describe
from nflows_iresnet.experiments.files import WriteError
from nflows_iresnet.experiments.interruption import Postponed
from nflows_iresnet.experiments.models import count_parameters
from nflows_iresnet.experiments.table1.inversion import invert
from nflows_iresnet.experiments.table1.models import Contestant, Size
from nflows_iresnet.experiments.table1.record import Outcome
from nflows_iresnet.experiments.table1.settings import Settings
from nflows_iresnet.training import (
    Batches,
    Seconds,
    Steps,
    Training,
    TrainingPlan,
    run,
    seed_everything,
)

OnStep = Callable[[float, float], None]
CHUNK = 512
"""Images at a time in examinations."""
NUM_INVERTED = 1024
"""Test images that are inverted, where there are more."""


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images with their labels."""

    images: Tensor
    labels: Tensor

    def to(self, device: str) -> Labelled:
        """Move both."""
        return Labelled(self.images.to(device), self.labels.to(device))


class LabelModel(nn.Module):
    """log p(label | image) of numbered training images: what the loop maximises.

    Args:
        classifier: images -> logits.
        data: the training images.
        shift: largest number of pixels by which images are shifted at random.
    """

    def __init__(self, classifier: nn.Module, data: Labelled, shift: int = 0) -> None:
        super().__init__()
        self.classifier, self._data, self._shift = classifier, data, shift

    def log_prob(self, indices: Tensor) -> Tensor:
        """Return the log-probabilities of the right labels in nats, (B,) -> (B,)."""
        images = shifted(self._data.images[indices], self._shift)
        return label_log_prob(self.classifier, images, self._data.labels[indices])

    def after_step(self) -> None:
        """Do nothing."""


def shifted(images: Tensor, largest: int) -> Tensor:
    """Return images (B, C, H, W), each moved by -largest to largest pixels; zeros come in."""
    if largest == 0:
        return images
    batch, _, height, width = images.shape
    down, right = torch.randint(0, 2 * largest + 1, (2, batch, 1), device=images.device)
    rows = down + torch.arange(height, device=images.device)
    columns = right + torch.arange(width, device=images.device)
    each = torch.arange(batch, device=images.device)[:, None, None]
    padded = nn.functional.pad(images, 4 * (largest,)).movedim(1, -1)
    return padded[each, rows[:, :, None], columns[:, None]].movedim(-1, 1)


def label_log_prob(classifier: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probabilities of the labels (B,) in nats."""
    return -nn.functional.cross_entropy(classifier(images), labels, reduction="none")


@torch.no_grad()
def cross_entropy(classifier: nn.Module, data: Labelled) -> float:
    """Return the mean cross-entropy in nats."""
    chunks = zip(data.images.split(CHUNK), data.labels.split(CHUNK), strict=True)
    values = [label_log_prob(classifier, *chunk) for chunk in chunks]
    return -float(torch.cat(values).double().mean())


@torch.no_grad()
def count_wrong(classifier: nn.Module, data: Labelled) -> int:
    """Return how many images are misclassified."""
    chunks = zip(data.images.split(CHUNK), data.labels.split(CHUNK), strict=True)
    return sum(int((classifier(images).argmax(1) != labels).sum()) for images, labels in chunks)


def execute(
    contestant: Contestant,
    repeat: int,
    data: ImageDataset,
    settings: Settings,
    on_step: OnStep,
    keeper: Keeper | None = None,
) -> Outcome:
    """Train and examine one classifier; what goes wrong is part of the outcome."""
    seed_everything(settings.seed + repeat)
    size = Size(data.shape, data.num_classes, data.levels, settings)
    classifier = contestant.build(size).to(settings.device)
    kind = type(classifier)
    begun = Outcome(
        *(contestant.name, repeat, f"{kind.__module__}.{kind.__qualname__}"),
        num_parameters=count_parameters(classifier),
    )
    try:
        return _trained(begun, classifier, data, settings, on_step, keeper)
    except (CheckpointError, WriteError):
        raise
    except Exception as error:
        return Outcome(*begun.key, begun.model_class, begun.num_parameters, failure=describe(error))


def _trained(
    begun: Outcome,
    classifier: nn.Module,
    data: ImageDataset,
    settings: Settings,
    on_step: OnStep,
    keeper: Keeper | None,
) -> Outcome:
    device = settings.device
    validation = Labelled(data.validation, data.validation_labels).to(device)
    stream = Batches(
        torch.arange(len(data.train), device=device),
        settings.batch_size,
        settings.seed + begun.repeat,
    )
    train_data = Labelled(data.train, data.train_labels).to(device)
    model = LabelModel(classifier, train_data, settings.shift)
    length = Steps(settings.steps or 0) if settings.budget is None else Seconds(settings.budget)
    is_short = settings.training_precision == "tf32"
    plan = TrainingPlan(settings.learning_rate, length, tf32=is_short)
    training = Training(model, stream, plan, lambda: cross_entropy(classifier, validation))
    log = run(training, on_step, keeper, None if keeper is None else Postponed())
    test = Labelled(data.test, data.test_labels).to(device)
    residual = classifier if isinstance(classifier, ResidualClassifier) else None
    return Outcome(
        *(*begun.key, begun.model_class, begun.num_parameters),
        steps=log.steps,
        best_step=log.best_step,
        train_seconds=log.seconds,
        num_test=len(test.labels),
        num_wrong=count_wrong(classifier, test),
        lipschitz_bound=None if residual is None else residual.lipschitz_bound(),
        inversion=None if residual is None else invert(residual, test.images[:NUM_INVERTED]),
        is_captured=log.is_captured,
        capture_reason=log.capture_reason,
    )
