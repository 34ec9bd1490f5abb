"""Toy densities with exact log-probabilities, and tabular data that is ready to train on."""

from nflows_iresnet.datasets.catalogue import TOYS, available, load, make
from nflows_iresnet.datasets.curves import Moons, TwoSpirals
from nflows_iresnet.datasets.dataset import Dataset
from nflows_iresnet.datasets.density import Density
from nflows_iresnet.datasets.toys import Checkerboard, Circles, EightGaussians, Pinwheel

__all__ = [
    "TOYS",
    "Checkerboard",
    "Circles",
    "Dataset",
    "Density",
    "EightGaussians",
    "Moons",
    "Pinwheel",
    "TwoSpirals",
    "available",
    "load",
    "make",
]
