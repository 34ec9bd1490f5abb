"""The commands that train densities: one machinery, two sets of defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Published = dict[str, dict[str, str]]


@dataclass(frozen=True)
class Preset:
    """What a command does unless it is told otherwise.

    Args:
        command: its name.
        help: one line.
        examples: what `--help` shows at the end.
        datasets: rows of a table, or toy densities.
        image_datasets: with --images.
        models: for rows.
        image_models: for images.
        options: defaults that differ from those of `RunConfig`.
        finds_images: whether names of image sets imply --images.
        shows_published: whether the numbers of the papers stand beside those measured.
        tuned: by the name of a set of images and the kind of the device, the defaults where that
            set is all that is compared.
    """

    command: str
    help: str
    examples: str
    datasets: tuple[str, ...]
    image_datasets: tuple[str, ...]
    models: tuple[str, ...]
    image_models: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    finds_images: bool = False
    shows_published: bool = False
    tuned: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    def tuned_to(self, names: Sequence[str], device: str) -> dict[str, Any]:
        """Return the defaults for these sets of images on a device."""
        return self.tuned.get(names[0], {}).get(device, {}) if len(set(names)) == 1 else {}

    def published_beside(self, *, images: bool) -> Published:
        """Return the published numbers of the models that are those of the papers.

        For rows that is the residual flow without splines and linear layers; for images there are
        none.
        """
        if not self.shows_published:
            return {}
        from nflows_iresnet.experiments.published import BITS_PER_DIM

        other = "residual-flow-plain" if images else "residual-flow"
        return {model: row for model, row in BITS_PER_DIM.items() if model != other}


_MNIST = {
    "models": ("residual-flow",),
    "steps": None,
    "learning_rate": 3e-3,
    "alpha": 1e-6,
    "marginal_bins": 16,
    "num_terms": 8,
}
MNIST: dict[str, dict[str, Any]] = {
    "cuda": {
        **_MNIST,
        "budget": 600.0,
        "hidden_features": 128,
        "num_layers": 8,
        "batch_size": 256,
        "training_precision": "tf32",
        "exact_images": 64,
    },
    "cpu": {
        **_MNIST,
        "budget": 120.0,
        "hidden_features": 32,
        "num_layers": 2,
        "exact_images": 8,
    },
}
"""Ten minutes on a GPU, where a step of batch 256 takes 69 ms, and two minutes on a CPU."""

COMPARE = Preset(
    command="compare",
    help="Train flows on the same data and report which wins, at what cost.",
    examples="""\
examples:
  nflows-iresnet compare                                  three toy densities, five models
  nflows-iresnet compare my.csv --steps 3000 --out here   your own rows (.csv or .npy)
  nflows-iresnet compare moons --models residual-flow normflows-residual --repeats 3
  nflows-iresnet compare casp --data-dir data --models hybrid nsf-coupling maf --same-start
  nflows-iresnet compare digits --budget 60               one minute of training per model
  nflows-iresnet compare my.csv --steps 3000 --out here --resume    go on after an interruption
  nflows-iresnet compare digits --images                  multi-scale flows, bits per dimension
  nflows-iresnet compare mnist --images --data-dir data --device cuda --minutes 10
""",
    datasets=("moons", "8-gaussians", "checkerboard"),
    image_datasets=("digits",),
    models=("residual-flow", "i-resnet", "realnvp", "maf", "glow"),
    image_models=("residual-flow", "glow", "realnvp"),
    tuned={"mnist": MNIST},
)

TABLE2 = Preset(
    command="table2",
    help="Bits per dimension of generative models, beside the published numbers.",
    examples="""\
examples:
  nflows-iresnet table2                                   digits, minutes on a CPU
  nflows-iresnet table2 --quick                           does it run? half a minute
  nflows-iresnet table2 moons casp                        nats of toys and tables
  nflows-iresnet table2 mnist --data-dir data --device cuda --budget 3600 --hidden-features 256
  nflows-iresnet table2 digits --out here --resume        go on after an interruption

It is `compare` with other defaults: the same steps, the same learning rate and as many parameters
for every model. digits, toys and tables are rows, for which i-resnet and residual-flow-plain are
the papers' models, InvertibleResNet and ResidualFlow without splines and linear layers, and
residual-flow is ResidualFlow as it is by default; larger images (or --images) get multi-scale flows
for glow, realnvp, i-resnet and residual-flow, and flows on the flattened logits for the others,
whose width can match the parameters only coarsely. nice-scaled and realnvp-scaled have the scaling
of the papers, which nflows' flows lack. FFJORD needs zuko: pip install 'nflows-iresnet[ffjord]'; it
trains with Hutchinson's estimate and is tested with the exact trace, like every other row. The
published columns are what the papers report for MNIST and CIFAR-10: other data, networks a hundred
times larger, days of training. Compare the order of the models, not the numbers.
""",
    datasets=("digits",),
    image_datasets=("mnist",),
    models=(
        *("nice-scaled", "made", "maf", "realnvp-scaled", "glow"),
        *("ffjord", "i-resnet", "residual-flow-plain", "residual-flow"),
    ),
    image_models=(
        *("nice", "made", "maf", "realnvp", "glow", "ffjord", "i-resnet", "residual-flow"),
    ),
    options={"steps": 1000, "learning_rate": 2e-3},
    finds_images=True,
    shows_published=True,
)

QUICK: dict[str, Any] = {"steps": 20, "num_layers": 2}
"""What --quick changes."""
