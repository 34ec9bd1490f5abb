"""Names of the release before still work, and say what they are called now."""

from __future__ import annotations

import importlib

import pytest

OLD = {
    "logdet.Adaptive": "logdet.Auto",
    "logdet.MatchedTail": "logdet.LipschitzTruncation",
    "logdet.GeometricTail": "logdet.GeometricTruncation",
    "nn.SymbolNorm": "nn.FourierNorm",
    "transforms.MarginalSpline": "transforms.ElementwiseRationalQuadraticSpline",
    "transforms.UniformDequantisation": "transforms.UniformDequantization",
    "transforms.dequantise": "transforms.dequantize",
}


def found(name: str) -> object:
    room, _, attribute = name.partition(".")
    return getattr(importlib.import_module(f"nflows_iresnet.{room}"), attribute)


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_the_new_one_and_warns(old: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{OLD[old]}; the old name goes"):
        value = found(old)
    assert value is found(OLD[old])


def test_unknown_names_are_unknown() -> None:
    for room in ("logdet", "nn", "transforms"):
        with pytest.raises(
            AttributeError, match=f"nflows_iresnet.{room}' has no attribute 'Nothing'"
        ):
            found(f"{room}.Nothing")
