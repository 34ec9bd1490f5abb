"""How far the inverse of a residual classifier misses the images, also where it fails."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nflows_iresnet.classifiers import ResidualClassifier
from nflows_iresnet.solvers import FixedPointNotConverged, Solution
from nflows_iresnet.transforms import InjectivePadding, ResidualTransform


@dataclass(frozen=True)
class Inversion:
    """What became of images that were encoded and decoded.

    Args:
        num_images: how many images.
        num_failed: how many of them have a block where the solver gave up.
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


@torch.no_grad()
def invert(classifier: ResidualClassifier, images: Tensor, rows: int = 512) -> Inversion:
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
