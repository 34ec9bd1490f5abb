"""The builder for sbi: training, sampling and log-densities through sbi's own interface."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("sbi")

from sbi.inference import NPE
from torch.distributions import MultivariateNormal

from nflows_iresnet.interop.sbi import ResidualFlowBuilder, ZScore
from nflows_iresnet.logdet import Exact
from nflows_iresnet.transforms import ActNorm

pytestmark = pytest.mark.filterwarnings("ignore")

NUM_SIMULATIONS = 300


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def simulations() -> tuple[Tensor, Tensor]:
    """Two parameters, three observations of them at scales far from one."""
    torch.manual_seed(1)
    theta = 5 + 0.1 * torch.randn(NUM_SIMULATIONS, 2)
    mixing = torch.tensor([[100.0, 0.0], [0.0, 100.0], [50.0, -50.0]])
    return theta, theta @ mixing.mT + torch.randn(NUM_SIMULATIONS, 3)


@pytest.fixture(scope="module")
def posterior(
    simulations: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A posterior after a few epochs of sbi's training loop, which leaves logs in its folder."""
    torch.manual_seed(2)
    prior = MultivariateNormal(5 * torch.ones(2), 0.01 * torch.eye(2))
    builder = ResidualFlowBuilder(hidden_features=16, num_layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("sbi"))
        trainer = NPE(prior, density_estimator=builder, show_progress_bars=False)
        trainer.append_simulations(*simulations).train(
            training_batch_size=30, learning_rate=1e-2, max_num_epochs=15
        )
        yield trainer.build_posterior()


def _small(**settings: Any) -> ResidualFlowBuilder:
    return ResidualFlowBuilder(hidden_features=8, num_layers=2, **settings)


def test_estimator_has_the_shapes_of_sbi(simulations: tuple[Tensor, Tensor]) -> None:
    theta, x = simulations
    estimator = _small()(theta, x)
    assert estimator.log_prob(theta[None, :4], x[:4]).shape == (1, 4)
    assert estimator.loss(theta[:4], x[:4]).shape == (4,)
    assert estimator.sample((6,), x[:4]).shape == (6, 4, 2)


def test_estimator_starts_near_the_data(simulations: tuple[Tensor, Tensor]) -> None:
    theta, x = simulations
    estimator = _small()(theta, x)
    noise, _ = estimator.net._transform(theta, estimator.net._embedding_net(x))
    starts = [module for module in estimator.modules() if isinstance(module, ActNorm)]
    assert all(bool(start.initialized) for start in starts)
    torch.testing.assert_close(noise.mean(0), torch.zeros(2), atol=0.05, rtol=0)
    torch.testing.assert_close(noise.std(0), torch.ones(2), atol=0.05, rtol=0)


def test_samples_and_log_probs_agree_row_by_row(simulations: tuple[Tensor, Tensor]) -> None:
    theta, x = simulations
    estimator = _small()(theta, x).eval()
    samples = estimator.sample((5,), x[:3]).detach()
    together = estimator.log_prob(samples, x[:3])
    for row in range(3):
        alone = estimator.log_prob(samples[:, row : row + 1], x[row : row + 1])
        torch.testing.assert_close(together[:, row : row + 1], alone, atol=1e-5, rtol=1e-5)
    noise, _ = estimator.net._transform(
        samples.reshape(-1, 2), estimator.net._embedding_net(x[:3].repeat(5, 1))
    )
    again, _ = estimator.net._transform.inverse(
        noise, estimator.net._embedding_net(x[:3].repeat(5, 1))
    )
    torch.testing.assert_close(again, samples.reshape(-1, 2), atol=1e-4, rtol=1e-4)


def test_training_moves_the_posterior_to_the_parameters(
    posterior: Any, simulations: tuple[Tensor, Tensor]
) -> None:
    theta, x = simulations
    samples = posterior.sample((200,), x=x[0], show_progress_bars=False)
    assert samples.shape == (200, 2)
    assert posterior.log_prob(samples, x=x[0]).shape == (200,)
    assert (samples.mean(0) - theta[0]).norm() < 0.1
    assert (samples.std(0) < 0.06).all()


def test_posterior_samples_batches_of_observations(
    posterior: Any, simulations: tuple[Tensor, Tensor]
) -> None:
    theta, x = simulations
    samples = posterior.sample_batched((50,), x=x[:8], show_progress_bars=False)
    assert samples.shape == (50, 8, 2)
    assert posterior.log_prob_batched(samples, x=x[:8]).shape == (50, 8)
    own = (samples.mean(0) - theta[:8]).norm(dim=1).mean()
    others = (samples.mean(0) - theta[:8].roll(1, 0)).norm(dim=1).mean()
    assert own < others / 2


def test_posterior_and_builder_survive_pickling(
    posterior: Any, simulations: tuple[Tensor, Tensor]
) -> None:
    theta, x = simulations
    copy = pickle.loads(pickle.dumps(posterior))
    torch.testing.assert_close(copy.log_prob(theta, x=x[0]), posterior.log_prob(theta, x=x[0]))
    assert repr(pickle.loads(pickle.dumps(_small()))) == repr(_small())


def test_embedding_net_is_trained_and_may_take_any_shape() -> None:
    theta, x = torch.randn(20, 2), torch.randn(20, 4, 5)
    embedding_net = nn.Sequential(nn.Flatten(), nn.Linear(20, 3), nn.BatchNorm1d(3))
    estimator = _small(embedding_net=embedding_net)(theta, x)
    estimator.loss(theta, x).mean().backward()
    gradients = [parameter.grad for parameter in embedding_net.parameters()]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
    assert any(module is embedding_net for module in estimator.modules())


@pytest.mark.parametrize("features", [1, 3])
def test_any_number_of_parameters(features: int) -> None:
    theta, x = torch.randn(20, features), torch.randn(20, 1)
    samples = _small()(theta, x).sample((4,), x[:2])
    assert samples.shape == (4, 2, features)


@pytest.mark.parametrize("z_score", ["none", "independent", "structured"])
def test_z_scores_change_no_density(z_score: ZScore, simulations: tuple[Tensor, Tensor]) -> None:
    theta, x = simulations
    estimator = _small(z_score_theta=z_score, z_score_x=z_score)(theta, x).eval()
    point = theta[:1].clone().requires_grad_()
    context = estimator.net._embedding_net(x[:1])
    noise, logabsdet = estimator.net._transform(point, context)
    rows = [torch.autograd.grad(value, point, retain_graph=True)[0][0] for value in noise[0]]
    expected = torch.linalg.slogdet(torch.stack(rows)).logabsdet
    torch.testing.assert_close(logabsdet[0], expected, atol=1e-4, rtol=1e-4)


def test_unknown_z_score_is_refused() -> None:
    with pytest.raises(ValueError, match="z_score_x"):
        ResidualFlowBuilder(z_score_x="transform_to_unconstrained")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        {"estimator": "exact"},
        {"estimator": Exact},
        {"solver": "anderson"},
        {"embedding_net": "mlp"},
        {"embedding_net": nn.Identity},
        {"embedding_net": torch.tanh},
    ],
    ids=str,
)
def test_names_and_classes_are_no_strategies(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"^{name} must be a"):
        ResidualFlowBuilder(**options)
