"""Toy densities with exact log-probabilities, tabular data and images, ready to train on."""

from nflows_iresnet.datasets.catalogue import TOYS, available, load, make
from nflows_iresnet.datasets.curves import Moons, TwoSpirals
from nflows_iresnet.datasets.dataset import Dataset
from nflows_iresnet.datasets.density import Density
from nflows_iresnet.datasets.images import ImageDataset, available_images, load_images
from nflows_iresnet.datasets.toys import Checkerboard, Circles, EightGaussians, Pinwheel

__all__ = [
    "TOYS",
    "Checkerboard",
    "Circles",
    "Dataset",
    "Density",
    "EightGaussians",
    "ImageDataset",
    "Moons",
    "Pinwheel",
    "TwoSpirals",
    "available",
    "available_images",
    "load",
    "load_images",
    "make",
]
