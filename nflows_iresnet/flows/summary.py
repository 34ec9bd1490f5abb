"""What a flow is, in a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import torch
from nflows import transforms as nflows_transforms
from nflows.flows import Flow
from torch import nn
from torch.nn.parameter import is_lazy

from nflows_iresnet.nn.layers import NormedLayer
from nflows_iresnet.settings import SettingsInState
from nflows_iresnet.transforms import ResidualTransform
from nflows_iresnet.transforms.initialization import is_waiting, starts_from_rows

_MOST_LAYERS, _MOST_KINDS = 12, 2
"""How many lines there are for the layers, and for the networks, estimators and solvers each."""
_RESIDUAL = ResidualTransform.__name__


def summarise(flow: Flow) -> str:
    """Return layers, parameters, bound, strategies and start of a flow in at most 25 lines.

    Cost: nothing is computed from the weights, and a GPU is waited for a few times, for the start.
    """
    transform, context = flow._transform, flow._embedding_net
    layers = _grouped(list(_layers(transform)))
    blocks = [each for each in transform.modules() if isinstance(each, ResidualTransform)]
    lines = [
        f"{type(flow).__name__}: {_parameters(flow)}",
        *(f"  {each}" for each in _shortened(layers, _MOST_LAYERS)),
        f"  {_label(flow._distribution)}",
        *([] if isinstance(context, nn.Identity) else [f"context through {_label(context)}"]),
        *(_strategies(blocks) if blocks else []),
        f"start: {_start(transform)}",
    ]
    return "\n".join(lines)


def _parameters(flow: nn.Module) -> str:
    parameters = list(flow.parameters())
    known = [each for each in parameters if not is_lazy(each)]
    trained = sum(each.numel() for each in known if each.requires_grad)
    frozen = sum(each.numel() for each in known if not each.requires_grad)
    text = f"{trained:,} parameters"
    text += f", {frozen:,} frozen" if frozen else ""
    text += ", and lazy ones" if len(known) < len(parameters) else ""
    places = dict.fromkeys(f"{str(p.dtype).removeprefix('torch.')} on {p.device}" for p in known)
    return ", ".join([text, *places])


def _layers(transform: nn.Module) -> Iterator[str]:
    """Name the parts of a transform from data to noise; those of a scale on one line."""
    if isinstance(transform, nflows_transforms.CompositeTransform):
        for each in transform._transforms:
            yield from _layers(each)
    elif isinstance(transform, nflows_transforms.MultiscaleCompositeTransform):
        for number, each in enumerate(transform._transforms, start=1):
            yield f"scale {number}: {', '.join(_grouped(list(_layers(each))))}"
    elif isinstance(transform, ResidualTransform):
        yield type(transform).__name__
    else:
        yield _label(transform)


def _label(module: nn.Module) -> str:
    settings = " ".join(module.extra_repr().split())
    return f"{type(module).__name__}({settings})" if settings else type(module).__name__


def _grouped(names: Sequence[str]) -> list[str]:
    """Write what repeats once: a, b, c, b, c -> a, 2 x [b, c]; groups end with a residual block."""
    runs = [
        (start, period, count)
        for period in range(1, len(names) // 2 + 1)
        for start in range(len(names) - 2 * period + 1)
        if (count := _repeats(names, start, period)) > 1
    ]
    if not runs:
        return list(names)

    def preference(run: tuple[int, int, int]) -> tuple[int, int, bool]:
        start, period, count = run
        return period * count, -period, names[start + period - 1] == _RESIDUAL

    start, period, count = max(runs, key=preference)
    group = f"{count} x [{', '.join(names[start : start + period])}]"
    rest = names[start + period * count :]
    return [*_grouped(names[:start]), group, *_grouped(rest)]


def _repeats(names: Sequence[str], start: int, period: int) -> int:
    """Count how often names[start : start + period] stand there one after the other."""
    end = start + period
    while end < len(names) and names[end] == names[end - period]:
        end += 1
    return (end - start) // period


def _strategies(blocks: Sequence[ResidualTransform]) -> Iterator[str]:
    yield f"{len(blocks)} residual block{'s' * (len(blocks) > 1)} x + g(x):"
    yield from _kinds("g=", (_describe_net(block.net) for block in blocks))
    bounds = dict.fromkeys(_describe_bound(block.net) for block in blocks)
    yield f"  certified bound: {', '.join(_shortened(list(bounds), _MOST_KINDS))}"
    yield from _kinds("estimator=", (repr(block.estimator) for block in blocks))
    yield from _kinds("solver=", (repr(block.solver) for block in blocks))


def _kinds(title: str, described: Iterable[str]) -> list[str]:
    counts = Counter(" ".join(each.split()) for each in described)
    lines = [
        f"{title}{each}" + (f" in {count} of them" if len(counts) > 1 else "")
        for each, count in counts.items()
    ]
    return [f"  {line}" for line in _shortened(lines, _MOST_KINDS)]


def _describe_net(net: nn.Module) -> str:
    sizes = [
        f"{each.weight.shape[1]} -> {each.weight.shape[0]}"
        for each in net.modules()
        if isinstance(each, NormedLayer)
    ]
    settings = net.settings().items() if isinstance(net, SettingsInState) else ()
    described = [f"{name}={_describe_setting(value)}" for name, value in settings]
    inside = ", ".join(_grouped(sizes) + described)
    return f"{type(net).__name__}({inside})" if inside else type(net).__name__


def _describe_setting(value: object) -> str:
    if isinstance(value, list):
        return " and ".join(dict.fromkeys(_describe_setting(each) for each in value))
    if isinstance(value, nn.Module):
        inside = [value.extra_repr(), *map(_describe_setting, value.children())]
        return f"{type(value).__name__}({', '.join(filter(None, inside))})"
    return repr(value)


def _describe_bound(net: nn.Module) -> str:
    bound = getattr(net, "lipschitz", None)
    if isinstance(bound, float):
        return f"Lip(g) <= {bound:g}"
    if callable(getattr(net, "lipschitz_bound", None)):
        return "none for all weights; lipschitz_bound() computes that of the present ones"
    return "none"


def _start(transform: nn.Module) -> str:
    parts = [each for each in transform.modules() if starts_from_rows(each)]
    if not parts:
        return "nothing depends on data"
    flags = [getattr(each, "initialized", None) for each in parts]
    if any(isinstance(flag, torch.Tensor) and flag.is_meta for flag in flags):
        return "unknown on the meta device"
    waiting = sum(map(is_waiting, parts))
    if not waiting:
        return f"made from data, in all {len(parts)} parts that depend on it"
    return (
        f"{waiting} of {len(parts)} parts wait for data: initialize(rows), or the first batch in "
        "training mode"
    )


def _shortened(lines: list[str], most: int) -> list[str]:
    """Leave out the middle of too many lines."""
    if len(lines) <= most:
        return lines
    before = most // 2
    end = len(lines) - (most - 1 - before)
    return [*lines[:before], f"... {end - before} more ...", *lines[end:]]
