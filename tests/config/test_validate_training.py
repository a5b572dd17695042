"""Values of training keys that cannot work are refused, with what to write instead."""

import pytest
from conftest import tiny_cfg

from dsrcnn.config.validate import check_config
from dsrcnn.errors import ConfigError


@pytest.mark.parametrize(
    ("opts", "words"),
    [
        (["SOLVER.AMP.PRECISION", "fp8"], ["'fp8'", "bf16, fp16"]),
        (["SOLVER.ACCUMULATE", 0], ["SOLVER.ACCUMULATE is 0", "at least 1"]),
        (["SOLVER.NO_DECAY", "('norms',)"], ["'norms'", "norm, bias, embedding"]),
        (["SOLVER.LAYER_DECAY", 1.5], ["SOLVER.LAYER_DECAY is 1.5", "at most 1"]),
        (["MODEL.EMA.DECAY", 0.0], ["MODEL.EMA.DECAY is 0.0", "above 0"]),
        (["SOLVER.EPOCHS.EVAL", 1.0], ["SOLVER.EPOCHS.MAX is 0", "how many epochs"]),
        (["SOLVER.EPOCHS.STEPS", "(8, 11)"], ["SOLVER.EPOCHS.MAX is 0"]),
        (["TEST.BEST.METRIC", "", "TEST.BEST.PATIENCE", 2], ["which is empty", "PATIENCE 0"]),
        (["TEST.BEST.METRIC", "validation/loss_ce"], ["no losses on test data", "TEST.LOSS True"]),
        (
            ["TEST.BEST.METRIC", "validation/loss_ce", "TEST.LOSS", True],
            ["keep the worst model", "MODE min"],
        ),
    ],
)
def test_what_cannot_work_is_refused_with_what_to_write(opts, words):
    with pytest.raises(ConfigError) as error:
        check_config(tiny_cfg(*opts))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_the_model_of_the_least_loss_can_be_kept():
    opts = ["TEST.BEST.METRIC", "validation/loss_ce", "TEST.LOSS", True, "TEST.BEST.MODE", "min"]
    check_config(tiny_cfg(*opts))
