import time

import pytest
from conftest import TINY

from benchmarks.__main__ import main
from benchmarks.loader import PIPELINES, share_of_waiting
from dsrcnn.config.load import load_cfg
from dsrcnn.data import DetectionMapper, build_train_loader
from dsrcnn.data.samplers import Draw

SMALL = [*map(str, TINY), "MODEL.SparseRCNN.NUM_CLASSES", "0", "INPUT.AUG.MOSAIC.SIZE", "64"]
SMALL += ["SOLVER.IMS_PER_BATCH", "2"]
COMMAND = ["loader", "--config-file", "quick/sparse_rcnn_shapes"]


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_gives_images(name):
    cfg = load_cfg("quick/sparse_rcnn_shapes", [*SMALL, *PIPELINES[name]])
    assert build_train_loader(cfg).dataset[Draw(0, 1)]["image"].shape[0] == 3


def test_pipelines_are_measured_beside_each_other_with_waiting(capsys):
    chosen = ["--pipelines", "plain", "mosaic-mixup", "--workers", "0", "--batches", "2"]
    rest = ["--repeats", "2", "--iterations", "2", "--set", *SMALL]
    assert main([*COMMAND, *chosen, *rest]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["plain", "mosaic-mixup"]
    assert float(rows[0][2]) == 1.0
    assert float(rows[1][2]) > 0
    assert all(0 < float(row[3].strip().rstrip("%")) < 100 for row in rows)


def test_training_waits_the_longer_the_slower_the_loader_is(monkeypatch):
    opts = [*SMALL, "DATALOADER.NUM_WORKERS", "0"]
    plain = share_of_waiting("quick/sparse_rcnn_shapes", opts, 2)
    load = DetectionMapper.__call__

    def slowly(self, record):
        time.sleep(0.5)
        return load(self, record)

    monkeypatch.setattr(DetectionMapper, "__call__", slowly)
    assert 0 < plain < share_of_waiting("quick/sparse_rcnn_shapes", opts, 2) < 1


def test_an_unknown_pipeline_is_one_message(capsys):
    assert main([*COMMAND, "--pipelines", "fancy"]) == 2
    assert "'fancy'; write some of plain, plain-opencv" in capsys.readouterr().err
