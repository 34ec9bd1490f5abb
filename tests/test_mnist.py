"""MNIST: `compare mnist --images` and `table1 mnist` with sizes and times of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from nflows import transforms as nflows_transforms
from torch import Tensor, nn

from nflows_iresnet import transforms
from nflows_iresnet.datasets import images as front
from nflows_iresnet.datasets.images import MNIST
from nflows_iresnet.experiments import evaluation
from nflows_iresnet.experiments.adapters import TruncatedModel
from nflows_iresnet.experiments.cli import main
from nflows_iresnet.experiments.config import RunConfig
from nflows_iresnet.experiments.models import IMAGE_MODELS, MODELS, Architecture, ImageArchitecture
from nflows_iresnet.experiments.options import (
    COMPARE,
    CompareOptions,
    Table1Options,
    parse,
    to_config,
)
from nflows_iresnet.experiments.session import LiveProgress
from nflows_iresnet.experiments.table1 import TUNED, classifiers
from nflows_iresnet.experiments.table1 import command as table1
from nflows_iresnet.flows.image import ImageResidualFlow
from nflows_iresnet.training import History, loop
from nflows_iresnet.training.checkpoints import Keeper
from nflows_iresnet.training.loop import Stepper, adam, set_learning_rate
from nflows_iresnet.training.progress import Seconds, Steps, TrainingPlan
from nflows_iresnet.training.rows import Batches
from nflows_iresnet.transforms.image import PixelwiseSpline
from tests.trained import train

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

ROWS = {"train-images-idx3-ubyte": 60, "t10k-images-idx3-ubyte": 20}


def idx(values: np.ndarray[Any, Any]) -> bytes:
    header = bytes([0, 0, 8, values.ndim])
    return header + np.array(values.shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


def strokes(rows: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return images like MNIST's, black but for a white bar, and which of ten bars it is."""
    generator = np.random.default_rng(rows)
    labels = np.arange(rows) % 10
    images = np.zeros((rows, 8, 8))
    for image, label in zip(images, labels, strict=True):
        row = 1 + label % 5
        image[row : row + 2, 1:7] = generator.integers(120, 256, size=(2, 6))
        if label >= 5:
            image[:] = image.T.copy()
    return images, labels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four IDX files, which are taken although they are not the published ones."""
    monkeypatch.setitem(front.IMAGE_SETS, "mnist", replace(MNIST, sha256=()))
    found = tmp_path / "data"
    found.mkdir()
    for name, rows in ROWS.items():
        images, labels = strokes(rows)
        (found / name).write_bytes(idx(images))
        (found / name.replace("images-idx3", "labels-idx1")).write_bytes(idx(labels))
    return found


SMALL = ["--hidden-features", "8", "--num-layers", "1", "--batch-size", "16", "--quiet"]


def compare(folder: Path, *more: str) -> list[str]:
    out = ["--out", str(folder.parent / "out"), "--device", "cpu"]
    return ["compare", "mnist", "--images", "--data-dir", str(folder), *SMALL, *out, *more]


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder.parent / "out" / "results.json").read_text())
    return found


# --- the command ----------------------------------------------------------------------------------


def test_minutes_are_a_time_of_training_and_everything_is_written(folder: Path) -> None:
    assert main(compare(folder, "--minutes", "0.02")) == 0
    record = results(folder)
    (result,) = record["results"]
    assert (record["arguments"]["budget"], record["arguments"]["steps"]) == (1.2, None)
    assert (result["model"], result["failures"]) == ("residual-flow", [])
    curve = result["training"]["curve"]
    best = min(range(len(curve)), key=lambda index: curve[index]["validation"])
    stopped_early = len(curve) - 1 - best >= 8
    assert result["training"]["seconds"] >= 1.2 or stopped_early
    assert not result["training"]["is_captured"]
    assert result["training"]["capture_reason"] is None
    metrics = result["metrics"]
    assert metrics["bits_per_dim"] < 8
    assert metrics["bits_per_dim_se"] > 0
    assert metrics["round_trip_max"] < 0.1
    seconds = [point["seconds"] for point in curve]
    assert seconds == sorted(seconds)
    assert record["datasets"][0]["num_test"] == 20
    written = {path.name for path in (folder.parent / "out").glob("*.png")}
    kinds = ("samples", "reconstructions")
    assert written == {"mnist.png", *(f"mnist--residual-flow--{kind}.png" for kind in kinds)}
    page = (folder.parent / "out" / "report.html").read_text()
    assert "1.2 s of training per model" in page
    assert "--budget 1.2" in page


def test_a_run_of_minutes_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = compare(folder, "--minutes", "0.05")
    done: list[float] = []

    def cut(self: LiveProgress, fraction: float, loss: float) -> None:
        done.append(fraction)
        if len(done) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(LiveProgress, "step", cut)
        assert main([*command, "--checkpoint-minutes", "1e-9"]) == 130
    cut_at, steps = done[-1], len(done)
    monkeypatch.setattr(LiveProgress, "step", lambda self, fraction, loss: done.append(fraction))
    assert main([*command, "--resume"]) == 0
    assert done[steps] > 0.5 * cut_at, "what was trained before counts"
    (result,) = results(folder)["results"]
    assert result["training"]["steps"] == len(done) - 1, "the step under way is lost, no other"


def chosen(*words: str) -> RunConfig:
    return to_config(cast(CompareOptions, parse(["compare", *words])))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_mnist_has_defaults_that_suit_the_device(device: str) -> None:
    tuned = COMPARE.tuned["mnist"][device]
    config = chosen("mnist", "--images", "--device", device)
    assert {name: getattr(config, name) for name in tuned} == tuned
    assert config.steps is None
    later = chosen("mnist", "--images", "--device", device, "--minutes", "3", "--num-terms", "0")
    assert (later.budget, later.num_terms, later.alpha) == (180, 0, 1e-6)
    assert chosen("mnist", "--images", "--device", device, "--steps", "9").budget is None
    quick = chosen("mnist", "--images", "--device", device, "--quick")
    assert (quick.steps, quick.budget) == (20, None)


@pytest.mark.usefixtures("gpu")
def test_only_mnist_alone_has_them() -> None:
    for words in (["digits"], ["mnist", "digits"], ["fashion-mnist"]):
        config = chosen(*words, "--images", "--device", "cuda")
        assert (config.budget, config.alpha, config.training_precision) == (None, 0.05, "float32")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--minutes", "0", "'0' is not a positive number"),
        ("--alpha", "0.5", "alpha must be between 0 and 0.5"),
        ("--marginal-bins", "-1", "'-1' is not an integer"),
        ("--training-precision", "half", "'half' is none of float32, tf32"),
    ],
)
def test_what_cannot_work_is_named(
    option: str, value: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(compare(folder, option, value)) == 2
    assert message in capsys.readouterr().err


def test_one_length_of_training_is_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(compare(folder, "--minutes", "1", "--steps", "3")) == 2
    assert "not allowed with" in capsys.readouterr().err


# --- the flow -------------------------------------------------------------------------------------


def pixels(rows: int = 2000) -> Tensor:
    images, _ = strokes(rows)
    torch.manual_seed(0)
    return transforms.dequantize(torch.from_numpy(images).to(torch.uint8)[:, None])


def bits(flow: ImageResidualFlow, images: Tensor) -> float:
    flow.eval()
    with torch.no_grad():
        return -float(flow.log_prob(images).mean()) / (images[0].numel() * math.log(2))


def test_a_start_from_images_is_worth_bits_and_keeps_the_inverse() -> None:
    images = pixels()
    plain, started = (
        ImageResidualFlow((1, 8, 8), 8, 1, alpha=alpha, marginal_bins=bins, linear=bins > 0)
        for alpha, bins in ((0.05, 0), (1e-6, 16))
    )
    for flow in (plain, started):
        flow.initialize(images[:1000])
    assert bits(started, images[1000:]) < bits(plain, images[1000:]) - 1
    noise = started.transform_to_noise(images[:50]).detach()
    back = started._transform.inverse(noise)[0]
    torch.testing.assert_close(back, images[:50], atol=0.02, rtol=0)


def test_a_start_starts_all_once_and_keeps_the_mode() -> None:
    flow = ImageResidualFlow((1, 8, 8), 8, 2, alpha=1e-6, marginal_bins=8, linear=True).eval()
    flow.initialize(pixels(200))
    assert not flow.training
    flags = [value for name, value in flow.state_dict().items() if name.endswith("initialized")]
    assert len(flags) >= 10
    assert all(map(bool, flags))
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.train().log_prob(pixels(30)).mean().backward()
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name
    copy = ImageResidualFlow((1, 8, 8), 8, 2, alpha=1e-6, marginal_bins=8, linear=True)
    copy.load_state_dict(flow.state_dict())
    assert bits(copy, pixels(20)) == pytest.approx(bits(flow, pixels(20)), abs=0.2)


@pytest.mark.parametrize(
    ("options", "splines"),
    [
        ({"marginal_bins": 4, "linear": True}, [(64, 4), (4, 8), (4, 8), (8, 8), (8, 8)]),
        ({"marginal_bins": 4, "linear": True, "block_bins": 0}, [(64, 4)]),
        ({"marginal_bins": 4}, [(64, 4)]),
        ({"linear": True}, []),
        ({"block_bins": 5, "alpha": None}, [(4, 5), (4, 5), (8, 5), (8, 5)]),
    ],
)
def test_splines_of_channels_stand_before_blocks_where_all_else_starts_from_data(
    options: Any, splines: list[tuple[int, int]]
) -> None:
    flow = ImageResidualFlow((1, 8, 8), 8, 2, **options)
    kind = transforms.ElementwiseRationalQuadraticSpline
    found = [tuple(each.sizes.shape[1:]) for each in flow.modules() if isinstance(each, kind)]
    assert found == splines


def test_a_flow_without_them_is_as_before() -> None:
    names = list(ImageResidualFlow((1, 8, 8), 8, 1).state_dict())
    assert not any("factors" in name or "sizes" in name for name in names)
    assert any(name.startswith("_transform._transforms.1._transforms.0") for name in names)


def test_starts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="marginal_bins needs the logit"):
        ImageResidualFlow((1, 8, 8), 8, 1, alpha=None, marginal_bins=8)
    with pytest.raises(ValueError, match="marginal_bins"):
        ImageResidualFlow((1, 8, 8), 8, 1, marginal_bins=-1)
    with pytest.raises(ValueError, match="block_bins"):
        ImageResidualFlow((1, 8, 8), 8, 1, block_bins=-1)
    flow = ImageResidualFlow((1, 8, 8), 8, 1, marginal_bins=8)
    with pytest.raises(ValueError, match="at least one"):
        flow.initialize(pixels()[:0])
    with pytest.raises(ValueError, match=r"\(batch, 1, 8, 8\)"):
        flow.initialize(torch.zeros(5, 1, 4, 4))


def test_pixelwise_splines_give_normal_marginals() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4000, 2, 2, 2, generator=generator)
    rows[:, 0] = rows[:, 0].exp()
    rows[:, 1, 0] = torch.where(rows[:, 1, 0] > 0.8, rows[:, 1, 0] + 5, 0.5 * rows[:, 1, 0])
    spline = PixelwiseSpline((2, 2, 2), 16, bound=14.0).double()
    spline.initialize(rows[:2000].clamp(max=14))
    outputs, logabsdet = spline(rows[2000:].clamp(max=14).double())
    assert outputs.shape == (2000, 2, 2, 2)
    for height, expected in ((-1.0, 0.159), (0.0, 0.5), (1.0, 0.841)):
        below = (outputs < height).double().mean(0)
        assert (below - expected).abs().max() < 0.1
    back, minus = spline.inverse(outputs)
    torch.testing.assert_close(back, rows[2000:].clamp(max=14).double())
    torch.testing.assert_close(minus, -logabsdet)


def test_pixelwise_splines_refuse_what_they_cannot_start_from() -> None:
    spline = PixelwiseSpline((1, 2, 2))
    before = spline.sizes.clone()
    with pytest.raises(ValueError, match="at least one"):
        spline.initialize(torch.zeros(0, 1, 2, 2))
    with pytest.raises(ValueError, match="finite"):
        spline.initialize(torch.full((9, 1, 2, 2), math.nan))
    for call in (spline, spline.inverse, spline.initialize):
        with pytest.raises(ValueError, match=r"\(batch, 1, 2, 2\), got \(3, 4\)"):
            call(torch.zeros(3, 4))
    assert torch.equal(spline.sizes, before)
    spline.initialize(torch.zeros(100, 1, 2, 2))
    assert torch.isfinite(spline(torch.linspace(-5, 5, 12).reshape(3, 1, 2, 2))[1]).all()


@pytest.mark.parametrize("alpha", [1e-6, 1e-4, 0.05])
def test_a_small_alpha_loses_no_digits(alpha: float) -> None:
    """Near white, 1 - p cancels unless it is computed from there."""
    logit = transforms.LogitTransform(256, alpha)
    ends = torch.tensor([0.0, 2.0**-16, 0.5, 128.0, 255.5, 256 - 2.0**-12, 256 - 2.0**-16])
    found, logabsdet = logit(ends[:, None])
    expected, log_slopes = logit(ends[:, None].double())
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(logabsdet.double(), log_slopes, atol=1e-5, rtol=1e-6)
    mirrored = logit(256 - ends[:, None].double())[0]
    torch.testing.assert_close(mirrored, -expected)
    assert logit.bound == pytest.approx(float(-expected[0]), abs=1e-9)


def test_the_series_is_for_training_and_the_size_reaches_the_flow() -> None:
    size = ImageArchitecture(
        *(64, 8, 1, 1), shape=(1, 8, 8), levels=256, num_scales=2, alpha=1e-6, marginal_bins=8
    )
    model = IMAGE_MODELS["residual-flow"].build(replace(size, num_terms=3))
    assert isinstance(model, TruncatedModel)
    kinds = [type(each) for each in model.modules()]
    assert PixelwiseSpline in kinds
    assert transforms.LinearTransform in kinds
    model.initialize(pixels(100))
    torch.manual_seed(0)
    images = pixels(50)
    values = {}
    for name, mode in (("training", True), ("evaluation", False)):
        model.train(mode)
        values[name] = model.log_prob(images).mean().item()
    assert values["training"] != values["evaluation"]
    assert type(IMAGE_MODELS["residual-flow"].build(size)) is not TruncatedModel
    for name in ("glow", "realnvp", "i-resnet", "maf"):
        logits = [
            each.alpha
            for each in IMAGE_MODELS[name].build(size).modules()
            if isinstance(each, transforms.LogitTransform)
        ]
        assert logits == [1e-6], name


def test_what_we_build_has_our_linear_map_and_not_that_of_nflows() -> None:
    """nflows' copies from the host at each call, so that no graph can hold it."""
    image = ImageArchitecture(64, 8, 2, 1, shape=(1, 8, 8), levels=256, num_scales=2)
    for spec, size in ((MODELS["glow"], Architecture(4, 8, 2, 1)), (IMAGE_MODELS["glow"], image)):
        kinds = [type(each) for each in spec.build(size).modules()]
        assert transforms.LinearTransform in kinds
        assert not any(issubclass(kind, nflows_transforms.LULinear) for kind in kinds)


# --- the loop on a GPU, on a device that is pretended ---------------------------------------------


class Gaussian(nn.Module):
    """A model of the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(3))

    def log_prob(self, inputs: Tensor, /) -> Tensor:
        return -(inputs - self.mean).square().sum(dim=1)

    def after_step(self) -> None:
        pass


class FakeGraphedStep:
    """A step as `GraphedStep` takes it, which can be told not to be captured."""

    made: int = 0
    problem: str | None = None

    def __init__(
        self, flow: Any, optimizer: Any, batch: Tensor, *, loss: Any, max_grad_norm: float
    ) -> None:
        type(self).made += 1
        if self.problem == "raises":
            raise ValueError("the optimiser is not capturable\nsecond line")
        self.is_captured = self.problem is None
        self.reason = self.problem
        self._all = flow, optimizer, loss, max_grad_norm

    def __call__(self, batch: Tensor) -> Tensor:
        flow, optimizer, loss_of, norm = self._all
        optimizer.zero_grad()
        loss: Tensor = loss_of(flow, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), norm)
        optimizer.step()
        return loss


class OnGPU(Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[FakeGraphedStep]:
    class Fresh(FakeGraphedStep):
        pass

    monkeypatch.setattr(loop, "GraphedStep", Fresh)
    return Fresh


def trained_on_gpu(
    steps: int = 20,
    on_step: Callable[[float, float], None] = lambda done, loss: None,
    keeper: Keeper | None = None,
) -> tuple[History, Gaussian]:
    model = Gaussian()
    rows = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 1
    stream = Batches(rows, 16, 0, lambda batch, _: batch.as_subclass(OnGPU))
    plan = TrainingPlan(1e-2, Steps(steps), validations=4, average_decay=0.9)

    def validate() -> float:
        return float((model.mean.detach() - 1).square().mean())

    return train(model, stream, validate, plan, on_step, keeper), model


def test_steps_on_a_gpu_are_captured_from_the_second_on(graphs: type[FakeGraphedStep]) -> None:
    looks: list[float] = []
    log, model = trained_on_gpu(20, lambda done, loss: looks.append(done))
    assert graphs.made == 1
    assert (log.is_captured, log.capture_reason, log.steps) == (True, None, 20)
    assert looks == [0.25, 0.5, 0.75, 1.0], "it looks where it validates, and after eight steps"
    reference = Gaussian()
    rows = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 1
    plan = TrainingPlan(1e-2, Steps(20), validations=4, average_decay=0.9)
    validations = iter(range(100, 0, -1))
    train(reference, Batches(rows, 16, 0), lambda: float(next(validations)), plan)
    torch.testing.assert_close(model.mean, reference.mean)


def test_between_looks_the_host_does_not_wait(graphs: type[FakeGraphedStep]) -> None:
    looks: list[float] = []
    log, _ = trained_on_gpu(200, lambda done, loss: looks.append(done))
    assert len(looks) < 200 / 5
    assert len([point.train for point in log.curve]) == 4
    assert math.isfinite(log.ms_per_step)


def test_a_training_on_a_gpu_goes_on_from_where_it_looked(
    graphs: type[FakeGraphedStep], tmp_path: Path
) -> None:
    def stop(done: float, loss: float) -> None:
        if done >= 0.75:
            raise KeyboardInterrupt

    straight, first = trained_on_gpu(100)
    keeper = Keeper(tmp_path / "run.pt", {"of": "test"}, every=0.0)
    with pytest.raises(KeyboardInterrupt):
        trained_on_gpu(100, stop, keeper)
    resumed, second = trained_on_gpu(100, keeper=keeper)
    assert resumed.steps == straight.steps == 100
    assert torch.equal(first.mean, second.mean)
    assert [point.train for point in resumed.curve] == [point.train for point in straight.curve]


@pytest.mark.parametrize("problem", ["nflows' LULinear copies from the host", "raises"])
def test_what_is_not_captured_says_why(graphs: type[FakeGraphedStep], problem: str) -> None:
    graphs.problem = problem
    log, _ = trained_on_gpu()
    assert not log.is_captured
    wanted = "ValueError: the optimiser is not capturable" if problem == "raises" else problem
    assert log.capture_reason == wanted
    assert log.steps == 20


def test_a_loss_that_is_not_finite_is_named_by_its_step(graphs: type[FakeGraphedStep]) -> None:
    model = Gaussian()
    batches = [torch.ones(4, 3)] * 5 + [torch.full((4, 3), math.inf)] * 9
    stream: Any = iter(batch.as_subclass(OnGPU) for batch in batches)
    with pytest.raises(ArithmeticError, match="at step 6"):
        train(model, stream, lambda: 0.0, TrainingPlan(1e-2, Steps(14), validations=1))


def test_the_record_and_the_console_say_what_was_not_captured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = property(lambda self: "it copies from the host")
    monkeypatch.setattr(Stepper, "capture_reason", reason)
    command = [word for word in compare(folder, "--steps", "2") if word != "--quiet"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "steps not captured: it copies from the host" in printed.err
    assert "not captured as one CUDA graph: it copies from the host" in " ".join(
        printed.out.split()
    )
    (result,) = results(folder)["results"]
    assert result["training"]["capture_reason"] == "it copies from the host"
    page = (folder.parent / "out" / "report.html").read_text()
    assert "it copies from the host" in page


def test_tensorfloat_is_for_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    from nflows_iresnet import precision

    depth = 0

    @contextmanager
    def allowed() -> Iterator[None]:
        nonlocal depth
        depth += 1
        yield
        depth -= 1

    monkeypatch.setattr(precision, "allow_tf32_in_training", allowed, raising=False)
    seen: list[tuple[str, int]] = []

    class Watching(Gaussian):
        def log_prob(self, inputs: Tensor, /) -> Tensor:
            seen.append(("step", depth))
            return super().log_prob(inputs)

    def validate() -> float:
        seen.append(("validation", depth))
        return 0.0

    for tf32 in (True, False):
        plan = TrainingPlan(1e-2, Steps(2), validations=1, tf32=tf32)
        train(Watching(), Batches(torch.randn(8, 3), 4, 0), validate, plan)
    steps, validation = ("step", 1), ("validation", 0)
    assert seen == [steps, steps, validation, ("step", 0), ("step", 0), validation]


def test_a_learning_rate_on_the_device_keeps_its_place() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    rate = torch.tensor(1e-2)
    optimizer = torch.optim.SGD([parameter], lr=rate)
    set_learning_rate(optimizer.param_groups[0], 5e-3)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(5e-3)
    plain = adam([parameter], 1e-2)
    set_learning_rate(plain.param_groups[0], 5e-3)
    assert plain.param_groups[0]["lr"] == 5e-3


def test_the_learning_rate_is_warmed_up_and_follows_the_time() -> None:
    plan = TrainingPlan(1.0, Seconds(10.0), warmup=0.1)
    assert plan.factor_at(0.0) == pytest.approx(0.1)
    assert plan.factor_at(0.05) == pytest.approx(0.5, rel=0.02)
    assert plan.factor_at(0.1) == pytest.approx(0.9755, abs=1e-3)
    assert plan.factor_at(1.0) == pytest.approx(0.0, abs=1e-9)
    assert plan.length.progress(steps=10**6, seconds=5.0) == 0.5
    assert TrainingPlan(1.0, Steps(10)).factor_at(0.0) == 1.0


def test_scores_are_of_all_test_images_and_validation_is_of_others(folder: Path) -> None:
    seen: list[int] = []
    score = evaluation.estimated_log_prob

    def spy(model: Any, inputs: Tensor, rows: int = 32) -> Tensor:
        seen.append(inputs.shape[0])
        return score(model, inputs, rows)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(evaluation, "estimated_log_prob", spy)
        assert main(compare(folder, "--steps", "2")) == 0
    assert seen[0] == 20
    data = front.load_images("mnist", folder)
    assert (len(data.train), len(data.validation), len(data.test)) == (54, 6, 20)


# --- the table of classifiers ---------------------------------------------------------------------


def table(folder: Path, *more: str) -> list[str]:
    out = ["--out", str(folder.parent / "out"), "--device", "cpu", "--quiet"]
    small = ["--hidden-channels", "4", "--num-blocks", "1", "--coeffs", "0.9", "0.5"]
    return ["table1", "mnist", "--data-dir", str(folder), *small, *out, *more]


def test_a_table_of_mnist_takes_minutes_and_certifies(folder: Path) -> None:
    assert main(table(folder, "--minutes", "0.01")) == 0
    record = results(folder)
    assert [row["model"] for row in record["table"]] == ["resnet", "vanilla", "c=0.9", "c=0.5"]
    assert (record["arguments"]["budget"], record["arguments"]["steps"]) == (0.6, None)
    assert [row["published"].get("MNIST") for row in record["table"]][2:] == ["0.40", "0.86"]
    for row in record["table"][2:]:
        assert row["guaranteed_inverse"]
        assert row["inversion"]["num_failed"] == 0
    assert all(each["failure"] is None for each in record["outcomes"])
    assert all(each["steps"] > 0 for each in record["outcomes"])
    page = (folder.parent / "out" / "report.html").read_text()
    assert "0.6 s of training" in page
    assert "--budget 0.6" in page
    assert main([*table(folder, "--minutes", "0.01"), "--resume"]) == 0


def test_training_images_are_shifted_by_whole_pixels_and_nothing_else() -> None:
    torch.manual_seed(0)
    image = torch.arange(1, 31).reshape(1, 1, 5, 6).to(torch.uint8)
    images = classifiers.shifted(image.expand(400, 1, 5, 6), 2)
    assert (images.dtype, images.shape) == (torch.uint8, (400, 1, 5, 6))
    padded = nn.functional.pad(image, (2, 2, 2, 2))[0, 0]
    views = {(i, j): padded[i : i + 5, j : j + 6] for i in range(5) for j in range(5)}
    found = [
        [place for place, view in views.items() if torch.equal(view, each[0])] for each in images
    ]
    assert all(len(places) == 1 for places in found)
    assert {places[0] for places in found} == set(views), "every shift occurs"
    assert classifiers.shifted(image, 0) is image


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_table_of_mnist_suits_the_device(device: str) -> None:
    def settings(*words: str) -> dict[str, Any]:
        parsed = cast(Table1Options, parse(["table1", *words, "--device", device]))
        return table1.to_settings(parsed).as_arguments()

    tuned, found = TUNED["mnist"][device], settings("mnist")
    assert {name: found[name] for name in tuned} == tuned
    assert settings("mnist", "--steps", "7")["budget"] is None
    assert settings("mnist", "--minutes", "2", "--num-scales", "1")["budget"] == 120
    assert settings("mnist", "--quick")["steps"] == 20
    assert settings("digits")["steps"] == 300


def test_a_table_says_what_was_not_captured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = property(lambda self: "it copies from the host")
    monkeypatch.setattr(Stepper, "capture_reason", reason)
    command = [word for word in table(folder, "--steps", "2") if word != "--quiet"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "steps not captured: it copies from the host" in printed.err
    assert "vanilla: its training step was not captured" in printed.out
    assert results(folder)["outcomes"][0]["capture_reason"] == "it copies from the host"
