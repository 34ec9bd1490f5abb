"""What the papers report, to be shown beside what is measured here; never mixed with it."""

from __future__ import annotations

import math
from dataclasses import dataclass

BITS_PER_DIM: dict[str, dict[str, str]] = {
    "nice": {"MNIST": "4.36", "CIFAR-10": "4.48†"},
    "made": {"MNIST": "2.04", "CIFAR-10": "5.67"},
    "maf": {"MNIST": "1.89", "CIFAR-10": "4.31"},
    "realnvp": {"MNIST": "1.06", "CIFAR-10": "3.49"},
    "glow": {"MNIST": "1.05", "CIFAR-10": "3.35"},
    "ffjord": {"MNIST": "0.99", "CIFAR-10": "3.40"},
    "i-resnet": {"MNIST": "1.06", "CIFAR-10": "3.45"},
    "residual-flow": {"MNIST": "0.970", "CIFAR-10": "3.280"},
    "residual-flow-plain": {"MNIST": "0.970", "CIFAR-10": "3.280"},
}
BITS_PER_DIM |= {f"{name}-scaled": BITS_PER_DIM[name] for name in ("nice", "realnvp")}
"""Behrmann et al., Invertible residual networks, 2019; Chen et al., Residual flows, 2019, for the
residual flow. The dagger marks ZCA preprocessing, which makes a number not comparable."""

CLASSIFICATION_ERROR: dict[str, dict[str, str]] = {
    "resnet": {"MNIST": "-", "CIFAR-10": "5.50", "CIFAR-100": "24.30"},
    "vanilla": {"MNIST": "0.38", "CIFAR-10": "6.69", "CIFAR-100": "23.97"},
    "c=0.9": {"MNIST": "0.40", "CIFAR-10": "6.78", "CIFAR-100": "24.58"},
    "c=0.8": {"MNIST": "0.42", "CIFAR-10": "6.86", "CIFAR-100": "24.99"},
    "c=0.7": {"MNIST": "0.40", "CIFAR-10": "6.93", "CIFAR-100": "25.99"},
    "c=0.6": {"MNIST": "0.42", "CIFAR-10": "7.72", "CIFAR-100": "27.30"},
    "c=0.5": {"MNIST": "0.86", "CIFAR-10": "8.71", "CIFAR-100": "29.45"},
}
"""Test error in percent, Behrmann et al., Invertible residual networks, 2019. The ResNet there is
ResNet-164, and c bounds each layer; here it bounds each block as a whole, which is stricter."""


@dataclass(frozen=True)
class PublishedNLL:
    """What a paper reports for one of the five standard tables: test NLL in nats, in our units.

    ``text`` has the error as the paper gives it, † where that is over repeated runs.
    """

    model: str
    paper: str
    nll: float
    text: str


_MAF = "Masked autoregressive flow for density estimation (Papamakarios et al., 2017)"
_NSF = "Neural spline flows (Durkan et al., 2019)"
_FFJORD = "FFJORD (Grathwohl et al., 2019)"
_NAF = "Neural autoregressive flows (Huang et al., 2018)"
_BLOCK_NAF = "Block neural autoregressive flow (De Cao et al., 2019)"
_SOS = "Sum-of-squares polynomial flow (Jaini et al., 2019)"
_IMPLICIT = "Implicit normalizing flows (Lu et al., 2021)"
_TABLES = ("power", "gas", "hepmass", "miniboone", "bsds300")
_LOG_LIKELIHOODS: tuple[tuple[str, str, str], ...] = (
    ("Gaussian", _MAF, "-7.74 .02  -3.58 .75  -27.93 .02  -37.24 1.07  96.67 .25"),
    ("MADE", _MAF, "-3.08 .03  3.56 .04  -20.98 .02  -15.59 .50  148.85 .28"),
    ("MADE, mixture of Gaussians", _MAF, "0.40 .01  8.47 .02  -15.15 .02  -12.27 .47  153.71 .28"),
    ("Real NVP (5)", _MAF, "-0.02 .01  4.78 1.80  -19.62 .02  -13.55 .49  152.97 .28"),
    ("Real NVP (10)", _MAF, "0.17 .01  8.33 .14  -18.71 .02  -13.84 .52  153.28 1.78"),
    ("MAF (5)", _MAF, "0.14 .01  9.07 .02  -17.70 .02  -11.75 .44  155.69 .28"),
    ("MAF (10)", _MAF, "0.24 .01  10.08 .02  -17.73 .02  -12.24 .45  154.93 .28"),
    (
        "MAF (5), mixture of Gaussians",
        _MAF,
        "0.30 .01  9.59 .02  -17.39 .02  -11.68 .44  156.36 .28",
    ),
    ("Glow with LU layers", _NSF, "0.42 .01  12.24 .03  -16.99 .02  -10.55 .45  156.95 .28"),
    ("MAF with LU layers", _NSF, "0.45 .01  12.35 .02  -17.03 .02  -10.92 .46  156.95 .28"),
    ("Q-NSF, coupling", _NSF, "0.64 .01  12.80 .02  -15.35 .02  -9.35 .44  157.65 .28"),
    ("Q-NSF, autoregressive", _NSF, "0.66 .01  12.91 .02  -14.67 .03  -9.72 .47  157.42 .28"),
    ("RQ-NSF, coupling", _NSF, "0.64 .01  13.09 .02  -14.75 .03  -9.67 .47  157.54 .28"),
    ("RQ-NSF, autoregressive", _NSF, "0.66 .01  13.09 .02  -14.01 .03  -9.22 .48  157.31 .28"),
    ("FFJORD", _FFJORD, "0.46 .01  8.59 .12  -14.92 .08  -10.43 .04  157.40 .19"),
    ("NAF", _NAF, "0.62 .01  11.96 .33  -15.09 .40  -8.86 .15  157.73 .04"),
    ("Block-NAF", _BLOCK_NAF, "0.61 .01  12.06 .09  -14.71 .38  -8.95 .07  157.36 .03"),
    ("SOS", _SOS, "0.60 .01  11.99 .41  -15.15 .10  -8.90 .11  157.48 .41"),
    ("Residual Flow", _IMPLICIT, "0.26 nan  6.20 nan  -18.91 nan  -21.81 nan  104.63 nan"),
)
"""Test log-likelihood in nats and its error on the five `_TABLES`."""

_OVER_RUNS = (_FFJORD, _NAF, _BLOCK_NAF, _SOS)

TABLE_CAPTION = (
    "Published for these splits and units, not measured here: large networks, hours to days of "
    "training. ± as printed there, mostly two standard errors over the test rows; † over runs."
)


def table_nlls(name: str) -> list[PublishedNLL]:
    """Return what papers report for one of the five tables, the best first.

    Example:
        >>> table_nlls("gas")[0].text
        '-13.09 ± 0.02'
        >>> table_nlls("moons")
        []
    """
    if name not in _TABLES:
        return []
    index = 2 * _TABLES.index(name)
    rows = []
    for model, paper, text in _LOG_LIKELIHOODS:
        value, error = map(float, text.split()[index : index + 2])
        shown = f"{-value:.2f}" if math.isnan(error) else f"{-value:.2f} ± {error:.2f}"
        rows.append(
            PublishedNLL(model, paper, -value, f"{shown}{'†' if paper in _OVER_RUNS else ''}")
        )
    return sorted(rows, key=lambda row: row.nll)
