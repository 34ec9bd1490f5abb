"""Faults of enflows (and flowcon, its sibling), each beside our behaviour.

enflows is no dependency: its tests run where `enflows==0.0.1` is importable, and are skipped
elsewhere.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nflows_iresnet import flows
from nflows_iresnet.nn import LipschitzMLP
from nflows_iresnet.testing import check_lipschitz
from tests.peers import rows, seed


@pytest.fixture
def densenets() -> Any:
    """The networks of enflows, made with a fixed seed."""
    seed(0)
    pytest.importorskip("enflows.transforms")
    return pytest.importorskip("enflows.nn.nets.invertible_densenet")


class TestConstruction:
    """In enflows `repr` crashes and a network with its default arguments cannot be made."""

    @pytest.mark.parametrize("preset", [flows.ResidualFlow, flows.InvertibleResNet])
    def test_ours(self, preset: type[flows.ResidualFlow]) -> None:
        """Defaults work, and the text shows the strategies."""
        text = repr(preset(2, 8, num_layers=1))
        assert "estimator=" in text
        assert "solver=" in text

    @pytest.mark.peer
    def test_enflows_cannot_be_printed(self, densenets: Any) -> None:
        """`extra_repr` reads attributes that do not exist."""
        transforms = pytest.importorskip("enflows.transforms")
        with pytest.raises(AttributeError):
            repr(transforms.iResBlock(densenets.DenseNet(2)))

    @pytest.mark.peer
    def test_enflows_defaults_raise(self, densenets: Any) -> None:
        """The default activation is a class where an instance is needed."""
        with pytest.raises(TypeError, match="not a Module subclass"):
            densenets.LastLayerConditionalDenseNet(2, 3, 2)


class TestDocumentedLipschitz:
    """A network of enflows that is documented as Lip < 1 reaches 1.38."""

    def test_ours(self) -> None:
        """With weights and a context of any magnitude, a search finds nothing above the bound."""
        seed(0)
        net = LipschitzMLP(2, [16], context_features=3, coeff=0.98).double()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(50)
        context = 50 * rows(8, 3).double()
        found = check_lipschitz(lambda x: net(x, context), rows(8, 2), bound=0.98)
        assert found > 0.1, "the search is not idle"

    @pytest.mark.peer
    def test_enflows_exceeds_one(self, densenets: Any) -> None:
        """A row-stochastic last layer has a norm of up to sqrt(features), not 1."""
        net = densenets.LastLayerConditionalDenseNet(2, 3, 1, activation_function="CLipSwish")
        attention = net.double().eval().custom_attention
        with torch.no_grad():
            net.dense_net[0].K1_unnormalized.fill_(1e3)
            attention.weight_network.net[-1].bias.reshape(2, -1)[:, 0] = 1e3
        context = rows(8, 3).double()
        with pytest.raises(AssertionError, match=r"stretch of 1\.3"):
            check_lipschitz(lambda x: net(x, context), rows(8, 2), bound=1.0)


class TestBatchOfOne:
    """enflows normalises the context over the batch, so that rows see each other."""

    def test_ours(self) -> None:
        """No row needs other rows."""
        flow = flows.ResidualFlow(2, 8, num_layers=2, context_features=2).train()
        assert bool(flow.log_prob(rows(1, 2), rows(1, 2)).isfinite().all())

    @pytest.mark.peer
    def test_enflows_cannot_train_on_one_row(self, densenets: Any) -> None:
        """BatchNorm on the context needs two."""
        net = densenets.InputConditionalDenseNet(2, 3, 2, activation_function="CLipSwish")
        with pytest.raises(ValueError, match="more than 1 value"):
            net(rows(1, 2), rows(1, 3))
