"""Models that are no longer used leave memory at once, not when Python looks for cycles."""

import gc
import weakref
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import coco_options, quick_cfg, save_model

import dsrcnn
from dsrcnn.engine.trainer import Trainer
from dsrcnn.utils.references import weak_method

AVERAGE = ["MODEL.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 1, "HOOKS.AFTER_EVAL", ["true"]]


@contextmanager
def no_collection():
    """Do not look for cycles inside."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("opts", [
    [], [*AVERAGE, "TEST.BEST.METRIC", "bbox/AP"],
    ["MODEL.SparseRCNN.DLA.ENABLED", True, "MODEL.SparseRCNN.DPG.ENABLED", True],
    ["MODEL.SparseRCNN.SQR.ENABLED", True, "MODEL.SparseRCNN.PROPOSALS.NAME", "DenseDistinct"],
], ids=["plain", "average, evaluations, command", "DLA, DPG", "SQR, distinct"])  # fmt: skip
def test_a_trainer_and_its_model_are_gone_with_their_last_name(tmp_path, opts):
    options = [*coco_options(tmp_path / "data"), "SOLVER.MAX_ITER", 2, *opts]
    cfg = quick_cfg(tmp_path, *options)
    with no_collection():
        trainer = Trainer(cfg)
        trainer.resume_or_load()
        trainer.train()
        parts = [trainer, trainer.model, trainer._trainer, trainer._trainer.optimizer]
        references = [weakref.ref(part) for part in parts]
        del trainer, parts
        assert [reference() for reference in references] == [None] * 4


def test_a_detector_is_gone_with_its_last_name(tmp_path):
    save_model(tmp_path / "model.pth")
    images = [np.zeros((64, 64, 3), np.uint8)] * 3
    with no_collection():
        detector = dsrcnn.load(tmp_path / "model.pth")
        detector.predict(images[0])
        detector.predict(images)
        reference = weakref.ref(detector.model)
        del detector
        assert reference() is None


class _Counter:
    total = 0

    def add(self, value: int) -> int:
        self.total += value
        return self.total


def test_a_weak_method_works_as_long_as_its_object():
    counter = _Counter()
    add = weak_method(counter.add)
    assert [add(2), add(value=3)] == [2, 5]
    del counter
    with pytest.raises(ReferenceError, match="gone"):
        add(1)
