"""The weights that `compare` keeps of each run, and the flows that they are loaded into again."""

from __future__ import annotations

import io
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nflows_iresnet.experiments.adapters import (
    ContinuousModel,
    DensityModel,
    NflowsModel,
    StartedModel,
)
from nflows_iresnet.experiments.config import suggest, versions
from nflows_iresnet.experiments.folder import Folder, Key
from nflows_iresnet.experiments.models import Architecture, ImageArchitecture, find_model
from nflows_iresnet.experiments.record import Record
from nflows_iresnet.files import read_intact

FORMAT = "weights-1"
_SIZES: dict[str, type[Architecture]] = {
    kind.__name__: kind for kind in (Architecture, ImageArchitecture)
}


def pack(model: DensityModel, name: str, size: Architecture) -> bytes:
    """Return the weights of a model, and how to build it, as a file that `unpack` reads.

    Args:
        model: as it was trained.
        name: in the registry.
        size: that it was built with.
    """
    content = {
        "format": FORMAT,
        "model": name,
        "kind": type(size).__name__,
        "size": asdict(size),
        "versions": versions(),
        "state": model.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def unpack(path: Path, name: str | None = None) -> DensityModel:
    """Build the model of a file that `pack` made, on the CPU and in eval mode.

    Args:
        path: the file.
        name: of the model that it is to hold; any by default.

    Raises:
        ValueError: the file is missing or damaged, or of another version of a library.
        ImportError: the library of the model is not installed.
    """
    try:
        content = read(path, name)
    except ValueError as error:
        raise ValueError(
            f"{error}: add --resume to the command of the run, which does it again"
        ) from error
    try:
        size = _SIZES[content["kind"]](**content["size"])
        with torch.random.fork_rng(devices=[]):
            model = find_model(content["model"], size.models).build(size)
        model.load_state_dict(content["state"])
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"the weights {str(path)!r} do not fit the model {content.get('model')!r} of this "
            f"version ({_first_line(error)}): {_differences(content.get('versions', {}))}"
        ) from error
    return model.eval()


def read(path: Path, name: str | None = None) -> dict[str, Any]:
    """Read a file that `pack` made, whole; see `unpack`.

    Raises:
        ValueError: it is missing, damaged, or of another model.
    """
    try:
        content = torch.load(read_intact(path), map_location="cpu", weights_only=True)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
    except FileNotFoundError as error:
        raise ValueError(f"there are no weights {str(path)!r}") from error
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"the weights {str(path)!r} are damaged ({_first_line(error)})") from error
    if name not in (None, content.get("model")):
        raise ValueError(
            f"the weights {str(path)!r} are those of {content.get('model')!r}, not of {name!r}"
        )
    return dict(content)


def load_run(
    folder: str | os.PathLike[str],
    dataset: str | None = None,
    model: str | None = None,
    repeat: int = 0,
) -> Any:
    """Return the flow that `nflows-iresnet compare` has trained, on the CPU and in eval mode.

    It is a flow of its own library: of this one and of nflows with `log_prob(inputs)` and
    `sample(num_samples)`; a `normflows.NormalizingFlow`; a flow of zuko, whose distribution is
    `flow()`. What was trained with a start in front of it (`maf-same-start`) is one flow of both;
    where its library cannot join them (zuko, normflows), and for FFJORD, it is the model that
    `compare` trained, with `log_prob` and `sample`, too.

    **Units.** `compare` standardises the rows of a table by its training rows, so the flow is a
    density of (rows - location) / scale. It has both as float64 tensors: in the units of the file

        rows = torch.from_numpy(frame.to_numpy())  # of pandas; tensors, not arrays
        log_prob = flow.log_prob(((rows - flow.location) / flow.scale).float())
        log_prob = log_prob - flow.scale.log().sum()
        rows = flow.sample(1000) * flow.scale + flow.location

    They are None for images, of which the flow is a density in pixels plus uniform noise, as
    `transforms.dequantize` makes it.

    **Which log-determinant.** A residual flow has the estimator that it was trained with. The
    numbers of `results.json` are exact, but for many images:
    `with transforms.using(flow, estimator=logdet.Exact())` evaluates as they were.

    Args:
        folder: the output folder of the run, `--out`.
        dataset: name of the data set; not needed where the folder has one.
        model: name of the model; not needed where the folder has one.
        repeat: which of its repeats, from 0.

    Raises:
        ValueError: there is no such run, or several, or a file is missing, damaged, or does not
            fit the installed versions; the message says which.
        ImportError: the library of the model is not installed.

    Example:
        $ nflows-iresnet compare table.csv --models residual-flow --out results/table

        >>> flow = load_run("results/table")  # doctest: +SKIP
    """
    place = Folder(Path(folder).expanduser())
    key = _chosen(place, dataset, model, repeat)
    flow = _own_flow(unpack(place.weights(key), name=str(key[1])))
    units = place.load_arrays(key[:1])
    if not units:
        raise ValueError(
            f"{str(place.arrays(key[:1]))!r} is missing, which has the units of the data: add "
            "--resume to the command of the run, which writes it again"
        )
    for name in ("location", "scale"):
        setattr(flow, name, torch.from_numpy(units[name]).double() if name in units else None)
    return flow.eval()


def _chosen(folder: Folder, dataset: str | None, model: str | None, repeat: int) -> Key:
    """Return the key of the one run that is meant."""
    keys = [result.key for result in _record(folder).results if result.training is not None]
    wanted = dataset, model, repeat
    found = [key for key in keys if all(w in (None, k) for w, k in zip(wanted, key, strict=True))]
    if len(found) == 1:
        return found[0]
    names = (f"dataset={dataset!r}", f"model={model!r}", f"repeat={repeat}")
    given = [name for name in names if not name.endswith("None")]
    known = {str(key[0]) for key in keys}, {str(key[1]) for key in keys}
    named = zip((dataset, model), known, strict=True)
    hints = [suggest(name, names) for name, names in named if name and name not in names]
    hint = "".join(f" ({each})" for each in hints if each.startswith("did you mean"))
    choices = [f"({dataset!r}, {model!r}, {repeat})" for dataset, model, repeat in found or keys]
    raise ValueError(
        f"{str(folder.path)!r} has {len(found) or 'no'} trained runs with {', '.join(given)}"
        f"{hint}: choose (dataset, model, repeat) from {', '.join(choices) or 'none'}"
    )


def _record(folder: Folder) -> Record:
    try:
        return Record.from_json(folder.results.read_bytes().decode())
    except FileNotFoundError as error:
        raise ValueError(
            f"{str(folder.path)!r} is no folder of results: it has no results.json; give the --out "
            "of a run of nflows-iresnet compare"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(
            f"{str(folder.results)!r} cannot be read: {_first_line(error)}; give the --out of a "
            "run of nflows-iresnet compare or table2"
        ) from error


def _own_flow(model: DensityModel) -> nn.Module:
    """Return the flow of a model without the face that `compare` gave it, where it has one."""
    if isinstance(model, StartedModel):
        inner = model.model
        return _joined(model.start, inner.flow) if isinstance(inner, NflowsModel) else model
    if isinstance(model, ContinuousModel):
        return model
    flow: nn.Module = model.flow
    return flow


def _joined(start: nn.Module, flow: Any) -> nn.Module:
    from nflows_iresnet.flows import Flow
    from nflows_iresnet.transforms import CompositeTransform

    return Flow(CompositeTransform([start, flow._transform]), flow._distribution)


def _differences(then: dict[str, str | None]) -> str:
    now = versions()
    changed = [
        f"{name} {now.get(name)} is installed, and they are of {version}"
        for name, version in then.items()
        if now.get(name) != version
    ]
    return "; ".join(changed) or "the versions are the same"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
