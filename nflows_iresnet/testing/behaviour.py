"""Clauses about behaviour: modes without gradients, side effects, serialisation, precision."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from dataclasses import replace

import torch

from nflows_iresnet.testing.subject import Subject, require, require_close


def no_graph_without_gradients(subject: Subject) -> None:
    """Under no_grad and inference_mode the numbers are the same and nothing is recorded."""
    outputs, logabsdet = (each.detach() for each in subject.forward())
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            again = subject.forward()
            back = subject.inverse(outputs)
        for name, value, expected in zip(
            ("outputs", "logabsdet", "inputs", "inverse logabsdet"),
            (*again, *back),
            (outputs, logabsdet, subject.inputs, -logabsdet),
            strict=True,
        ):
            require(not value.requires_grad, f"{name} under {mode.__name__} records a graph")
            require_close(value.clone(), expected, subject.atol, f"{name} under {mode.__name__}")


def tensors_of_the_caller(subject: Subject) -> None:
    """Inputs, outputs and context keep their values, their version and their requires_grad."""
    inputs = subject.inputs.clone()
    context = None if subject.context is None else subject.context.clone()
    fresh = replace(subject, inputs=inputs, context=context)
    outputs = subject.forward()[0].detach().clone()
    given = {"inputs": inputs, "outputs": outputs}
    if context is not None:
        given["context"] = context
    values = {name: each.clone() for name, each in given.items()}
    versions = {name: each._version for name, each in given.items()}
    fresh.forward()
    fresh.inverse(outputs)
    for name, value in values.items():
        unchanged = torch.equal(given[name], value) and given[name]._version == versions[name]
        require(unchanged, f"the caller's {name} changed")
        require(not given[name].requires_grad, f"the caller's {name} got requires_grad")


def survives_serialisation(subject: Subject) -> None:
    """deepcopy, pickle and a state_dict into another instance give the same numbers."""
    expected = subject.forward()
    other = deepcopy(subject.transform)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    stored = io.BytesIO()
    torch.save(subject.transform.state_dict(), stored)
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    copies = {
        "deepcopy": deepcopy(subject.transform),
        "pickle": pickle.loads(pickle.dumps(subject.transform)),
        "state_dict": other,
    }
    for name, copy in copies.items():
        for actual, wanted in zip(
            replace(subject, transform=copy).forward(), expected, strict=True
        ):
            require_close(actual, wanted, subject.atol, f"after {name}")


def autocast(subject: Subject) -> None:
    """In float32 inside bfloat16 autocast the numbers are finite and the round trip holds."""
    context = None if subject.context is None else subject.context.float()
    single = replace(
        subject, transform=subject.transform.float(), inputs=subject.inputs.float(), context=context
    )
    with torch.autocast(subject.inputs.device.type, dtype=torch.bfloat16):
        outputs, logabsdet = single.forward()
        inputs, _ = single.inverse(outputs.detach())
    require(logabsdet.dtype == torch.float32, f"logabsdet is {logabsdet.dtype} in autocast")
    require_close(inputs.float(), single.inputs, 1e-3, "round trip in autocast")
