"""A classifier whose features are guaranteed to determine the image, and that turns them back.

Run with `python examples/classify.py [--quick] [--coeff C] [--out PICTURE]`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy

from nflows_iresnet.classifiers import InvertibleClassifier
from nflows_iresnet.datasets import ImageDataset, load_images

matplotlib.use("Agg")
from matplotlib import pyplot


def train(classifier: InvertibleClassifier, data: ImageDataset, steps: int) -> None:
    optimizer = torch.optim.Adam(classifier.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in track(range(steps), description="training"):
        rows = torch.randint(len(data.train), (128,))
        loss = cross_entropy(classifier(data.train[rows]), data.train_labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


def draw(images: Tensor, features: Tensor, decoded: Tensor, path: Path) -> None:
    mean = features.mean(dim=1, keepdim=True)
    figure, axes = pyplot.subplots(3, len(images), figsize=(len(images), 3.2))
    for row, (label, pictures) in zip(
        axes, {"image": images, "features": mean, "decoded": decoded}.items(), strict=True
    ):
        row[0].set_title(label, loc="left")
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture[0], cmap="gray")
            axis.set_axis_off()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--coeff", type=float, default=0.9, help="bound of Lip(g) (default 0.9)")
    parser.add_argument("--quick", action="store_true", help="100 steps instead of 400")
    parser.add_argument("--out", type=Path, default=Path("classify.png"), help="picture to save")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    data = load_images("digits")
    classifier = InvertibleClassifier(
        data.shape, data.num_classes, 32, padding=3, levels=data.levels, coeff=arguments.coeff
    )
    train(classifier, data, 100 if arguments.quick else 400)
    classifier.eval()
    with torch.no_grad():
        wrong = (classifier(data.test).argmax(dim=1) != data.test_labels).sum()
        features = classifier.encode(data.test)
        decoded = classifier.decode(features)
    print(f"{int(wrong)} of {len(data.test)} test images misclassified")
    print(f"certified bound of Lip(g): {classifier.lipschitz_bound():.4f}")
    print(f"inverse guaranteed: {'yes' if classifier.has_guaranteed_inverse() else 'no'}")
    error = (decoded - data.test).abs().max()
    print(f"largest error of a decoded pixel: {error:.1e} of {data.levels - 1}")
    draw(data.test[:8], features[:8], decoded[:8], arguments.out)
    print(f"picture: {arguments.out}")


if __name__ == "__main__":
    main()
