"""DPG in training: temperature, and what tells whether experts are used."""

import copy

import pytest
import torch
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from dpg_scenes import DPG, SIZES, _same_start, dpg, pyramid, sizes, source  # noqa: F401  (a fixture)

from dsrcnn.modeling.proposals import DynamicProposals, TemperatureSchedule
from dsrcnn.modeling.proposals.dynamic import mixing_statistics


def test_temperature_falls_linearly_and_stays_at_its_end():
    schedule = TemperatureSchedule(30.0, 1.0, 100)
    steps = torch.tensor([0, 50, 100, 1000])
    assert [schedule.at(s).item() for s in steps] == pytest.approx([30.0, 15.5, 1.0, 1.0])
    assert TemperatureSchedule(30.0, 1.0, 0).at(steps[0]).item() == 1.0


def test_every_iteration_counts_and_evaluation_uses_the_end():
    model = source(temperature=TemperatureSchedule(30.0, 1.0, 10))
    for expected in (30.0, 27.1, 24.2):
        assert model.current_temperature().item() == pytest.approx(expected)
        model(pyramid(), sizes())
        model.end_iteration()
    model.eval()
    assert model.current_temperature().item() == pytest.approx(1.0)
    assert model.step == 3


def test_only_whole_batches_of_a_training_are_steps_of_the_temperature():
    model = build_model(dpg())
    inputs = batch(SIZES, [2, 1])
    model(inputs, ends_iteration=False)
    with torch.no_grad():  # norms are being estimated
        model(inputs)
    model.eval()
    model(inputs)
    assert model.proposals.step == 0
    model.train()
    model(inputs)
    assert model.proposals.step == 1


@pytest.mark.parametrize(("key", "expected"), [(None, 250), (7, 7), (0, 0)])
def test_annealing_takes_its_part_of_the_schedule_unless_told_otherwise(key, expected):
    cfg = dpg("SOLVER.MAX_ITER", 900, "MODEL.SparseRCNN.DPG.TAU_ITERS", key)
    assert build_model(cfg).proposals.temperature.iterations == expected


def test_a_resumed_model_has_the_temperature_it_had():
    first, second = (build_model(dpg("MODEL.SparseRCNN.DPG.TAU_ITERS", 10)) for _ in range(2))
    for _ in range(3):
        first(batch(SIZES, [2, 1]))
    second.load_state_dict(first.state_dict())
    assert first.proposals.step == second.proposals.step == 3
    now = first.proposals.current_temperature()
    assert second.proposals.current_temperature() == now
    assert now.item() == pytest.approx(30 - 26 * 0.3)


def test_statistics_know_a_choice_from_a_mixture_and_an_image_from_another():
    equal = torch.full((3, 4, 6), 0.25)
    choice = torch.zeros(3, 4, 6)
    choice[:, [0, 1, 2, 3, 0, 1], range(6)] = 1  # another expert for every proposal, always it
    each = torch.zeros(2, 4, 6)
    each[0, 0], each[1, 3] = 1, 1
    for weights, entropy, variation, dead in (
        (equal, 1, 0, 0),
        (choice, 0, 0, 0.75),
        (each, 0, 1, 0.5),
        (torch.cat([equal[:1], choice[:1]]), 0.5, 0.75, 0),
    ):
        found = {k: v.item() for k, v in mixing_statistics(weights).items()}
        expected = {"entropy": entropy, "variation": variation, "dead": dead}
        assert found == pytest.approx(expected, abs=1e-6)
    assert "variation" not in mixing_statistics(equal[:1])  # nothing to compare with


def mixture_after_training(logit_norm, steps=200, images=4):
    """Statistics in evaluation, after learning features that are the same for all images."""
    torch.manual_seed(0)
    cfg = tiny_cfg(
        *("MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.NUM_PROPOSALS", 20),
        *("MODEL.SparseRCNN.DPG.LOGIT_NORM", logit_norm, "MODEL.SparseRCNN.DPG.TAU_ITERS", 0),
        *("MODEL.SparseRCNN.DPG.TAU_END", 1.0),
    )
    model = DynamicProposals(cfg)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    goal = torch.randn(1, 20, 32)
    for step in range(steps):
        features = [x.abs() for x in pyramid(images, channels=32, seed=step)]
        loss = (model(features, sizes(images)).features - goal).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    weights = model.weights(pyramid(16, channels=32, seed=-1), sizes(16))
    return {k: v.item() for k, v in mixing_statistics(weights).items()}


def test_what_all_images_have_in_common_does_not_make_the_choice():
    collapsed, alive = (mixture_after_training(logit_norm) for logit_norm in (False, True))
    assert collapsed["variation"] < 0.05
    assert alive["variation"] > 0.2
    assert alive["dead"] == 0


def test_every_logit_has_mean_0_and_variance_1_over_the_images_of_a_batch():
    model = source(logit_norm=True)
    logits = model.logits(pyramid(8), sizes(8)).flatten(1)
    torch.testing.assert_close(logits.mean(dim=0), torch.zeros(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.var(dim=0, correction=0), torch.ones(24), atol=0.05, rtol=0)


def test_a_batch_of_one_image_is_compared_with_the_images_before():
    model = source(logit_norm=True)
    for seed in range(40):
        model.logits(pyramid(4, seed=seed), sizes(4))
    one = pyramid(1, seed=99)
    expected = copy.deepcopy(model).eval().logits(one, sizes(1))
    found = model.logits(one, sizes(1))
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0.1


def test_the_default_mixture_neither_decides_nor_forgets_the_image_within_a_few_steps():
    """Without standardizing, forty steps make it one-hot and the same for all images."""
    results = {}
    for standardize in (True, False):
        cfg = tiny_cfg(
            *("MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.NUM_PROPOSALS", 20),
            *("MODEL.SparseRCNN.DPG.STANDARDIZE", standardize, "SOLVER.MAX_ITER", 600),
            *("MODEL.SparseRCNN.DPG.LOGIT_NORM", False),
        )
        model = DynamicProposals(cfg)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        goal = torch.randn(1, 20, 32)
        features = [20 * x.abs() for x in pyramid(channels=32)]  # sums of about a thousand
        for _ in range(40):
            loss = (model(features, sizes()).features - goal).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        statistics = mixing_statistics(model.weights(features, sizes()))
        results[standardize] = {k: v.item() for k, v in statistics.items()}
    assert results[True]["entropy"] > 0.5
    assert results[True]["variation"] > 0.005
    assert results[True]["dead"] == 0
    assert results[False]["entropy"] < 0.05
    assert results[False]["variation"] < 0.001
    assert results[False]["dead"] > 0.5


def test_the_training_log_tells_temperature_and_mixture():
    model = build_model(dpg("MODEL.SparseRCNN.DPG.LOG_PERIOD", 20))
    for iteration, names in ((18, set()), (19, {"tau", "entropy", "variation", "dead"})):
        with EventStorage(iteration) as storage:
            model(batch(SIZES, [2, 1]))
        logged = {k.removeprefix("dpg/"): v[0] for k, v in storage.latest().items()}
        assert names <= set(logged)
    assert logged["tau"] == pytest.approx(30, rel=1e-3)
    assert 0 <= logged["variation"] <= 1
