"""What is measured on a trained model: likelihood, inverse, sampling, memory, Lipschitz bound."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nflows_iresnet.experiments.adapters import DensityModel
from nflows_iresnet.experiments.config import describe
from nflows_iresnet.training.processes import synchronize

Array = np.ndarray[Any, np.dtype[Any]]
CHUNK = 32
"""Rows that share the random truncation of an estimator, and its work at a time."""
GAP_CHUNK = 8
NUM_GAPS = 128
"""Independent truncations, each for a few images, behind the error of an estimator's mean: deep
ones are rare and weigh much, so that fewer draws understate their own error."""

NUM_TIMED_SAMPLES = 10_000
NUM_TIMED_IMAGES = 256
NUM_SHOWN_IMAGES = 12
IMAGES_AT_ONCE = 256
NUM_KEPT_SAMPLES = 4_000
NUM_VALIDATION_ROWS = 1_000
MEMORY_MEASURE = {
    "cpu": "bytes of the tensors alive at once, scratch space inside a kernel not counted",
    "cuda": "torch.cuda.max_memory_allocated above the level before",
}


@dataclass(frozen=True)
class Metrics:
    """Everything measured on one trained model; None where it failed or does not apply.

    Args:
        test_nll: mean negative log-likelihood of the test rows, in nats.
        test_nll_se: its standard error over the rows (over chunks of rows for an estimate).
        test_nll_exact: whether the log-determinants in it are exact or unbiased estimates.
        bits_per_dim: `test_nll` of images in bits per dimension.
        bits_per_dim_se: its standard error.
        exact_gap: mean of estimated minus exact log-density over the same test images, nats.
        exact_gap_se: standard error of that mean over the random draws of the estimator.
        exact_rows: how many test images that comparison took.
        above_optimum: mean of true minus model log-density over the same rows, nats.
        above_optimum_se: standard error of that paired difference.
        sample_seconds: time to draw 10,000 samples, or 256 images.
        round_trip_max: largest coordinate of `|decode(encode(x)) - x|` over the test rows, as the
            model sees them: those of tables are standardised.
        round_trip_median: median over the rows of their largest coordinate.
        peak_memory_mb: peak of tensor memory in forward and backward of one batch, MB.
        lipschitz: largest Lipschitz constant over the residual blocks.
        lipschitz_certified: whether that number is a guarantee.
    """

    test_nll: float | None = None
    test_nll_se: float | None = None
    test_nll_exact: bool | None = None
    bits_per_dim: float | None = None
    bits_per_dim_se: float | None = None
    exact_gap: float | None = None
    exact_gap_se: float | None = None
    exact_rows: int | None = None
    above_optimum: float | None = None
    above_optimum_se: float | None = None
    sample_seconds: float | None = None
    round_trip_max: float | None = None
    round_trip_median: float | None = None
    peak_memory_mb: float | None = None
    lipschitz: float | None = None
    lipschitz_certified: bool | None = None


@dataclass(frozen=True)
class EvaluationData:
    """What every trained model is measured on.

    Args:
        test: test rows (N, d), or dequantised test images (N, C, H, W).
        batch: one training batch (B, *), for the memory measurement.
        true_log_prob: true log-density of the test rows (N,), or None where it is not known.
        grid: points of the density picture (M, 2), or None unless d = 2.
        more_draws: the test images with other noise; likelihoods are averaged over all draws.
        max_exact_rows: above this many rows, models with an estimator are scored by it, and only
            so many rows get the exact log-determinant; None for no limit.
    """

    test: Tensor
    batch: Tensor
    true_log_prob: Tensor | None = None
    grid: Tensor | None = None
    more_draws: tuple[Tensor, ...] = ()
    max_exact_rows: int | None = None

    @property
    def shows_images(self) -> bool:
        """Whether rows are images."""
        return self.test.dim() == 4


@dataclass
class Evaluation:
    """Metrics, the arrays that pictures and paired comparisons need, and what went wrong."""

    metrics: Metrics = field(default_factory=Metrics)
    arrays: dict[str, Array] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def evaluate(model: DensityModel, data: EvaluationData, seed: int) -> Evaluation:
    """Measure everything; a measurement that fails is reported and the others go on."""
    found = Evaluation()
    torch.manual_seed(seed)
    model.eval()
    for name, measure in _MEASUREMENTS.items():
        try:
            measured = measure(model, data)
            arrays = {key: each for key, each in measured.items() if isinstance(each, np.ndarray)}
            numbers = {key: each for key, each in measured.items() if key not in arrays}
            found.metrics = replace(found.metrics, **numbers)
            found.arrays |= arrays
        except Exception as error:
            found.failures.append(f"{name}: {describe(error)}")
    return found


def exact_log_prob(model: DensityModel, inputs: Tensor) -> Tensor:
    """Return the exact log-density of many rows, (N, *) -> (N,), a chunk of rows at a time."""
    rows = 4096 if inputs.shape[1:].numel() <= 16 else 256
    return torch.cat([model.exact_log_prob(chunk) for chunk in inputs.split(rows)])


@torch.no_grad()
def estimated_log_prob(model: DensityModel, inputs: Tensor, rows: int = CHUNK) -> Tensor:
    """Return the log-density that training maximises, (N, *) -> (N,); one draw for each chunk."""
    return torch.cat([model.log_prob(chunk) for chunk in inputs.split(rows)])


def exact_nll(model: DensityModel, inputs: Tensor) -> float:
    """Return the exact mean negative log-likelihood in nats."""
    return -float(exact_log_prob(model, inputs).double().mean())


def mean_and_error(values: Tensor) -> tuple[float, float | None]:
    """Return the mean and its standard error; None for fewer than two values."""
    values = values.double()
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.mean()), error


def _error_over_chunks(values: Tensor, size: int = CHUNK) -> float | None:
    """Return the standard error of a mean whose chunks share random numbers; None for too few."""
    chunks = values.double().split(size)
    means = [chunk.mean() for chunk in chunks if len(chunk) == size]
    return mean_and_error(torch.stack(means))[1] if means else None


def _likelihood(model: DensityModel, data: EvaluationData) -> dict[str, Any]:
    limit = data.max_exact_rows
    exact = not model.estimates or limit is None or len(data.test) <= limit
    score = exact_log_prob if exact else estimated_log_prob
    draws = [score(model, test) for test in (data.test, *data.more_draws)]
    log_prob = torch.stack(draws).mean(dim=0)
    _check_finite(log_prob, "log-densities")
    nll, error = mean_and_error(-log_prob)
    if not exact:
        error = max(error or 0.0, _error_over_chunks(log_prob) or 0.0)
    found: dict[str, Any] = {"test_nll": nll, "test_nll_se": error, "test_nll_exact": exact}
    found["test_log_prob"] = log_prob.cpu().numpy()
    if data.shows_images:
        nats_per_bit = data.test[0].numel() * math.log(2)
        found["bits_per_dim"] = nll / nats_per_bit
        found["bits_per_dim_se"] = None if error is None else error / nats_per_bit
    if data.true_log_prob is not None:
        above, above_error = mean_and_error(data.true_log_prob - log_prob)
        found |= {"above_optimum": above, "above_optimum_se": above_error}
    return found


def _agreement(model: DensityModel, data: EvaluationData) -> dict[str, Any]:
    """Compare estimated with exact log-densities on the same images."""
    if not model.estimates or not data.shows_images:
        return {}
    rows = data.test[: data.max_exact_rows]
    size = min(GAP_CHUNK, len(rows))
    rows = rows[: len(rows) // size * size]
    exact, draws = exact_log_prob(model, rows), -(-NUM_GAPS * size // len(rows))
    gaps = torch.cat([estimated_log_prob(model, rows, size) - exact for _ in range(draws)])
    _check_finite(gaps, "log-densities")
    return {
        "exact_gap": float(gaps.double().mean()),
        "exact_gap_se": _error_over_chunks(gaps, size),
        "exact_rows": len(rows),
    }


def _check_finite(values: Tensor, what: str) -> None:
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ArithmeticError(f"{bad} of {len(values)} {what} are not finite")


@torch.no_grad()
def _sampling(model: DensityModel, data: EvaluationData) -> dict[str, Any]:
    wanted = NUM_TIMED_IMAGES if data.shows_images else NUM_TIMED_SAMPLES
    model.sample(min(100, wanted))
    synchronize(data.test.device)
    started = time.perf_counter()
    samples = model.sample(wanted)
    synchronize(data.test.device)
    seconds = time.perf_counter() - started
    _check_finite(samples.flatten(start_dim=1).sum(dim=1), "samples")
    return {"sample_seconds": seconds, "samples": samples[:NUM_KEPT_SAMPLES].cpu().numpy()}


@torch.no_grad()
def _round_trip(model: DensityModel, data: EvaluationData) -> dict[str, Any]:
    chunks = data.test.split(IMAGES_AT_ONCE if data.shows_images else len(data.test))
    misses = (model.decode(model.encode(chunk)) - chunk for chunk in chunks)
    errors = torch.cat([each.abs().flatten(start_dim=1).amax(dim=1) for each in misses])
    _check_finite(errors, "decoded rows")
    return {"round_trip_max": float(errors.max()), "round_trip_median": float(errors.median())}


@torch.no_grad()
def _reconstructions(model: DensityModel, data: EvaluationData) -> dict[str, Any]:
    if not data.shows_images:
        return {}
    shown = data.test[:NUM_SHOWN_IMAGES]
    noise = model.encode(shown)
    found = {"shown": shown, "decoded": model.decode(noise), "encoded": noise.reshape(shown.shape)}
    return {name: images.cpu().numpy() for name, images in found.items()}


def _lipschitz(model: DensityModel, data: EvaluationData) -> dict[str, Any]:
    bound = model.lipschitz()
    if bound is None:
        return {}
    return {"lipschitz": bound.value, "lipschitz_certified": bound.certified}


def _density_grid(model: DensityModel, data: EvaluationData) -> dict[str, Any]:
    if data.grid is None:
        return {}
    return {"grid_log_prob": exact_log_prob(model, data.grid).cpu().numpy()}


def _memory(model: DensityModel, data: EvaluationData) -> dict[str, Any]:
    def step() -> None:
        (-model.log_prob(data.batch).mean()).backward()

    model.train()
    model.zero_grad(set_to_none=True)
    peak = peak_megabytes(step, data.batch.device)
    model.zero_grad(set_to_none=True)
    model.eval()
    return {"peak_memory_mb": peak}


_MEASUREMENTS: dict[str, Callable[[DensityModel, EvaluationData], dict[str, Any]]] = {
    "test NLL": _likelihood,
    "estimate against exact": _agreement,
    "sampling": _sampling,
    "round trip": _round_trip,
    "reconstructions": _reconstructions,
    "Lipschitz bound": _lipschitz,
    "density picture": _density_grid,
    "memory": _memory,
}


def peak_megabytes(work: Callable[[], object], device: torch.device) -> float:
    """Return the peak of tensor memory, in MB, that some work adds to what was there before.

    The work is run once; `MEMORY_MEASURE` says what is counted on the device of its tensors.
    """
    if device.type != "cuda":
        with _LiveStorages() as storages:
            work()
        return storages.peak / 1e6
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


class _LiveStorages(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it to its release."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known.update(_storages((args, kwargs)))
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage not in self._known:
                self._known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._release, storage.nbytes())
        return result

    def _release(self, num_bytes: int) -> None:
        self.live -= num_bytes


def _storages(tree: object) -> Iterator[torch.UntypedStorage]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
