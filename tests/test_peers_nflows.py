"""Faults of nflows 0.14 that a residual flow inherits unless it repairs them."""

from __future__ import annotations

from typing import Any

import nflows.distributions
import nflows.flows
import nflows.transforms
import numpy as np
import pytest
import torch
from torch import Tensor

from nflows_iresnet import flows, transforms
from tests.peers import rows, seed


def _stock_flow() -> Any:
    return nflows.flows.SimpleRealNVP(2, 8, num_layers=1, num_blocks_per_layer=1)


class TestDoubleSampling:
    """`StandardNormal` of nflows draws float32 whatever the precision of the flow."""

    @staticmethod
    def sample(flow: Any) -> Tensor:
        samples: Tensor = flow.double().sample(3)
        return samples

    def test_ours(self) -> None:
        """A flow in float64 samples in float64."""
        assert self.sample(flows.ResidualFlow(2, 8, num_layers=1)).dtype == torch.float64

    @pytest.mark.peer
    def test_nflows_raises(self) -> None:
        """float32 noise meets float64 weights."""
        with pytest.raises(RuntimeError, match="dtype"):
            self.sample(_stock_flow())


FIRST_BATCHES = {
    "constant-feature": torch.tensor([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]]),
    "batch-of-one": torch.tensor([[1.0, 5.0]]),
}
every_first_batch = pytest.mark.parametrize("batch", FIRST_BATCHES.values(), ids=FIRST_BATCHES)


class TestActNormStart:
    """ActNorm divides by the standard deviation of its first batch: zero, or unknown."""

    @staticmethod
    def is_finite(act_norm: Any, batch: Tensor) -> bool:
        act_norm(batch)
        outputs, logabsdet = act_norm(rows(4, 2))
        return bool(outputs.isfinite().all() and logabsdet.isfinite().all())

    @every_first_batch
    def test_ours(self, batch: Tensor) -> None:
        """The standard deviation is bounded below; one row only centres."""
        assert self.is_finite(transforms.ActNorm(2), batch)

    def test_ours_trains_from_a_batch_of_one(self) -> None:
        """A whole flow, first seen with one row, and then in use."""
        seed(0)
        flow = flows.ResidualFlow(2, 8, num_layers=2)
        flow.log_prob(rows(1, 2)).sum().backward()
        assert bool(flow.log_prob(rows(8, 2)).isfinite().all())

    @pytest.mark.peer
    @pytest.mark.filterwarnings("ignore:std")
    @every_first_batch
    def test_nflows_is_not_finite(self, batch: Tensor) -> None:
        """Infinite or NaN for every later batch, and for good."""
        assert not self.is_finite(nflows.transforms.ActNorm(2), batch)


class TestNumpyIntegers:
    """Sizes that come from `array.shape` or a table are numpy integers."""

    SIZE = np.int64(2)

    def test_ours(self) -> None:
        """All sizes of a preset may be numpy integers."""
        seed(0)
        flow = flows.ResidualFlow(
            self.SIZE, np.int64(8), np.int64(2), np.int64(1), context_features=self.SIZE
        )
        assert flow.log_prob(rows(4, 2), rows(4, 2)).shape == (4,)

    @pytest.mark.peer
    def test_nflows_raises(self) -> None:
        """2 is not a positive integer, it says."""
        with pytest.raises(TypeError, match="positive integer"):
            nflows.transforms.ActNorm(self.SIZE)

    def test_ours_samples_a_numpy_number(self) -> None:
        """The number of samples may be one, too."""
        assert flows.ResidualFlow(2, 8, num_layers=1).sample(np.int64(3)).shape == (3, 2)


class TestUnevenBatches:
    """`sample(n, context, batch_size=)` concatenates along the wrong dimension."""

    @staticmethod
    def shape(distribution: Any) -> tuple[int, ...]:
        return tuple(distribution.sample(5, rows(3, 2), batch_size=2).shape)

    def test_ours(self) -> None:
        """Five samples in batches of two for each of three contexts."""
        flow = flows.ResidualFlow(2, 8, num_layers=1, context_features=2)
        assert self.shape(flow) == (3, 5, 2)

    @pytest.mark.peer
    def test_nflows_raises(self) -> None:
        """Batches of 2, 2 and 1 cannot be joined."""
        with pytest.raises(RuntimeError, match="must match"):
            self.shape(nflows.distributions.StandardNormal([2]))
