"""A learned linear map of features, or of the channels of images, that can start by whitening."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
from nflows.transforms import Transform
from torch import Tensor, nn
from torch.nn import functional as F

from nflows_iresnet.precision import full_precision, like_weights, training_precision
from nflows_iresnet.transforms.normalization import depends_on, over_processes
from nflows_iresnet.validation import require_tensor, validated_size

Initialization = Literal["identity", "whitening"]

_MAX_LOG_DIAGONAL = 80.0
"""Bound of log d_j, so that no step of an optimiser makes W singular: float32 reaches e^88."""
_MAX_LOG_DIAGONAL_AT_START = 70.0
_FEWEST_ROWS = 8
"""Fewer say too little of a variance: the inverse of its estimate can be any number."""
_ROWS_PER_FEATURE = 4
"""Correlations from fewer are shrunk in proportion: unseen rows of F independent features would
cost 0.1 F nats more than without whitening at 4 F rows; unshrunk 0.4 F at 2 F, thousands at F."""
_SMALLEST_EIGENVALUE = 1e-8
"""Of the correlations: a direction is stretched at most 10^4 times more than by its scale."""
_ROUNDINGS = 8
"""How many roundings of the largest value count as noise of a feature."""


class LinearTransform(Transform):
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
    given, for either kind. Computed in float64, once, from what all processes hold together (four
    `all_reduce`, in which every process takes part). What comes out where S is not known well:

    * a constant feature (a standard deviation below 8 roundings of its largest value) is centred,
      and keeps its scale;
    * fewer than 8 rows only centre; an empty batch starts nothing;
    * correlations from n rows, n - 1 < 4 F, are multiplied by (n - 1) / (4 F);
    * eigenvalues of the correlations below 1e-8 are raised to it: dependent directions leave with
      a variance below 1;
    * the roundings of the features count as noise: their variance is added to that of the feature;
    * log d is kept within +-70: beyond scales of 1e-30 and 1e30 the rest is left to what follows;
    * NaN and infinity are refused, and nothing is stored.

    Only parameters that are all still zero are started: what was restored without its flag, or was
    learned through the inverse (variational inference), stays. The inverse, and so sampling, never
    ends the waiting. Once started, no call waits for the device or copies from the host: the
    transform can be part of a CUDA graph, and compiles to one graph.

    Cost: F^3 multiplications for W, and B F^2 for B rows or pixels; B F^2 for the inverse. It
    computes in the precision of its weights, inside autocast too.

    Args:
        features: number F of features (B, F), or of channels (B, F, H, W).
        initialization: "identity", or "whitening" of the first batch in training mode.
        bias: whether there is b; without, whitening is about 0 instead of the mean.

    Raises:
        ValueError: if `features` is not positive, or `initialization` is unknown.

    References:
        Kingma, Dhariwal. Glow: Generative flow with invertible 1x1 convolutions, 2018.
        Oliva et al. Transformation autoregressive networks, 2018.
        Durkan, Bekasov, Murray, Papamakarios. Neural spline flows, 2019.

    Example:
        >>> linear = LinearTransform(2, initialization="whitening")
        >>> rows = torch.randn(100, 2) @ torch.tensor([[3.0, 1.0], [0.0, 0.1]]) + 5
        >>> outputs, logabsdet = linear(rows)
        >>> torch.allclose(outputs.T.cov(), torch.eye(2), atol=1e-3)
        True
        >>> torch.allclose(linear.inverse(outputs)[0], rows, atol=1e-4)
        True
    """

    initialized: Tensor

    def __init__(
        self, features: int, *, initialization: Initialization = "identity", bias: bool = True
    ) -> None:
        super().__init__()
        features = validated_size("features", features)
        if initialization not in get_args(Initialization):
            known = " or ".join(map(repr, get_args(Initialization)))
            raise ValueError(
                f"initialization must be {known}, got {initialization!r}; "
                "for a start from rows call initialize(rows)"
            )
        self.factors = nn.Parameter(torch.zeros(features, features))
        """L below the diagonal, U above; on it what log d is computed from."""
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None
        self.starts_from_rows = initialization == "whitening"
        self._has_started = not self.starts_from_rows
        self.register_buffer("initialized", torch.tensor(self._has_started))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (W x + b, sum of log d over pixels), shapes (B, *) and (B,)."""
        inputs = self._checked(inputs)
        rows = _as_rows(inputs)
        if self.training and not self._has_started:
            self._start(rows)
        with training_precision(self, inputs.device):
            log_diagonal = self.log_diagonal()
            outputs = F.linear(rows, self._weight(log_diagonal), self.bias)
        return _like_inputs(outputs, inputs), _logabsdet(log_diagonal, inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (W^-1 (y - b), minus the sum of log d over pixels), shapes (B, *) and (B,)."""
        inputs = self._checked(inputs)
        rows = _as_rows(inputs)
        if self.bias is not None:
            rows = rows - self.bias
        with full_precision(inputs.device):
            log_diagonal = self.log_diagonal()
            lower, upper = self._lower_and_upper(log_diagonal)
            solve = torch.linalg.solve_triangular
            columns = solve(lower, rows.mT, upper=False, unitriangular=True)
            columns = solve(upper, columns, upper=True)
        return _like_inputs(columns.mT, inputs), -_logabsdet(log_diagonal, inputs)

    def weight(self) -> Tensor:
        """Return W, shape (F, F)."""
        with full_precision(self.factors.device):
            return self._weight(self.log_diagonal())

    def log_diagonal(self) -> Tensor:
        """Return log d, shape (F,)."""
        raw = self.factors.diagonal()
        return _MAX_LOG_DIAGONAL * (raw / _MAX_LOG_DIAGONAL).tanh()

    def _weight(self, log_diagonal: Tensor) -> Tensor:
        lower, upper = self._lower_and_upper(log_diagonal)
        return torch.addmm(upper, lower, upper)

    def _lower_and_upper(self, log_diagonal: Tensor) -> tuple[Tensor, Tensor]:
        """Return L without its ones, and U."""
        upper = self.factors.triu(1) + log_diagonal.exp().diag_embed()
        return self.factors.tril(-1), upper

    def _checked(self, inputs: Tensor) -> Tensor:
        self._check_shape(inputs)
        return like_weights(inputs, self)

    def _check_shape(self, inputs: Tensor) -> None:
        require_tensor("inputs", inputs)
        features = self.factors.shape[0]
        if inputs.dim() not in (2, 4) or inputs.shape[1] != features:
            raise ValueError(
                f"expected inputs of shape (batch, {features}) or (batch, {features}, height, "
                f"width), got {tuple(inputs.shape)}"
            )

    def initialize(self, rows: Tensor) -> None:
        """Start by whitening rows that are given, whatever the parameters are.

        Args:
            rows: shape (N, F) or (N, F, H, W), of any dtype; a few thousand are plenty. Where
                several processes train one model, each gives its own, at the same time.

        Raises:
            ValueError: if the shape is another, there is no row, or a value is not finite.
        """
        self._check_shape(rows)
        if not self._whiten(_as_rows(rows)):
            raise ValueError(f"at least one row is needed to start from, got {tuple(rows.shape)}")

    def _start(self, rows: Tensor) -> None:
        if self.initialized or self._has_learned():
            self.initialized.fill_(True)
            self._has_started = True
        elif not depends_on(rows, tuple(self.parameters())):  # samples of its own are no data
            self._whiten(rows)

    def _has_learned(self) -> bool:
        return any(bool(each.any()) for each in self.parameters())

    @torch.no_grad()
    def _whiten(self, rows: Tensor) -> bool:
        """Start from rows (N, F), and return whether there were any."""
        rows = rows.to(self.factors.device, torch.float64)
        moments = _joined_moments(rows, is_centred=self.bias is not None)
        if moments.num_rows == 0:
            return False
        factor, scale = _whitening(moments, torch.finfo(self.factors.dtype).eps)
        bound = _MAX_LOG_DIAGONAL_AT_START
        log_diagonal = (factor.diagonal().log() - scale.log()).clamp(-bound, bound)
        raw = _MAX_LOG_DIAGONAL * (log_diagonal / _MAX_LOG_DIAGONAL).atanh()
        lower = (factor / factor.diagonal()).tril(-1)
        self.factors.copy_(lower + raw.diag_embed())
        if self.bias is not None:
            self.bias.copy_(-(self.weight().double() @ moments.mean))
        self.initialized.fill_(True)
        self._has_started = True
        return True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._has_started = not self.initialized.is_meta and bool(self.initialized)

    def extra_repr(self) -> str:
        """Show the size, and whether there is a bias."""
        return f"features={self.factors.shape[0]}, bias={self.bias is not None}"


def _as_rows(inputs: Tensor) -> Tensor:
    return inputs.movedim(1, -1).reshape(-1, inputs.shape[1])


def _logabsdet(log_diagonal: Tensor, inputs: Tensor) -> Tensor:
    pixels = math.prod(inputs.shape[2:])
    return (pixels * log_diagonal.sum()).expand(inputs.shape[0])


def _like_inputs(rows: Tensor, inputs: Tensor) -> Tensor:
    batch, features, *size = inputs.shape
    return rows.reshape(batch, *size, features).movedim(-1, 1).contiguous()


class _Moments(NamedTuple):
    """Of the rows of all processes.

    Attributes:
        num_rows: N.
        mean: shape (F,).
        largest: of the magnitudes, 1 where all are zero, shape (F,).
        covariance: of the values over `largest`, shape (F, F).
        freedom: how many squares it is the mean of.
    """

    num_rows: int
    mean: Tensor
    largest: Tensor
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
    return _Moments(count, mean * largest, largest, covariance, freedom)


def _whitening(moments: _Moments, rounding: float) -> tuple[Tensor, Tensor]:
    """Return the inverse Cholesky factor (F, F) of the correlations, and the scales (F,).

    As `LinearTransform` describes it; `rounding` is the relative one of the values.
    """
    deviation = moments.covariance.diagonal().sqrt()
    noise = _ROUNDINGS * rounding
    is_kept = (deviation <= noise) | (moments.num_rows < _FEWEST_ROWS)
    deviation = torch.where(is_kept, math.inf, deviation)
    trust = min(1.0, moments.freedom / (_ROWS_PER_FEATURE * deviation.shape[0]))
    correlation = trust * moments.covariance / deviation / deviation[:, None]
    correlation.diagonal().copy_(1 + (noise / deviation).square())
    eigenvalues, vectors = torch.linalg.eigh(correlation)
    regular = vectors * eigenvalues.clamp_min(_SMALLEST_EIGENVALUE) @ vectors.mT
    identity = torch.ones_like(deviation).diag()
    cholesky = torch.linalg.cholesky(regular)
    factor = torch.linalg.solve_triangular(cholesky, identity, upper=False)
    return factor, torch.where(is_kept, 1, deviation * moments.largest)
