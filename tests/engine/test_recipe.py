import json

import pytest
import torch
from conftest import SMALL, coco_options, quick_cfg

from dsrcnn.engine.main import run
from dsrcnn.engine.setup import final_recipe, warn_of_few_images
from dsrcnn.engine.trainer import Trainer

QUICK = ["--config-file", "quick/sparse_rcnn_shapes"]


def test_the_recipe_is_final_after_the_first_time(tmp_path):
    options = ["SOLVER.EPOCHS.MAX", 6, "SOLVER.REFERENCE_BATCH", 4, "SOLVER.BASE_LR", 0.004]
    cfg = quick_cfg(tmp_path / "out", *coco_options(tmp_path), *options, "SEED", -1)
    first = final_recipe(cfg)
    assert first.SOLVER.MAX_ITER == 12  # four images in batches of two
    assert pytest.approx(0.002) == first.SOLVER.BASE_LR
    assert first.SEED >= 0
    assert final_recipe(first) == first
    assert cfg.SOLVER.EPOCHS.MAX == 6  # what was given is not changed


def test_a_batch_that_grew_with_the_processes_scales_the_learning_rate_once(tmp_path, monkeypatch):
    options = ["SOLVER.REFERENCE_BATCH", 2, "SOLVER.REFERENCE_WORLD_SIZE", 2]
    cfg = quick_cfg(tmp_path, *options, "SOLVER.BASE_LR", 0.001)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
    final = final_recipe(cfg)
    assert final.SOLVER.IMS_PER_BATCH == 4
    assert pytest.approx(0.002) == final.SOLVER.BASE_LR


def test_what_the_recipe_decides_is_in_the_log(tmp_path):
    output = tmp_path / "out"
    options = ["SOLVER.EPOCHS.MAX", "1", "SOLVER.REFERENCE_BATCH", "4", "SEED", "-1"]
    options += [*SMALL, *coco_options(tmp_path), "OUTPUT_DIR", str(output)]
    assert run([*QUICK, *options]) == 0
    log = (output / "log.txt").read_text()
    for words in ("epochs of 4 images", "meant for 4 images, becomes", "SEED is drawn"):
        assert log.count(words) == 1, words


@pytest.mark.parametrize(("images", "warns"), [(2, True), (4, False)])
def test_dpg_with_few_images_to_compare_says_so(tmp_path, caplog, images, warns):
    options = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 4 // images]
    warn_of_few_images(quick_cfg(tmp_path, *options, "MODEL.SparseRCNN.DPG.ENABLED", True))
    assert ("DPG compares the 2 images of a step" in caplog.text) == warns


def test_frozen_modules_of_a_run_stay_as_they_were(tmp_path):
    options = [*coco_options(tmp_path), "MODEL.FREEZE", "('backbone',)", "LOG.IMAGES", 0]
    trainer = Trainer(quick_cfg(tmp_path / "out", *options))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.resume_or_load(resume=False)
    trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("backbone"))
    assert not all(torch.equal(after[k], v) for k, v in before.items())


def test_the_hooks_are_the_same_on_all_processes_whatever_they_write(tmp_path, monkeypatch):
    names = []
    for is_main in (True, False):
        monkeypatch.setattr(
            "detectron2.utils.comm.is_main_process", lambda is_main=is_main: is_main
        )
        options = [*coco_options(tmp_path), "MODEL.EMA.ENABLED", True]
        trainer = Trainer(quick_cfg(tmp_path / "out", *options))
        names.append([type(hook).__name__ for hook in trainer._hooks])
    assert names[0] == names[1]
    order = ["LRScheduler", "CallbackHook", "AverageNorms", "Checkpoints", "Evaluation"]
    assert [n for n in names[0] if n in order] == order
    assert names[0][-2:] == ["ProgressBar", "PeriodicWriter"]


def test_every_start_of_a_run_is_recorded(tmp_path):
    output = tmp_path / "out"
    options = [*SMALL, *coco_options(tmp_path), "OUTPUT_DIR", str(output), "SEED", "-1"]
    assert run([*QUICK, *options]) == 0
    assert run([*QUICK, "--resume", *options]) == 0
    starts = [json.loads(x) for x in (output / "environment.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert torch.__version__.startswith(starts[0]["packages"]["torch"])
    assert starts[0]["seed"] == starts[1]["seed"]  # drawn once
    assert {"command", "device", "processes", "dsrcnn", "commit", "changed"} <= set(starts[0])
