"""A learned linear map of features, or of the channels of images, that can start by whitening."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.linearization import is_traced, pulled_back, run_weight_hooks
from nflows_iresnet.precision import (
    at_least_single,
    full_precision,
    in_full_precision,
    like_weights,
    training_precision,
)
from nflows_iresnet.transforms.channels import (
    as_rows,
    for_each_input,
    like_inputs,
    require_channels,
)
from nflows_iresnet.transforms.normalization import (
    ENOUGH_ROWS,
    StartsFromData,
    likely_moments,
    note_start,
    over_processes,
    require_own,
)
from nflows_iresnet.validation import validated_size

Initialization = Literal["identity", "whitening"]

_MAX_LOG_DIAGONAL = 80.0
"""Bound of log d_j, so that no step of an optimiser makes W singular: float32 reaches e^88."""
_MAX_LOG_DIAGONAL_AT_START = 70.0
_ROWS_PER_FEATURE = 4
"""Correlations from fewer are shrunk in proportion: unseen rows of F independent features would
cost 0.1 F nats more than without whitening at 4 F rows; unshrunk 0.4 F at 2 F, thousands at F."""
_TRUST = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.998, 1.0)
"""Parts of this, of which rows that are left out choose one."""
_SMALLEST_EIGENVALUE = 1e-4
"""Of the correlations: a direction is stretched at most 100 times more than by its scale. A step of
the optimiser moves it by so many times the learning rate: at 10^4 times training falls apart."""
_ROUNDINGS = 8
"""How many roundings of the largest value count as noise of a feature."""


_METHODS = ("log_diagonal", "forward", "inverse")
"""What a subclass replaces together, or the last two alone."""


class LinearTransform(StartsFromData):
    r"""y = W x + b with W = L U, for vectors, or for the channels of each pixel of images.

    L is unit lower triangular, U upper triangular with diagonal d > 0, so that

        log|det W| = sum_j log d_j,    x = U^-1 L^-1 (y - b),

    times the number of pixels for images, where it is the invertible 1x1 convolution of Glow. Where
    d is bounded, log d = 80 tanh(raw / 80), no step of an optimiser makes W singular. No
    permutation is needed: residual blocks treat all coordinates alike, and any covariance is that
    of some W x + b of a normal x.

    **Start.** With "identity" y = x. With "whitening" the first batch in training mode gives W, the
    inverse Cholesky factor of its covariance S (lower triangular: W S W^T = I, and U = diag d), and
    b = -W mean: it leaves with mean 0 and covariance I. `initialize` does so from rows that are
    given, for either kind. Computed in float64, once, from what all processes hold together (five
    `all_reduce`, in which every process takes part). What comes out where S is not known well:

    * a constant feature (a standard deviation below 8 roundings of its largest value) is centred,
      and keeps its scale;
    * correlations from n rows are multiplied by a number t between 0 and min(1, (n - 1) / (4 F)).
      Of 12 such numbers each row is given the normal of all *other* rows: t is smaller than it may
      be where that raises the mean log-density by more than the standard error of the difference,
      and 0, scales alone, where the gain over 0 is less than its error. So few rows, outliers and
      heavy tails, whose correlations are chance, do not make W worse for unseen rows;
    * fewer than 8 rows give no correlations, and means and scales as those of `ActNorm`; an empty
      batch starts nothing;
    * eigenvalues of the correlations below 1e-4 are raised to it: dependent directions leave with
      a variance below 1, and training, which stretches them further, stays steady;
    * the roundings of the features count as noise: their variance is added to that of the feature;
    * log d is kept within +-70: beyond scales of 1e-30 and 1e30 the rest is left to what follows;
    * NaN and infinity are refused, and nothing is stored.

    Only parameters that are all still zero are started: what was restored without its flag, or was
    learned through the inverse (variational inference), stays. The inverse, and so sampling, never
    ends the waiting. What `torch.func` lends, and factors that are computed from other parameters
    (`parametrize`, `prune`), start as those of `ActNorm` do, or not. Once started, no call waits
    for the device or copies from the host: the transform can be part of a CUDA graph, and compiles
    to one graph.

    Cost: F^3 multiplications for W, and B F^2 for B rows or pixels; B F^2 for the inverse. It
    computes in the precision of its weights, inside autocast too, and solves in float32 at least.
    `CompositeTransform` computes the W of all its linear maps together.

    References:
        Kingma, Dhariwal. Glow: Generative flow with invertible 1x1 convolutions, 2018.
        Oliva et al. Transformation autoregressive networks, 2018.
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.

    Args:
        features: number F of features (B, F), or of channels (B, F, H, W).
        initialization: "identity", or "whitening" of the first batch in training mode.
        bias: whether there is b; without, whitening is about 0 instead of the mean.

    Raises:
        ValueError: if `features` is not positive, or `initialization` is unknown; in use, if inputs
            have another shape or precision than the weights, or a start cannot be stored.

    Example:
        >>> linear = LinearTransform(2, initialization="whitening")
        >>> rows = torch.randn(100, 2) @ torch.tensor([[3.0, 1.0], [0.0, 0.1]]) + 5
        >>> outputs, logabsdet = linear(rows)
        >>> torch.allclose(outputs.T.cov(), torch.eye(2), atol=1e-3)
        True
        >>> torch.allclose(linear.inverse(outputs)[0], rows, atol=1e-4)
        True
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse another diagonal, which the products of the forward pass would not see."""
        super().__init_subclass__(**kwargs)
        own = {
            each for each in _METHODS if getattr(cls, each) is not getattr(LinearTransform, each)
        }
        if "log_diagonal" in own and len(own) < len(_METHODS):
            raise TypeError(
                f"{cls.__name__} replaces log_diagonal, from which inverse alone is computed: "
                "replace forward and inverse, too, or change factors by a parametrization"
            )

    def __init__(
        self, features: int, *, initialization: Initialization = "identity", bias: bool = True
    ) -> None:
        super().__init__()
        features = validated_size("features", features)
        self.factors = nn.Parameter(torch.zeros(features, features))
        """L below the diagonal, U above; on it what log d is computed from."""
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None
        self._wait_for_rows(initialization, get_args(Initialization))

    def forward(
        self,
        inputs: Tensor,
        context: Tensor | None = None,
        *,
        weight: LinearWeight | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (W x + b, sum of log d over pixels), shapes (B, *) and (B,).

        Args:
            inputs: x, shape (B, F) or (B, F, H, W).
            context: not used.
            weight: W where it is computed already, as `weights_together` returns it.
        """
        inputs = self._checked(inputs)
        rows = as_rows(inputs)
        if self.training and not self._has_started:
            self._start(rows)
        with training_precision(self, inputs.device):
            matrix, logabsdet = weights_together([self])[0] if weight is None else weight
            outputs = F.linear(rows, matrix, self.bias)
        return like_inputs(outputs, inputs), for_each_input(logabsdet, inputs)

    @property
    def takes_weight(self) -> bool:
        """Whether `forward` may be given a W that was computed with others'.

        Not before its start, nor in subclasses, nor with hooks before the call, which may change W.
        """
        is_own = type(self) is LinearTransform and "forward" not in vars(self)
        is_ready = self._has_started or not self.training
        return is_own and is_ready and not self._forward_pre_hooks

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (W^-1 (y - b), minus the sum of log d over pixels), shapes (B, *) and (B,)."""
        run_weight_hooks(self)
        inputs = self._checked(inputs)
        rows = at_least_single(as_rows(inputs))
        if self.bias is not None:
            rows = rows - self.bias
        with full_precision(inputs.device):
            log_diagonal = self.log_diagonal()
            lower, upper = map(at_least_single, self._lower_and_upper(log_diagonal))
            solve = torch.linalg.solve_triangular
            columns = solve(lower, rows.mT, upper=False, unitriangular=True)
            columns = solve(upper, columns, upper=True).to(inputs.dtype)
        return like_inputs(columns.mT, inputs), -for_each_input(log_diagonal.sum(), inputs)

    def weight(self) -> Tensor:
        """Return W, shape (F, F)."""
        run_weight_hooks(self)
        with full_precision(self.factors.device):
            return weights_together([self])[0].matrix

    def log_diagonal(self) -> Tensor:
        """Return log d, shape (F,)."""
        return _log_diagonals(self.factors)

    def _lower_and_upper(self, log_diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Return L without its ones, and U."""
        return _lower_and_upper(self.factors, log_diagonal)

    def _checked(self, inputs: Tensor) -> Tensor:
        require_channels(inputs, self.factors.shape[0])
        return like_weights(inputs, self)

    def initialize(self, rows: Tensor) -> None:
        """Start by whitening rows that are given, whatever the parameters are.

        Args:
            rows: shape (N, F) or (N, F, H, W), of any dtype; a few thousand are plenty. Where
                several processes train one model, each gives its own, at the same time.

        Raises:
            ValueError: if the shape is another, there is no row, or a value is not finite.
        """
        require_channels(rows, self.factors.shape[0])
        if not self._start_from(as_rows(rows)):
            raise ValueError(f"at least one row is needed to start from, got {tuple(rows.shape)}")

    def has_learned(self) -> Tensor:
        """Return whether a parameter is not zero, as all are until it starts: shape ()."""
        is_mixed = self.factors.any()
        return is_mixed if self.bias is None else is_mixed | self.bias.any()

    @torch.no_grad()
    def _start_from(self, rows: Tensor) -> bool:
        """Start from rows (N, F), and return whether there were any."""
        require_own(self, "factors", *([] if self.bias is None else ["bias"]))
        rows = rows.to(self.factors.device, torch.float64)
        moments = _joined_moments(rows, is_centred=self.bias is not None)
        if moments.num_rows == 0:
            return False
        start = _of_few if moments.num_rows < ENOUGH_ROWS else _whitening
        factor, scale, mean = start(moments, torch.finfo(self.factors.dtype).eps)
        bound = _MAX_LOG_DIAGONAL_AT_START
        log_diagonal = (factor.diagonal().log() - scale.log()).clamp(-bound, bound)
        raw = _MAX_LOG_DIAGONAL * (log_diagonal / _MAX_LOG_DIAGONAL).atanh()
        lower = (factor / factor.diagonal()).tril(-1)
        self.factors.copy_(lower + raw.diag_embed())
        if self.bias is not None:
            self.bias.copy_(-(self.weight().double() @ mean))
        note_start(self)
        return True

    def extra_repr(self) -> str:
        """Show the size, and whether there is a bias."""
        return f"features={self.factors.shape[0]}, bias={self.bias is not None}"


class LinearWeight(NamedTuple):
    """What the parameters of a `LinearTransform` say.

    Attributes:
        matrix: W, shape (F, F).
        logabsdet: log|det W|, a scalar.
    """

    matrix: Tensor
    logabsdet: Tensor


def weights_together(transforms: Sequence[LinearTransform]) -> list[LinearWeight]:
    """Return the weight of each of several transforms of one size, in the operations of one.

    Args:
        transforms: of the same number of features, precision and device.
    """
    factors: list[Tensor] = [each.factors for each in transforms]
    together = factors[0][None] if len(factors) == 1 else torch.stack(factors)
    matrices, logabsdets = (_products if is_traced() else _Products.apply)(together)
    pairs = zip(matrices.unbind(0), logabsdets.unbind(0), strict=True)
    return [LinearWeight(*pair) for pair in pairs]


def _products(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return W = L U and log|det W| for factors (K, F, F): the slow twin of `_Products`."""
    log_diagonals = _log_diagonals(factors)
    lower, upper = _lower_and_upper(factors, log_diagonals)
    return torch.baddbmm(upper, lower, upper), log_diagonals.sum(-1)


def _log_diagonals(factors: Tensor) -> Tensor:
    raw = factors.diagonal(dim1=-2, dim2=-1)
    return _MAX_LOG_DIAGONAL * (raw / _MAX_LOG_DIAGONAL).tanh()


def _lower_and_upper(factors: Tensor, log_diagonals: Tensor) -> tuple[Tensor, Tensor]:
    return factors.tril(-1), factors.triu(1) + log_diagonals.exp().diag_embed()


@in_full_precision
class _Products(torch.autograd.Function):
    r"""W = L U and log\|det W\| as one node, derived by hand.

    With cotangents G of W and c of log\|det W\|, and T = L^T G,

        of L: the part of G U^T below the diagonal,    of U: the part of T above it,
        of raw_j: (T_jj d_j + c) (1 - tanh(raw_j / 80)^2).

    Second derivatives are those of the slow twin, `_products`.
    """

    @staticmethod
    def forward(ctx: Any, factors: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = factors.tril(-1), factors.triu()
        diagonals = upper.diagonal(dim1=-2, dim2=-1)
        bent = (diagonals / _MAX_LOG_DIAGONAL).tanh_()
        torch.mul(bent, _MAX_LOG_DIAGONAL, out=diagonals)
        logabsdets = diagonals.sum(-1)
        diagonals.exp_()
        ctx.save_for_backward(factors, lower, upper, bent)
        return torch.baddbmm(upper, lower, upper), logabsdets

    @staticmethod
    def backward(ctx: Any, of_matrices: Tensor, of_logabsdets: Tensor) -> Tensor | None:
        factors, lower, upper, bent = ctx.saved_tensors
        if torch.is_grad_enabled():
            (found,) = pulled_back(_products, [of_matrices, of_logabsdets], [factors])
            return found
        of_upper = torch.baddbmm(of_matrices, lower.mT, of_matrices)
        of_lower = torch.bmm(of_matrices, upper.mT)
        found = of_lower.tril_(-1).add_(of_upper.triu())
        diagonals = found.diagonal(dim1=-2, dim2=-1)
        diagonals.mul_(upper.diagonal(dim1=-2, dim2=-1)).add_(of_logabsdets[:, None])
        diagonals.addcmul_(diagonals * bent, bent, value=-1)
        return found


class _Moments(NamedTuple):
    """Of the rows of all processes.

    Attributes:
        num_rows: N.
        mean: shape (F,).
        largest: of the magnitudes, 1 where all are zero, shape (F,).
        deviations: of the rows of this process from the mean, over `largest`, shape (n, F).
        covariance: of the values over `largest`, shape (F, F).
        freedom: how many squares it is the mean of.
    """

    num_rows: int
    mean: Tensor
    largest: Tensor
    deviations: Tensor
    covariance: Tensor
    freedom: int


def _joined_moments(rows: Tensor, is_centred: bool) -> _Moments:
    """Return the moments of rows (N, F), refusing what is not finite in every process alike."""
    features = rows.shape[1]
    count = int(over_processes(rows.new_tensor(float(rows.shape[0]))))
    largest = torch.cat([rows.abs(), rows.new_zeros(1, features)]).amax(0)
    largest = over_processes(largest, "MAX")
    largest = torch.where(largest > 0, largest, 1)
    scaled = rows / largest
    mean = over_processes(scaled.sum(0)) / max(1, count)
    if not bool(mean.isfinite().all()):
        wrong = (~mean.isfinite()).nonzero().flatten().tolist()
        raise ValueError(
            f"the rows that LinearTransform starts from hold NaN or infinite values in features "
            f"{wrong}; remove or replace them"
        )
    deviations = scaled - mean if is_centred else scaled
    freedom = max(1, count - is_centred)
    covariance = over_processes(deviations.mT @ deviations) / freedom
    return _Moments(count, mean * largest, largest, deviations, covariance, freedom)


def _of_few(moments: _Moments, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return no correlations, and the scales and means (F,) of a few rows."""
    deviation = moments.covariance.diagonal().sqrt()
    deviation = torch.where(deviation <= _ROUNDINGS * rounding, 0.0, deviation * moments.largest)
    mean, scale = likely_moments(moments.mean, deviation, moments.num_rows)
    return torch.ones_like(scale).diag(), scale, mean


def _whitening(moments: _Moments, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inverse Cholesky factor (F, F) of the correlations, and scales and means (F,).

    As `LinearTransform` describes it; `rounding` is the relative one of the values.
    """
    deviation = moments.covariance.diagonal().sqrt()
    noise = _ROUNDINGS * rounding
    is_kept = deviation <= noise
    deviation = torch.where(is_kept, math.inf, deviation)
    correlation = moments.covariance / deviation / deviation[:, None]
    correlation.diagonal().copy_(1 + (noise / deviation).square())
    eigenvalues, vectors = torch.linalg.eigh(correlation)
    squares = (moments.deviations / deviation @ vectors).square()
    most = min(1.0, moments.freedom / (_ROWS_PER_FEATURE * deviation.shape[0]))
    trust = most * eigenvalues.new_tensor(_TRUST)[:, None]
    best = _best_trust(_scores_left_out(squares, eigenvalues, trust, moments.num_rows), moments)
    regular = vectors * _trusted(eigenvalues, trust).index_select(0, best) @ vectors.mT
    identity = torch.ones_like(deviation).diag()
    cholesky = torch.linalg.cholesky(regular)
    factor = torch.linalg.solve_triangular(cholesky, identity, upper=False)
    return factor, torch.where(is_kept, 1, deviation * moments.largest), moments.mean


def _trusted(eigenvalues: Tensor, trust: Tensor) -> Tensor:
    """Return the eigenvalues of t C + (1 - t) I for each t (T, 1), those of C given, (T, F)."""
    return (trust * eigenvalues + (1 - trust)).clamp_min(_SMALLEST_EIGENVALUE)


def _scores_left_out(squares: Tensor, eigenvalues: Tensor, trust: Tensor, num_rows: int) -> Tensor:
    r"""Return the log-density of each row under the normal of all others, for each t, (n, T).

    Without row z the covariance is (N - 1) / (N - 2) (C - a z z') with a = N / (N - 1)^2 and the
    mean differs by z / (N - 1). With B = t (N - 1) / (N - 2) C + (1 - t) I and h = z' B^-1 z the
    determinant and the quadratic form of B - b z z', b = t a (N - 1) / (N - 2), are

        \|B\| (1 - b h),    (N / (N - 1))^2 h / (1 - b h).

    Args:
        squares: of the standardised rows of this process, along the eigenvectors, shape (n, F).
        eigenvalues: of the correlations C, shape (F,).
        trust: each t, shape (T, 1).
        num_rows: N, of all processes.
    """
    enlarged = (num_rows - 1) / (num_rows - 2)
    trusted = _trusted(enlarged * eigenvalues, trust)
    forms = squares @ trusted.reciprocal().mT
    weight = trust[:, 0] * enlarged * num_rows / (num_rows - 1) ** 2
    rest = (1 - weight * forms).clamp_min(torch.finfo(forms.dtype).eps)
    distances = (num_rows / (num_rows - 1)) ** 2 * forms / rest
    return -(rest.log() + distances + trusted.log().sum(1)) / 2


def _best_trust(scores: Tensor, moments: _Moments) -> Tensor:
    """Return which t to take, (1,), as `LinearTransform` describes it, from the scores (n, T)."""
    bases = (scores[:, -1:], scores[:, :1])
    gains = torch.stack([scores - base for base in bases])
    sums = torch.stack([gains.sum(1), gains.square().sum(1)])
    mean, square = over_processes(sums) / moments.num_rows
    error = ((square - mean.square()).clamp_min(0) / moments.num_rows).sqrt()
    over_all, over_none = mean - error
    best = over_all.argmax(0, keepdim=True)
    return torch.where(over_none.index_select(0, best) > 0, best, 0)
