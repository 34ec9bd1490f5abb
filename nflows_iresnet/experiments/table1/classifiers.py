"""The classifiers of the table: built, trained by the library's loop, and examined."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nflows_iresnet.classifiers import InvertibleClassifier, ResidualClassifier
from nflows_iresnet.datasets import ImageDataset, load_images
from nflows_iresnet.experiments.config import describe, in_any_folder
from nflows_iresnet.experiments.models import count_parameters
from nflows_iresnet.experiments.parallel import NOBODY, Watch
from nflows_iresnet.experiments.table1 import Settings
from nflows_iresnet.files import WriteError
from nflows_iresnet.solvers import FixedPointIteration, FixedPointNotConverged, Solution
from nflows_iresnet.training import History
from nflows_iresnet.training.checkpoints import CheckpointError
from nflows_iresnet.training.loop import Training
from nflows_iresnet.training.processes import seed_everything
from nflows_iresnet.training.progress import Seconds, Steps, TrainingPlan
from nflows_iresnet.training.rows import Batches
from nflows_iresnet.transforms import InjectivePadding, ResidualTransform

SOLVER = FixedPointIteration()
"""The inverse of the papers, for every classifier that has one."""
CHUNK = 512
"""Images at a time in examinations."""
NUM_INVERTED = 1024
"""Test images that are inverted, where there are more."""


# --- what is built --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What all classifiers have in common."""

    shape: tuple[int, int, int]
    num_classes: int
    levels: int
    settings: Settings

    @classmethod
    def of(cls, data: ImageDataset, settings: Settings) -> Size:
        """Return the size that suits some images."""
        return cls(data.shape, data.num_classes, data.levels, settings)

    @property
    def of_residual(self) -> dict[str, Any]:
        """What residual classifiers have in common beside the shape of the images."""
        return {
            "num_blocks": self.settings.num_blocks,
            "num_scales": self.settings.num_scales,
            "padding": self.settings.padding,
            "levels": self.levels,
            "solver": SOLVER,
        }


class ResNet(nn.Module):
    """Stem, then per scale one strided and `num_blocks - 1` plain blocks, mean, linear map.

    References:
        He, Zhang, Ren, Sun. Deep residual learning for image recognition, 2016.

    Args:
        size: what it has in common with the others; `num_scales` halvings, each doubles the width.
        width: channels of the stem.
    """

    def __init__(self, size: Size, width: int) -> None:
        super().__init__()
        self.levels = size.levels
        layers: list[nn.Module] = [_conv(size.shape[0], width), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(size.settings.num_scales):
            layers.append(_BasicBlock(width, 2 * width, stride=2))
            width *= 2
            plain = range(size.settings.num_blocks - 1)
            layers += [_BasicBlock(width, width, stride=1) for _ in plain]
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, size.num_classes)]
        self.net = nn.Sequential(*layers, *pool)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, num_classes) of images (B, C, H, W)."""
        logits: Tensor = self.net(images.float() / (self.levels - 1) - 0.5)
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, before: int, after: int, *, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(_conv(before, after, stride=stride), nn.BatchNorm2d(after), nn.ReLU()),
            *(_conv(after, after), nn.BatchNorm2d(after)),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != after:
            self.shortcut = nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.relu(self.shortcut(inputs) + self.branch(inputs))


def _conv(before: int, after: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)


def invertible(size: Size, coeff: float) -> InvertibleClassifier:
    """Build the classifier with a certified Lip(g) <= coeff in each block."""
    hidden = size.settings.hidden_channels
    return InvertibleClassifier(
        size.shape, size.num_classes, hidden, coeff=coeff, **size.of_residual
    )


def vanilla(size: Size) -> ResidualClassifier:
    """Build the architecture of the invertible classifiers with ordinary convolutions."""
    hidden = size.settings.hidden_channels

    def branch(channels: int) -> nn.Module:
        return nn.Sequential(
            *(nn.Conv2d(channels, hidden, 3, padding=1), nn.ELU()),
            *(nn.Conv2d(hidden, hidden, 1), nn.ELU()),
            nn.Conv2d(hidden, channels, 3, padding=1),
        )

    return ResidualClassifier(size.shape, size.num_classes, branch, **size.of_residual)


def resnet(size: Size) -> ResNet:
    """Build the ResNet whose parameters come nearest to those of the vanilla architecture."""
    with torch.random.fork_rng(devices=[]):
        target = count_parameters(vanilla(size))
        counts = {2: count_parameters(ResNet(size, 2))}
        while counts[width := max(counts)] < target:
            counts[width + 2] = count_parameters(ResNet(size, width + 2))
    return ResNet(size, min(counts, key=lambda width: abs(counts[width] - target)))


def builders(coeffs: Iterable[float]) -> dict[str, Callable[[Size], nn.Module]]:
    """Return what builds each row of the table; `described_rows` has the same rows."""
    bounded = {f"c={coeff}": partial(invertible, coeff=coeff) for coeff in coeffs}
    return {"resnet": resnet, "vanilla": vanilla, **bounded}


# --- what is found --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inversion:
    """What became of images that were encoded and decoded.

    Args:
        num_failed: how many images have a block where the solver gave up.
        residual_max: largest residual of a block's solution, in the 2-norm.
        error_max: largest error of a pixel, where a level has width 1; the best point that was
            found counts where the solver gave up.
        error_median: median over the images of their largest error.
    """

    num_images: int
    num_failed: int
    residual_max: float
    error_max: float
    error_median: float


@dataclass(frozen=True)
class Outcome:
    """One classifier trained and examined once.

    Args:
        best_step: the step whose state was examined.
        train_seconds: time of the training, validation not counted.
        num_wrong: test images that were misclassified.
        lipschitz_bound: largest certified bound over the blocks, None where none is known.
        capture_reason: why a step was not one CUDA graph, None where it was, and on a CPU.
        stopped: why the training ended, None where that is not known.
    """

    model: str
    repeat: int
    model_class: str
    num_parameters: int
    steps: int = 0
    best_step: int = 0
    train_seconds: float = 0.0
    num_test: int = 0
    num_wrong: int = 0
    lipschitz_bound: float | None = None
    inversion: Inversion | None = None
    failure: str | None = None
    is_captured: bool = False
    capture_reason: str | None = None
    stopped: str | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Model and repeat."""
        return self.model, self.repeat


# --- what is done ---------------------------------------------------------------------------------


def load(settings: Settings, repeat: int) -> ImageDataset:
    """Load the images with the splits of a repeat."""
    seed = settings.seed + repeat
    return load_images(settings.dataset, settings.data_dir, seed, settings.num_train)


_load_once = lru_cache(maxsize=8)(load)


@dataclass(frozen=True)
class ClassifierJob:
    """One classifier to be trained and examined, on its images."""

    model: str
    repeat: int
    config: Settings
    data: ImageDataset | None = None

    @property
    def key(self) -> tuple[str, int]:
        """Model and repeat."""
        return self.model, self.repeat

    @property
    def label(self) -> str:
        """Name it for people."""
        return f"{self.model} · repeat {self.repeat}"

    def without_data(self) -> ClassifierJob:
        """Return what another process is sent, which may run in another folder."""
        return replace(self, data=None, config=in_any_folder(self.config))

    def with_data(self) -> ClassifierJob:
        """Load the images of a job that was sent."""
        return replace(self, data=_load_once(self.config, self.repeat))

    def do(self, watch: Watch = NOBODY) -> Outcome:
        """Train and examine the classifier; what goes wrong is part of the outcome."""
        data, settings = self.data or load(self.config, self.repeat), self.config
        seed_everything(settings.seed + self.repeat)
        build = builders(settings.coeffs)[self.model]
        classifier = build(Size.of(data, settings)).to(settings.device)
        kind = type(classifier)
        name = f"{kind.__module__}.{kind.__qualname__}"
        begun = Outcome(*self.key, name, count_parameters(classifier))
        try:
            training = _training(classifier, data, settings, settings.seed + self.repeat)
            return _examined(begun, watch.train(training), classifier, data, settings.device)
        except (CheckpointError, WriteError):
            raise
        except Exception as error:
            return replace(begun, failure=describe(error))


def _training(classifier: nn.Module, data: ImageDataset, settings: Settings, seed: int) -> Training:
    """Return a training by cross-entropy on numbered images, which lie on the device."""
    device = settings.device
    images, labels = data.train.to(device), data.train_labels.to(device)
    validation, answers = data.validation.to(device), data.validation_labels.to(device)

    def loss(classifier: nn.Module, numbers: Tensor) -> Tensor:
        return cross_entropy(classifier(shifted(images[numbers], settings.shift)), labels[numbers])

    @torch.no_grad()
    def validate() -> float:
        losses = cross_entropy(logits_of(classifier, validation), answers, reduction="none")
        return float(losses.double().mean())

    length = Steps(settings.steps or 0) if settings.budget is None else Seconds(settings.budget)
    plan = TrainingPlan(settings.learning_rate, length, tf32=settings.training_precision == "tf32")
    numbers = torch.arange(len(images), device=device)
    return Training(
        classifier, Batches(numbers, settings.batch_size, seed), plan, validate, loss=loss
    )


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


def logits_of(classifier: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of many images, a chunk at a time."""
    return torch.cat([classifier(chunk) for chunk in images.split(CHUNK)])


@torch.no_grad()
def _examined(
    begun: Outcome, history: History, classifier: nn.Module, data: ImageDataset, device: str
) -> Outcome:
    images, labels = data.test.to(device), data.test_labels.to(device)
    found = replace(
        begun,
        steps=history.steps,
        best_step=history.best_step,
        train_seconds=history.seconds,
        num_test=len(labels),
        num_wrong=int((logits_of(classifier, images).argmax(dim=1) != labels).sum()),
        is_captured=history.is_captured,
        capture_reason=history.capture_reason,
        stopped=history.stopped,
    )
    if not isinstance(classifier, ResidualClassifier):
        return found
    inversion = invert(classifier, images[:NUM_INVERTED])
    return replace(found, lipschitz_bound=classifier.lipschitz_bound(), inversion=inversion)


@torch.no_grad()
def invert(classifier: ResidualClassifier, images: Tensor, rows: int = CHUNK) -> Inversion:
    """Encode images, decode them block by block, and go on where a block's solver gives up.

    Args:
        classifier: in evaluation.
        images: (B, C, H, W).
        rows: images at a time.
    """
    parts = [_invert(classifier, chunk) for chunk in images.split(rows)]
    errors, residuals, failed = (torch.cat(each) for each in zip(*parts, strict=True))
    return Inversion(
        num_images=len(images),
        num_failed=int(failed.sum()),
        residual_max=float(residuals.max()),
        error_max=float(errors.max()),
        error_median=float(errors.median()),
    )


def _invert(classifier: ResidualClassifier, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each image its largest error and residual, and whether a solver gave up."""
    values = classifier.encode(images)
    residuals = values.new_zeros(len(values))
    failed = torch.zeros_like(residuals, dtype=torch.bool)
    for transform in reversed(list(classifier.transform._transforms)):
        if isinstance(transform, ResidualTransform):
            solution = _solve(transform, values)
            values = solution.value
            residuals = residuals.maximum(solution.residual)
            failed = failed | ~solution.converged
        elif isinstance(transform, InjectivePadding):
            values = values[:, : values.shape[1] - transform.channels]
        else:
            values = transform.inverse(values)[0]
    return (values - images).abs().flatten(start_dim=1).amax(dim=1), residuals, failed


def _solve(block: ResidualTransform, targets: Tensor) -> Solution:
    function = block.bind()
    try:
        return block.solver(lambda point: targets - function(point), targets, function.lipschitz)
    except FixedPointNotConverged as error:
        return error.solution
