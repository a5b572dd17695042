import math

import pytest
import torch
from conftest import coco_options, quick_cfg
from detectron2.engine import DefaultPredictor

from dsrcnn.config.load import load_cfg
from dsrcnn.data.datasets.shapes import draw_scene
from dsrcnn.data.mapper import read_image
from dsrcnn.engine.main import evaluate
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import DataError, NonFiniteLossError


def few_images(folder, *options):
    """The tiny model on four images of two classes."""
    return quick_cfg(folder, *coco_options(folder / "data"), *options)


def train(cfg, *, resume=False):
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def test_a_short_training_lowers_the_loss_evaluates_and_predicts(tmp_path):
    cfg = quick_cfg(tmp_path, "SOLVER.MAX_ITER", 60, "SOLVER.WARMUP_ITERS", 5)
    trainer = train(cfg)
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert set(trainer._last_eval_results["bbox"]) >= {"AP", "AP50", "AP-circle"}

    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    again = evaluate(cfg)["bbox"]
    for name, value in trainer._last_eval_results["bbox"].items():
        assert again[name] == pytest.approx(value, nan_ok=True), name

    (tmp_path / "config.yaml").write_text(cfg.dump())
    saved = load_cfg(tmp_path / "config.yaml", ["MODEL.WEIGHTS", cfg.MODEL.WEIGHTS])
    predictor = DefaultPredictor(saved)
    found = predictor(draw_scene("val", 0))["instances"]
    assert found.image_size == draw_scene("val", 0).shape[:2]
    assert predictor.metadata.thing_classes[0] == "circle"


def test_a_resumed_run_goes_on_where_it_was(tmp_path):
    train(few_images(tmp_path, "SOLVER.MAX_ITER", 3))
    trainer = train(few_images(tmp_path, "SOLVER.MAX_ITER", 5), resume=True)
    assert trainer.start_iter == 3
    assert trainer.iter == 5
    steps = {s["step"].item() for s in trainer.optimizer.state_dict()["state"].values()}
    assert steps == {5.0}


def test_an_unreadable_image_stops_training_but_keeps_the_model(tmp_path, monkeypatch):
    calls = []

    def fail_at_the_sixth(record, *how):
        calls.append(record)
        if len(calls) == 6:
            raise DataError("Image gone.jpg cannot be read")
        return read_image(record, *how)

    monkeypatch.setattr("dsrcnn.data.mapper.read_image", fail_at_the_sixth)
    cfg = quick_cfg(tmp_path, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 30)
    with pytest.raises(DataError, match=r"gone\.jpg") as error:
        train(cfg)
    reached = torch.load(sorted(tmp_path.glob("model_*.pth"))[-1])["iteration"]
    assert f"after {reached + 1} iterations" in str(error.value)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == reached + 1 > 1


def test_a_diverging_loss_stops_training_and_names_the_last_checkpoint(tmp_path):
    options = ["SOLVER.BASE_LR", 1e12, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 1]
    cfg = quick_cfg(tmp_path, *options, "SOLVER.MAX_ITER", 50)
    with pytest.raises(NonFiniteLossError) as error:
        train(cfg)
    last = (tmp_path / "last_checkpoint").read_text()
    assert last in str(error.value)
    assert "shapes://train" in str(error.value)
    state = torch.load(tmp_path / last)["model"]
    assert not any(math.isnan(v.float().sum()) for v in state.values() if v.numel())


def test_the_progress_bar_comes_before_the_writers(tmp_path):
    names = [type(h).__name__ for h in Trainer(quick_cfg(tmp_path))._hooks]
    assert names[-2:] == ["ProgressBar", "PeriodicWriter"]


def test_mixed_precision_trains_on_a_cpu(tmp_path):
    trainer = train(few_images(tmp_path, "SOLVER.AMP.ENABLED", True))
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_evaluation_with_test_time_augmentation_adds_its_metrics(tmp_path):
    train(few_images(tmp_path, "SOLVER.MAX_ITER", 1))
    options = ["TEST.AUG.ENABLED", True, "TEST.AUG.SCALE_FILTER", False]
    options += ["TEST.AUG.MIN_SIZES", "(64,)", "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    results = evaluate(few_images(tmp_path, *options))
    assert set(results) == {"bbox", "bbox_TTA"}
    assert set(results["bbox_TTA"]) == set(results["bbox"])
    assert (tmp_path / "tta/inference/coco_instances_results.json").is_file()


def test_dynamic_sparse_rcnn_trains_resumes_evaluates_and_predicts(tmp_path):
    dynamic = ["MODEL.META_ARCHITECTURE", "DynamicSparseRCNN", "MODEL.SparseRCNN.DLA.ENABLED", True]
    dynamic += ["MODEL.SparseRCNN.DPG.ENABLED", True, "MODEL.SparseRCNN.DPG.TAU_ITERS", 10]
    train(few_images(tmp_path, *dynamic, "SOLVER.MAX_ITER", 3))
    cfg = few_images(tmp_path, *dynamic, "SOLVER.MAX_ITER", 20)
    trainer = train(cfg, resume=True)
    assert trainer.start_iter == 3
    proposals = trainer.model.proposals
    assert proposals.step == 20
    logged = trainer.storage.latest()
    assert logged["dpg/tau"][0] == 4.0
    assert {"dla/positives", "dpg/entropy", "dpg/variation"} <= set(logged)

    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    again = evaluate(cfg)["bbox"]
    for name, value in trainer._last_eval_results["bbox"].items():
        assert again[name] == pytest.approx(value, nan_ok=True), name
    found = DefaultPredictor(cfg)(draw_scene("val", 0))["instances"]
    assert found.image_size == draw_scene("val", 0).shape[:2]
