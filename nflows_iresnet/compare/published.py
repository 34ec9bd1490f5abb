"""What the papers report, to be shown beside what is measured here; never mixed with it."""

from __future__ import annotations

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
