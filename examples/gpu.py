"""All that is asked of a GPU in one run: steps, images, full precision, samples, waits, MNIST.

    python examples/gpu.py --device cuda --minutes 10 --out gpu
    python examples/gpu.py --quick                               # small sizes, on a CPU too

Writes `gpu.json`, the table `gpu.md` and, where matplotlib is installed, the picture `gpu.png` of
the training steps to a folder after each section. What is not there, fails,
or would come after the time that is given is a row of the table, with the reason; the other rows
do not depend on it. Times are medians in milliseconds between synchronisations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from nflows import transforms as nflows_transforms
from nflows.flows import Flow as NflowsFlow
from nflows.nn.nets import ResidualNet
from torch import Tensor, nn

from nflows_iresnet import flows, logdet
from nflows_iresnet.datasets import load_images
from nflows_iresnet.experiments.bench.steps import PlainNet
from nflows_iresnet.experiments.models import MODELS, Architecture

MNIST_SECONDS = 60.0
"""Less is not worth its start."""


@dataclass(frozen=True)
class Sizes:
    """Of everything that is measured."""

    steps: tuple[tuple[int, int], ...] = ((2, 256), (2, 8192), (64, 256), (64, 8192))
    hidden: int = 128
    blocks: int = 6
    shape: tuple[int, int, int] = (1, 28, 28)
    channels: int = 128
    image_blocks: int = 8
    image_batch: int = 256
    samples: int = 1000
    seconds: float = 1.5
    """How long one time is taken."""


QUICK = Sizes(((2, 32),), 16, 2, (1, 8, 8), 8, 1, 8, samples=32, seconds=0.02)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    section: str
    name: str
    value: float | None
    unit: str
    note: str = ""


@dataclass
class Run:
    """What was measured so far, where, and until when there is time."""

    device: torch.device
    sizes: Sizes
    folder: Path
    minutes: float
    start: float = field(default_factory=time.monotonic)
    rows: list[Row] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        return 60 * self.minutes - (time.monotonic() - self.start)

    def measure(self, section: str, name: str, unit: str, call: Callable[[], Any]) -> None:
        """Add a row: the number that a call returns, or a number and a note, or why there is none.

        A model that fails, for want of memory or of a package, is not to cost the others.
        """
        if self.seconds_left <= 0:
            self.add(Row(section, name, None, unit, "no time was left"))
            return
        try:
            result = call()
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            result = None, f"not available: {type(error).__name__}: {first[:160]}"
        value, note = result if isinstance(result, tuple) else (result, "")
        self.add(Row(section, name, value, unit, note))

    def add(self, row: Row) -> None:
        self.rows.append(row)
        value = "-" if row.value is None else f"{row.value:.4g} {row.unit}"
        print(f"{row.section:10} {row.name:44} {value:>16}  {row.note}", flush=True)

    def write(self) -> None:
        """Write the files anew: a run that is cut off leaves what it had measured."""
        self.folder.mkdir(parents=True, exist_ok=True)
        record = {
            "device": name_of(self.device),
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - self.start, 1),
            "sizes": asdict(self.sizes),
            "rows": [asdict(row) for row in self.rows],
        }
        (self.folder / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        lines = [f"# {record['device']}, torch {torch.__version__}", ""]
        lines += ["| section | what | value | unit | note |", "|---|---|---|---|---|"]
        for row in self.rows:
            value = "-" if row.value is None else f"{row.value:.4g}"
            note = row.note.replace("|", "/")
            lines.append(f"| {row.section} | {row.name} | {value} | {row.unit} | {note} |")
        (self.folder / "gpu.md").write_text("\n".join(lines) + "\n")
        self._draw(name_of(self.device))

    def _draw(self, device: str) -> None:
        """Draw the training steps: one panel for each size, one bar for each model."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        steps = [row for row in self.rows if row.section == "step" and row.value is not None]
        steps = [row for row in steps if ": " in row.name]
        titles = list(dict.fromkeys(row.name.split(": ")[0] for row in steps))
        if not titles:
            return
        figure = Figure(figsize=(11, 1.2 + 2.6 * ((len(titles) + 1) // 2)), layout="constrained")
        figure.suptitle(f"One training step on {device}, milliseconds")
        panels = figure.subplots((len(titles) + 1) // 2, min(2, len(titles)), squeeze=False)
        for panel in panels.flat[len(titles) :]:
            panel.set_axis_off()
        for panel, title in zip(panels.flat, titles, strict=False):
            here = [row for row in reversed(steps) if row.name.startswith(f"{title}: ")]
            names = [row.name.split(": ")[1] for row in here]
            colors = ["tab:blue" if name.startswith("ours") else "0.7" for name in names]
            bars = panel.barh(names, [cast(float, row.value) for row in here], color=colors)
            panel.bar_label(bars, fmt="%.3g", padding=3)
            panel.set(title=title, xscale="log")
            panel.spines[["top", "right"]].set_visible(False)
            panel.margins(x=0.15)
        figure.savefig(self.folder / "gpu.png", dpi=120)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Callable[[], object], run: Run) -> float:
    """Return the median time of a call, with nothing else running on the device."""
    for _ in range(3):
        call()
    times: list[float] = []
    until = time.monotonic() + run.sizes.seconds
    while len(times) < 3 or time.monotonic() < until:
        synchronize(run.device)
        start = time.perf_counter()
        call()
        synchronize(run.device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


# --- training steps ------------------------------------------------------------------------------


def spline_flow(features: int, hidden: int, blocks: int) -> NflowsFlow:
    """Return the coupling flow of Durkan et al. (2019) from nflows' parts."""

    def net(given: int, wanted: int) -> nn.Module:
        made: nn.Module = ResidualNet(given, wanted, hidden_features=hidden, num_blocks=2)
        return made

    layers: list[nn.Module] = []
    for index in range(blocks):
        mask = [1 if (place + index) % 2 else -1 for place in range(features)]
        layers += [
            nflows_transforms.PiecewiseRationalQuadraticCouplingTransform(
                mask, net, tails="linear", tail_bound=4.0
            ),
            nflows_transforms.LULinear(features),
        ]
    return NflowsFlow(
        nflows_transforms.CompositeTransform(layers), flows.StandardNormal([features])
    )


def plain(features: int, hidden: int, blocks: int) -> nn.Module:
    def branch() -> nn.Module:
        wide = [nn.Linear(features, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU()]
        return nn.Sequential(*wide, nn.Linear(hidden, features))

    return PlainNet([branch() for _ in range(blocks)])


def of_compare(name: str) -> Callable[[int, int, int], nn.Module]:
    def build(features: int, hidden: int, blocks: int) -> nn.Module:
        return cast(nn.Module, MODELS[name].build(Architecture(features, hidden, blocks, 2)))

    return build


CONTESTANTS: dict[str, tuple[Callable[[int, int, int], nn.Module], bool]] = {
    "ours": (flows.ResidualFlow, False),
    "ours, captured": (flows.ResidualFlow, True),
    "normflows": (of_compare("normflows-residual"), False),
    "Glow (nflows)": (of_compare("glow"), False),
    "NSF (nflows)": (spline_flow, False),
    "MAF (nflows)": (of_compare("maf"), False),
    "MAF (nflows), captured": (of_compare("maf"), True),
    "plain net": (plain, False),
}
"""How each model is built from features, hidden features and blocks; whether as one graph."""


def adam(model: nn.Module, device: torch.device) -> torch.optim.Adam:
    is_cuda = device.type == "cuda"
    return torch.optim.Adam(model.parameters(), lr=1e-3, foreach=True, capturable=is_cuda)


def eager_step(model: Any, batch: Tensor, device: torch.device) -> Callable[[], object]:
    optimizer = adam(model, device)
    finish = getattr(model, "after_step", None)

    def step() -> None:
        optimizer.zero_grad()
        (-model.log_prob(batch).mean()).backward()
        optimizer.step()
        if callable(finish):
            finish()

    return step


def captured_step(
    model: nn.Module, batch: Tensor, device: torch.device
) -> tuple[Callable[[], object], str]:
    """Return a step as one graph, and why it is none."""
    from nflows_iresnet.graphs import GraphedStep  # type: ignore[import-not-found, unused-ignore]

    step = GraphedStep(model, adam(model, device), batch)
    step(batch)
    step(batch)
    return lambda: step(batch), "" if step.is_captured else f"eager: {step.reason}"


def step_time(run: Run, model: Any, batch: Tensor, *, is_captured: bool) -> tuple[float, str]:
    model = model.to(run.device).train()
    with torch.no_grad():
        model.log_prob(batch)
    if is_captured:
        step, note = captured_step(model, batch, run.device)
    else:
        step, note = eager_step(model, batch, run.device), ""
    return milliseconds(step, run), note


def vectors(run: Run) -> None:
    for features, batch in run.sizes.steps:
        rows = torch.randn(batch, features, device=run.device)
        for name, (build, is_captured) in CONTESTANTS.items():

            def step(
                build: Callable[[int, int, int], nn.Module] = build,
                rows: Tensor = rows,
                is_captured: bool = is_captured,
            ) -> tuple[float, str]:
                model = build(rows.shape[1], run.sizes.hidden, run.sizes.blocks)
                return step_time(run, model, rows, is_captured=is_captured)

            run.measure("step", f"d={features}, batch={batch}: {name}", "ms", step)


def image_flow(run: Run) -> flows.ImageResidualFlow:
    sizes, series = run.sizes, logdet.PowerSeries(num_terms=8)
    flow = flows.ImageResidualFlow(
        sizes.shape, sizes.channels, sizes.image_blocks, estimator=series
    )
    flow.to(run.device)
    return flow


def pixels(run: Run, rows: int) -> Tensor:
    return 256 * torch.rand(rows, *run.sizes.shape, device=run.device)


def images(run: Run) -> None:
    for is_captured in (False, True):
        for allowed in (False, True):
            name = f"{'captured' if is_captured else 'eager'}, TF32 {'on' if allowed else 'off'}"

            def step(is_captured: bool = is_captured, allowed: bool = allowed) -> tuple[float, str]:
                with tensor_float_32(allowed):
                    batch = pixels(run, run.sizes.image_batch)
                    return step_time(run, image_flow(run), batch, is_captured=is_captured)

            run.measure("images", name, "ms", step)


# --- precision, samples, waits -------------------------------------------------------------------


@contextmanager
def tensor_float_32(allowed: bool) -> Iterator[None]:
    """Allow torch to round the factors of products and convolutions, or forbid it."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def precision(run: Run) -> None:
    """Round trips, which TensorFloat-32 must not change: forward and inverse are ours."""
    torch.manual_seed(0)
    dense = flows.ResidualFlow(64, run.sizes.hidden, run.sizes.blocks).to(run.device)
    vectors = torch.randn(100, 64, device=run.device)
    for name, flow, rows in (
        ("vectors, d=64", dense, vectors),
        ("images", image_flow(run), pixels(run, 16)),
    ):
        flow.train()
        with torch.no_grad():
            flow.log_prob(rows)
        flow.eval()
        for allowed in (False, True):

            def error(flow: Any = flow, rows: Tensor = rows, allowed: bool = allowed) -> float:
                with torch.no_grad(), tensor_float_32(allowed):
                    back = flow._transform.inverse(flow._transform(rows)[0])[0]
                return float((back - rows).abs().max())

            switch = "on" if allowed else "off"
            run.measure("round trip", f"{name}, TF32 {switch}", "largest error", error)


def host_waits(call: Callable[[], object], device: torch.device) -> float:
    """Return how often torch says that the host waits for the device."""
    if device.type != "cuda":
        raise RuntimeError("torch.cuda.set_sync_debug_mode counts on CUDA alone")
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return float(sum("synchroniz" in str(each.message) for each in caught))


def samples(run: Run) -> None:
    vectors = torch.randn(256, 8, device=run.device)
    for name, build, rows in (
        ("six vector blocks", lambda: flows.ResidualFlow(8, 64, 6), vectors),
        ("image flow", lambda: image_flow(run), pixels(run, run.sizes.image_batch)),
    ):
        flow: Any = build().to(run.device)
        step = eager_step(flow, rows, run.device)
        step()
        run.measure("waits", f"training step, {name}", "", partial(host_waits, step, run.device))
        count = run.sizes.samples if rows.dim() == 2 else min(64, run.sizes.samples)

        def sample(flow: Any = flow, count: int = count) -> None:
            with torch.no_grad():
                flow.eval().sample(count)

        def waits(sample: Callable[[], object] = sample) -> float:
            return host_waits(sample, run.device)

        def duration(sample: Callable[[], object] = sample) -> float:
            return milliseconds(sample, run)

        run.measure("samples", f"{count} of {name}", "ms", duration)
        run.measure("waits", f"samples of {name}", "", waits)


# --- MNIST ---------------------------------------------------------------------------------------


def mnist(run: Run) -> None:
    """Train on MNIST for the time that is left, by the command that anyone would use."""
    seconds = run.seconds_left - 15

    def train() -> tuple[float, str]:
        load_images("mnist")
        if seconds < MNIST_SECONDS:
            raise RuntimeError(f"{seconds:.0f} seconds are left, {MNIST_SECONDS:.0f} are needed")
        options = ["--images", "--device", str(run.device), "--minutes", f"{seconds / 60:.2f}"]
        folder = run.folder / "mnist"
        command = [sys.executable, "-m", "nflows_iresnet.experiments", "mnist", *options]
        done = subprocess.run([*command, "--out", str(folder)], check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command[2:])} ended with {done.returncode}")
        return seconds, f"of training; the result is in {folder}"

    run.measure("mnist", "compare mnist --images", "s", train)


SECTIONS = (vectors, images, precision, samples, mnist)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cuda, cuda:1, or cpu (default)")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all (default 10)")
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="folder (default gpu)")
    parser.add_argument("--quick", action="store_true", help="small sizes, no MNIST")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; try --device cpu --quick")
    sizes = QUICK if arguments.quick else Sizes()
    run = Run(device, sizes, arguments.out, arguments.minutes)
    torch.manual_seed(0)
    for section in SECTIONS:
        if not (arguments.quick and section is mnist):
            section(run)
        run.write()
    print(f"wrote {arguments.out / 'gpu.json'}, gpu.md and gpu.png")


if __name__ == "__main__":
    main()
