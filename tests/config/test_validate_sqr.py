"""Configs of recollection that make no sense, refused with what to write."""

import pytest
from conftest import tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.config import check_config
from dsrcnn.errors import ConfigError

KEY = "MODEL.SparseRCNN."


def check(*opts):
    four_stages = [f"{KEY}NUM_HEADS", 4, f"{KEY}SQR.ENABLED", True, f"{KEY}SQR.START", 1]
    check_config(tiny_cfg(*four_stages, *opts))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("MODE", "sparse", "SQR.MODE is 'sparse'"),
        ("REDUCTION", "max", "SQR.REDUCTION is 'max'"),
        ("CHUNK", -1, "SQR.CHUNK is -1"),
        ("START", 0, "SQR.START is 0; write a stage from 1 to 4"),
        ("START", 5, "SQR.START is 5"),
    ],
)
def test_values_that_cannot_work_are_refused(name, value, words):
    with pytest.raises(ConfigError, match=words):
        check(f"{KEY}SQR.{name}", value)


@pytest.mark.parametrize(
    "opts",
    [
        (f"{KEY}SQR.ENABLED", False),
        (f"{KEY}SQR.MODE", "dense"),
        (f"{KEY}SQR.WINDOWS", "[[0, 1], [0, 2], [1, 4], [2, 7]]"),
    ],
)
def test_a_start_that_is_not_used_may_be_any(opts):
    check(f"{KEY}SQR.START", 5, *opts)


@pytest.mark.parametrize(("name", "value"), [("MODE", "dens"), ("REDUCTION", "avg"), ("START", 9)])
def test_models_that_are_built_from_any_config_refuse_them_too(name, value):
    with pytest.raises(ConfigError, match=f"SQR.{name} is "):
        build_model(tiny_cfg(f"{KEY}SQR.ENABLED", True, f"{KEY}SQR.{name}", value))


def test_recollection_needs_losses_on_every_stage():
    with pytest.raises(ConfigError, match=r"DEEP_SUPERVISION True"):
        check(f"{KEY}DEEP_SUPERVISION", False)
