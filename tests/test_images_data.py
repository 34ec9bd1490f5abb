"""Sets of images: every layout that people have, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nflows_iresnet import datasets
from nflows_iresnet.datasets import images as front
from nflows_iresnet.datasets.files import SourceFile, read_pickle
from nflows_iresnet.datasets.images import FASHION_MNIST, MNIST, parse_cifar, parse_idx

IDX = {"train-images-idx3-ubyte": 40, "t10k-images-idx3-ubyte": 12}
Layout = Callable[[Path], None]


def idx(values: np.ndarray[Any, Any]) -> bytes:
    header = bytes([0, 0, 8, values.ndim])
    return header + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def write_idx(folder: Path, pack: Callable[[bytes], bytes] = bytes, suffix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name, rows in IDX.items():
        pixels = generator.integers(0, 256, size=(rows, 4, 6))
        labels = pixels[:, 0, 0] % 10
        (folder / f"{name}{suffix}").write_bytes(pack(idx(pixels)))
        other = name.replace("images-idx3", "labels-idx1")
        (folder / f"{other}{suffix}").write_bytes(pack(idx(labels)))


def cifar_batch(rows: int, seed: int, key: bytes) -> bytes:
    data = np.random.default_rng(seed).integers(0, 256, size=(rows, 3072)).astype(np.uint8)
    return pickle.dumps({b"data": data, key: data[:, 0].astype(int).tolist()}, protocol=2)


def cifar_files(name: str) -> dict[str, bytes]:
    if name == "cifar100":
        batches = {"train": 30, "test": 6}
    else:
        batches = {**{f"data_batch_{i}": 6 for i in range(1, 6)}, "test_batch": 6}
    key = b"fine_labels" if name == "cifar100" else b"labels"
    return {file: cifar_batch(rows, i, key) for i, (file, rows) in enumerate(batches.items())}


CIFAR_FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


@pytest.fixture(autouse=True)
def unpublished(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of these tests are not the published ones, and the machine's own do not count."""
    monkeypatch.delenv("NFLOWS_IRESNET_DATA", raising=False)
    plain = replace(FASHION_MNIST, sha256=(), system_folders=())
    monkeypatch.setitem(front.IMAGE_SETS, "fashion-mnist", plain)
    monkeypatch.setitem(front.IMAGE_SETS, "mnist", replace(MNIST, sha256=()))


LAYOUTS: dict[str, tuple[str, Layout]] = {
    "plain": ("mnist", lambda folder: write_idx(folder)),
    "torchvision": ("mnist", lambda folder: write_idx(folder / "MNIST/raw")),
    "torchvision-gz": ("mnist", lambda folder: write_idx(folder / "MNIST/raw", gz, ".gz")),
    "fashion": ("fashion-mnist", lambda folder: write_idx(folder / "FashionMNIST/raw")),
    "debian": ("fashion-mnist", lambda folder: write_idx(folder / "fashion-mnist", gz, ".gz")),
}


def gz(content: bytes) -> bytes:
    return gzip.compress(content)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_idx_layouts(layout: str, tmp_path: Path) -> None:
    name, write = LAYOUTS[layout]
    write(tmp_path)
    data = datasets.load_images(name, data_dir=tmp_path, seed=3)
    assert data.shape == (1, 4, 6)
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 4, 12)
    assert (data.levels, data.seed, data.train.dtype) == (256, 3, torch.uint8)
    for images, labels in zip(*parts(data), strict=True):
        assert torch.equal(images[:, 0, 0, 0].long() % 10, labels)
    rows = torch.cat([data.train, data.validation, data.test]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 52
    assert hashlib.sha256(idx_content(tmp_path)).hexdigest() in data.source


def idx_content(folder: Path) -> bytes:
    path = next(folder.rglob("train-images*"))
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def parts(data: datasets.ImageDataset) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    labels = [data.train_labels, data.validation_labels, data.test_labels]
    return [data.train, data.validation, data.test], labels


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(name: str, packed: bool, tmp_path: Path) -> None:
    files, folder = cifar_files(name), CIFAR_FOLDERS[name]
    if packed:
        archive = {"cifar10": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz"}
        with tarfile.open(tmp_path / archive[name], "w:gz") as file:
            for member, content in files.items():
                info = tarfile.TarInfo(f"{folder}/{member}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    else:
        (tmp_path / folder).mkdir()
        for member, content in files.items():
            (tmp_path / folder / member).write_bytes(content)
    data = datasets.load_images(name, data_dir=tmp_path)
    assert data.shape == (3, 32, 32)
    assert (len(data.train), len(data.validation), len(data.test)) == (27, 3, 6)
    for images, labels in zip(*parts(data), strict=True):
        assert torch.equal(images[:, 0, 0, 0].long(), labels)
    last = pickle.loads(list(files.values())[-1])[b"data"]
    assert torch.equal(data.test.flatten(1), torch.from_numpy(last))


def test_environment_variable_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_idx(tmp_path)
    monkeypatch.setenv("NFLOWS_IRESNET_DATA", str(tmp_path))
    assert datasets.load_images("mnist").name == "mnist"
    with pytest.raises(ValueError, match="/nowhere"):
        datasets.load_images("mnist", data_dir="/nowhere")


def test_seed_decides_the_split_and_num_train_keeps_the_tests(tmp_path: Path) -> None:
    whole, again, other, few = (
        datasets.load_images("digits", seed=seed, num_train=rows)
        for seed, rows in ((0, None), (0, None), (1, None), (0, 50))
    )
    assert torch.equal(whole.train, again.train)
    assert not torch.equal(whole.train, other.train)
    assert torch.equal(few.train, whole.train[:50])
    assert torch.equal(few.test, whole.test)
    assert torch.equal(few.validation, whole.validation)
    assert "50 training" in few.split
    with pytest.raises(ValueError, match="1 to 1439"):
        datasets.load_images("digits", num_train=1440)


def test_digits_use_every_level() -> None:
    digits = datasets.load_images("digits")
    assert (int(digits.train.min()), int(digits.train.max())) == (0, digits.levels - 1)
    assert digits.num_classes == 10
    assert digits.to_bits_per_dim(torch.tensor(64.0)) == pytest.approx(1 / np.log(2))


# --- what is refused ------------------------------------------------------------------------------


def test_missing_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    for name, wanted, remedy in (
        ("mnist", "train-images-idx3-ubyte", "torchvision"),
        ("fashion-mnist", "t10k-labels-idx1-ubyte", "dataset-fashion-mnist"),
        ("cifar10", "data_batch_1", "cifar-10-python.tar.gz"),
        ("cifar100", "train", "cifar-100-python.tar.gz"),
    ):
        with pytest.raises(ValueError) as refused:
            datasets.load_images(name, data_dir=tmp_path)
        message = str(refused.value)
        for text in (name, wanted, str(tmp_path), remedy, "NFLOWS_IRESNET_DATA", "--data-dir"):
            assert text in message
    with pytest.raises(
        ValueError, match=r"^mnist: no folder was named that has .*; get these four "
    ):
        datasets.load_images("mnist")
    with pytest.raises(ValueError, match="choose from digits, mnist"):
        datasets.load_images("svhn")
    with pytest.raises(ValueError, match="'mnist' is a set of images: use load_images"):
        datasets.load("mnist")


def test_other_content_than_published_is_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    with pytest.raises(ValueError, match="not the published file: its sha256 is"):
        MNIST.read(tmp_path)


class Harmful:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch harm",)


def test_a_pickle_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"system, which no data set needs"):
        read_pickle(SourceFile("bad", pickle.dumps({b"data": Harmful()})))
    assert not list(tmp_path.iterdir())


DAMAGED_IDX = {
    "cut short": idx(np.zeros((3, 2, 2)))[:-1],
    "not an IDX": b"\x80\x02",
    "begins with 00000801": idx(np.zeros(3)),
}


@pytest.mark.parametrize("message", DAMAGED_IDX)
def test_damaged_idx(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_idx(SourceFile("file", DAMAGED_IDX[message]), 3)


DAMAGED_CIFAR = {
    "readable pickle": b"no pickle",
    "a dictionary with": pickle.dumps([1]),
    "uint8 of shape": pickle.dumps({b"data": np.zeros((2, 7), np.uint8), b"labels": [1, 2]}),
    r"and \(1,\)": pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}),
}


@pytest.mark.parametrize("message", DAMAGED_CIFAR)
def test_damaged_cifar(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_cifar(SourceFile("file", DAMAGED_CIFAR[message]), "labels")


def test_damaged_archives(tmp_path: Path) -> None:
    write_idx(tmp_path, lambda content: gz(content)[:-9], ".gz")
    with pytest.raises(ValueError, match="is damaged"):
        datasets.load_images("mnist", data_dir=tmp_path)
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="damaged or incomplete"):
        datasets.load_images("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(("name", "pixels"), [("mnist", 784), ("fashion-mnist", 784)])
def test_the_real_files_where_a_folder_is_named(
    name: str, pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    real = MNIST if name == "mnist" else FASHION_MNIST
    try:
        found = real.read()
    except ValueError as error:
        pytest.skip(str(error))
    assert (len(found.images), found.num_test, found.images[0].numel()) == (70_000, 10_000, pixels)
