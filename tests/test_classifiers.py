"""Classifiers with an inverse, and whether the table tells the guaranteed ones from the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nflows_iresnet import nn
from nflows_iresnet.classifiers import InvertibleClassifier, ResidualClassifier
from nflows_iresnet.experiments import parallel
from nflows_iresnet.experiments.models import count_parameters
from nflows_iresnet.experiments.table1 import Settings, classifiers
from nflows_iresnet.experiments.table1.classifiers import Outcome, invert
from nflows_iresnet.experiments.table1.command import DataSummary, TableRecord, columns_for
from nflows_iresnet.solvers import FixedPointIteration, FixedPointNotConverged

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

IMAGES = torch.randint(0, 17, (6, 1, 8, 8), generator=torch.Generator().manual_seed(0))
SIZE = classifiers.Size((1, 8, 8), 10, 17, Settings(num_blocks=2, hidden_channels=8, padding=1))


def classifier(**options: Any) -> Any:
    torch.manual_seed(0)
    built = InvertibleClassifier((1, 8, 8), 10, 8, num_blocks=2, padding=1, levels=17, **options)
    built(IMAGES)
    return built.eval()


# --- the classifier -------------------------------------------------------------------------------


@pytest.mark.parametrize("num_scales", [1, 2])
def test_features_turn_back_into_images(num_scales: int) -> None:
    model = classifier(coeff=0.7, num_scales=num_scales)
    features = model.encode(IMAGES)
    side = 8 // 2**num_scales
    assert features.shape == (6, 2 * 4**num_scales, side, side)
    assert model(IMAGES).shape == (6, 10)
    with torch.no_grad():
        torch.testing.assert_close(model.decode(features), IMAGES.float(), atol=1e-3, rtol=0)
    bound = model.lipschitz_bound()
    assert bound is not None
    assert 0.5 < bound <= 0.7
    assert model.has_guaranteed_inverse()


def test_every_parameter_learns() -> None:
    model = classifier().train()
    model(IMAGES)[:, 0].sum().backward()
    assert all(each.grad is not None for each in model.parameters())
    assert not any(bool(each.grad.isnan().any()) for each in model.parameters())


def test_images_that_cannot_be_squeezed_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 8, 8\) cannot be squeezed 4 times"):
        InvertibleClassifier((1, 8, 8), 10, 8, num_scales=4)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": "anderson"},
        {"activation": "relu"},
        {"num_blocks": 0},
        {"num_blocks": True},
        {"num_scales": 0},
        {"levels": 1},
        {"levels": 2.0},
        {"padding": -1},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match="channels" if name == "padding" else name):
        InvertibleClassifier((1, 8, 8), 10, 8, **options)


def test_what_makes_no_branch_is_named() -> None:
    for branch in (nn.LipschitzCNN(4, [8, 8]), "cnn", 3):
        with pytest.raises(ValueError, match="branch must make a network for a number of channels"):
            ResidualClassifier((1, 8, 8), 10, branch)  # type: ignore[arg-type]


def test_a_state_of_other_levels_brings_them_along() -> None:
    model, other = classifier(), InvertibleClassifier((1, 8, 8), 10, 8, num_blocks=2, padding=1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(IMAGES), model(IMAGES))


# --- the certificate ------------------------------------------------------------------------------


def outcome_of(model: Any) -> Outcome:
    return Outcome(
        *("tested", 0, "class", 1),
        num_test=1,
        lipschitz_bound=model.lipschitz_bound(),
        inversion=invert(model, IMAGES.float()),
    )


def row_of(*outcomes: Outcome) -> dict[str, str]:
    """Return the cells that a model gets."""
    data = DataSummary("tested", "", "", (1, 8, 8), 17, 10, 1, 1, 1)
    record = TableRecord({"repeats": 1, "steps": 1}, {}, "", data, {}, tuple(outcomes))
    (row,) = record.rows()
    return {column.title: column.text(row) for column in columns_for(record)}


class Tampered(nn.FourierNorm):
    """A norm that claims a tenth of the truth."""

    def value_and_gradient(
        self, weight: torch.Tensor, state: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        value, gradient = super().value_and_gradient(weight, state)
        return value / 10, gradient / 10


def test_a_false_norm_changes_the_certificate_and_the_guarantee() -> None:
    honest = row_of(outcome_of(classifier(coeff=0.9)))
    assert honest["guaranteed\ninverse"] == "yes"
    model = classifier(coeff=0.9)
    for layer in model.blocks[1].net.layers:
        layer.norm = Tampered()
    assert not model.has_guaranteed_inverse()
    row = row_of(outcome_of(model))
    assert row["guaranteed\ninverse"] == "no"
    assert row["certified\nbound"] != honest["certified\nbound"]
    assert float(row["certified\nbound"].removeprefix("≤ ")) > 0.9


def test_power_iteration_without_iterations_guarantees_nothing() -> None:
    norm = nn.ConvPowerIteration((4, 4), num_initial_steps=0)
    model = classifier(coeff=0.9, norm=norm)
    assert row_of(outcome_of(model))["guaranteed\ninverse"] == "no"


def test_scaled_weights_of_a_free_branch_change_the_bound() -> None:
    model: Any = classifiers.vanilla(SIZE)
    model(IMAGES)
    model.eval()
    with torch.no_grad():
        for block in model.blocks:
            for layer in (0, 2, 4):
                block.net[layer].weight.mul_(0.1)
    assert row_of(outcome_of(model))["guaranteed\ninverse"] == "yes"
    with torch.no_grad():
        model.blocks[1].net[4].weight.mul_(1e4)
    row = row_of(outcome_of(model))
    assert row["guaranteed\ninverse"] == "no"
    assert row["inverse\nfound"] == "0 of 6"
    with pytest.raises(FixedPointNotConverged):
        model.decode(model.encode(IMAGES))


def test_the_worst_repeat_decides() -> None:
    good = Outcome("m", 0, "", 1, num_test=1, lipschitz_bound=0.5)
    for bound in (1.0, None):
        row = row_of(good, replace(good, repeat=1, lipschitz_bound=bound))
        assert row["guaranteed\ninverse"] == "no"
    assert row_of(good, replace(good, repeat=1))["guaranteed\ninverse"] == "yes"


def test_inversion_finds_what_decode_finds() -> None:
    model = classifier(coeff=0.8)
    found = invert(model, IMAGES.float(), rows=4)
    assert (found.num_images, found.num_failed) == (6, 0)
    assert found.error_median <= found.error_max < 1e-3
    assert 0 < found.residual_max < 1e-4


def test_a_classifier_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*arguments: Any) -> None:
        raise ArithmeticError("it exploded")

    monkeypatch.setattr(parallel, "run_training", explode)
    outcome = classifiers.ClassifierJob("c=0.9", 0, replace(SIZE.settings, num_train=32)).do()
    assert outcome.failure == "ArithmeticError: it exploded"
    assert row_of(outcome)["guaranteed\ninverse"] == "no"


@pytest.mark.parametrize(("bound", "is_guaranteed"), [(0.999, True), (1.0, False), (1.5, False)])
def test_an_inverse_is_guaranteed_below_one_alone(bound: float, is_guaranteed: bool) -> None:
    class Bounded(torch.nn.Conv2d):
        def lipschitz_bound(self) -> float:
            return bound

    model = ResidualClassifier((1, 4, 4), 2, lambda channels: Bounded(channels, channels, 1))
    assert model.lipschitz_bound() == bound
    assert model.has_guaranteed_inverse() == is_guaranteed


def test_its_log_determinant_is_nan_and_not_wrong() -> None:
    model = classifier()
    assert bool(model.transform(IMAGES.float())[1].isnan().all())


def test_its_blocks_have_the_solver_that_was_given() -> None:
    solver = FixedPointIteration(max_steps=7)
    assert {block.solver for block in classifier(solver=solver).blocks} == {solver}


def test_pixels_are_centred_between_the_darkest_and_the_brightest() -> None:
    first = classifier().transform._transforms[0]
    ends = first(torch.tensor([[0.0, 8.0, 16.0]]))[0]
    torch.testing.assert_close(ends, torch.tensor([[-0.5, 0.0, 0.5]]))


@pytest.mark.parametrize("hidden", [8, 512])
def test_the_resnet_is_as_large_as_the_others(hidden: int) -> None:
    settings = Settings(hidden_channels=hidden)
    size = classifiers.Size((1, 8, 8), 10, 17, settings)
    wanted = count_parameters(classifiers.vanilla(size))
    found = count_parameters(classifiers.resnet(size))
    assert abs(found - wanted) < 0.2 * wanted
