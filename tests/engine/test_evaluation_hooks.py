import json
import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import batch, coco_options, quick_cfg, tiny_cfg, train
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dsrcnn.config import load_cfg, read_cfg
from dsrcnn.engine.eval_hooks import (
    BestModel,
    EarlyStop,
    Evaluation,
    data_fingerprint,
    eval_loss_mode,
    validation_losses,
)
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import CheckpointError, ConfigError


class Files:
    """Remembers what a checkpointer would write."""

    def __init__(self):
        self.written = {}
        self.full = False

    def write(self, name, content):
        if self.full:
            raise CheckpointError("No space left on device")
        self.written[name] = content


def best(metric="bbox/AP", patience=0, required=True):
    options = {"checkpointer": Files(), "weights": lambda: {"w": 1}}
    return BestModel(metric, patience=patience, required=required, **options)


def update(model, values, first=0):
    for iteration, value in enumerate(values, start=first):
        model.update({model.metric: value}, iteration)


def test_the_best_model_is_written_only_when_it_is_better():
    model = best()
    update(model, [3.0, 5.0, 5.0, float("nan"), 4.0])
    written = model.checkpointer.written["model_best.pth"]
    assert written == {"model": {"w": 1}, "iteration": 1, "bbox/AP": 5.0}
    assert model.waited == 3


@pytest.mark.parametrize("metric", ["validation/total_loss", "set/validation/loss_ce", "bbox/mMR"])
def test_less_is_better_for_losses_and_miss_rates(metric):
    model = best(metric)
    update(model, [3.0, 5.0, 2.0])
    assert (model.value, model.iteration) == (2.0, 2)


@pytest.mark.parametrize("metric", ["loss/bbox/AP", "validation/bbox/AP50", "bbox/AP-gloss"])
def test_more_is_better_for_datasets_and_classes_with_the_name_of_a_loss(metric):
    model = best(metric)
    update(model, [3.0, 5.0, 2.0])
    assert (model.value, model.iteration) == (5.0, 1)


def test_patience_survives_a_resume():
    model = best(patience=2)
    update(model, [3.0, 2.0])
    resumed = best(patience=2)
    resumed.load_state_dict(model.state_dict())
    assert not resumed.is_final
    update(resumed, [2.9], first=2)
    assert resumed.is_final
    assert not resumed.checkpointer.written


def test_another_metric_starts_anew_on_resume(caplog):
    before = best("bbox/AP50", patience=2)
    update(before, [60.0, 50.0])
    resumed = best("bbox/AP", patience=2)
    resumed.load_state_dict(before.state_dict())
    assert "by bbox/AP50 and is now by bbox/AP" in caplog.text
    update(resumed, [30.0, 35.0], first=2)
    assert not resumed.is_final
    assert resumed.checkpointer.written["model_best.pth"]["iteration"] == 3
    old = {k: v for k, v in before.state_dict().items() if k != "metric"}  # of earlier versions
    same = best("bbox/AP50", patience=2)
    same.load_state_dict(old)
    assert (same.value, same.waited) == (60.0, 1)


def test_other_test_data_start_anew_on_resume(caplog):
    before = best(patience=2)
    before.data = lambda: "old"
    update(before, [60.0, 50.0])
    before.data = lambda: 1 / 0  # a checkpoint is written without the data
    assert before.state_dict()["fingerprint"] == "old"
    same = best(patience=2)
    same.data = lambda: "old"
    same.load_state_dict(before.state_dict())
    assert (same.value, same.waited) == (60.0, 1)
    resumed = best(patience=2)
    resumed.data = lambda: "new"
    resumed.load_state_dict(before.state_dict())
    assert "test data are others" in caplog.text
    update(resumed, [30.0, 35.0], first=2)
    assert resumed.checkpointer.written["model_best.pth"]["iteration"] == 3


def test_a_fingerprint_is_of_images_and_labels_not_of_places(tmp_path):
    hashes = []
    changes = {"d": {"bbox": [6, 5, 30, 30]}, "e": {"iscrowd": 1}}
    for name, count in (("a", 3), ("b", 3), ("c", 4), ("d", 3), ("e", 3)):
        cfg = load_cfg("quick/sparse_rcnn_shapes", coco_options(tmp_path / name, count))
        if name in changes:  # after registration, which reads classes only
            file = tmp_path / name / "annotations.json"
            content = json.loads(file.read_text())
            content["annotations"][0] |= changes[name]
            file.write_text(json.dumps(content))
        hashes.append(data_fingerprint(cfg.DATASETS.TEST[0]))
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


def test_a_fingerprint_of_files_whose_names_are_no_text(tmp_path, write_image):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    name = os.fsdecode(b"m\xfcll")  # of an archive from Windows
    write_image(np.zeros((40, 60, 3), np.uint8), f"images/{name}.png")
    (tmp_path / f"labels/{name}.txt").write_text("0 0.5 0.5 0.4 0.4\n")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [cell]\n")
    cfg = load_cfg("quick/sparse_rcnn_shapes", ["DATASETS.CUSTOM.FOLDER", str(tmp_path)])
    assert len(data_fingerprint(cfg.DATASETS.TEST[0])) == 64


def test_a_missing_metric_is_an_error_if_configured_and_else_a_warning(caplog):
    with pytest.raises(ConfigError, match="'bbox/AP', but the evaluation gives AP, AR"):
        best().update({"AP": 1.0, "AR": 2.0}, 0)
    model = best(required=False)
    model.update({"AP": 1.0}, 0)
    assert "No best model is kept" in caplog.text
    assert not model.checkpointer.written


def test_a_full_disk_costs_the_best_model_but_not_the_run(caplog):
    model = best()
    update(model, [3.0])
    model.checkpointer.full = True
    update(model, [5.0], first=1)
    assert "No space left" in caplog.text
    model.checkpointer.full = False
    update(model, [4.0], first=2)  # better than the model in the file
    assert model.checkpointer.written["model_best.pth"]["iteration"] == 2


def run_hook(hook, *, start=0, stop=10, end=None):
    """Run the iterations of a training with the hook; `end` is where the run is killed."""
    trainer = SimpleNamespace(start_iter=start, max_iter=stop, storage=EventStorage(start))
    hook.trainer = trainer
    trainer.iter = start
    hook.before_train()
    for trainer.iter in range(start, stop if end is None else end):
        hook.after_step()
    if end is None:
        trainer.iter += 1
        hook.after_train()


def evaluation(period, values=None, **options):
    """A hook and the list of its evaluated iterations, with results from `values`."""
    calls = []

    def evaluate():
        calls.append(hook.trainer.iter)
        return {"bbox": {"AP": values[len(calls) - 1] if values else 1.0}}

    hook = Evaluation(period, evaluate, best(**options) if values else None)
    return hook, calls


def resumed_after(hook, period, values=None, **options):
    resumed, calls = evaluation(period, values, **options)
    resumed.load_state_dict(hook.state_dict())
    return resumed, calls


@pytest.mark.parametrize(
    ("period", "expected"), [(4, [3, 7, 10]), (5, [4, 10]), (0, [10]), (20, [10])]
)
def test_evaluation_happens_every_period_and_once_at_the_end(period, expected):
    hook, calls = evaluation(period)
    run_hook(hook)
    assert calls == expected


@pytest.mark.parametrize(("killed_at", "expected"), [(3, [4, 7, 10]), (5, [7, 10])])
def test_a_resumed_run_repeats_an_evaluation_only_if_it_is_missing(killed_at, expected):
    hook, _ = evaluation(4)
    run_hook(hook, end=killed_at)  # with a checkpoint of iteration 3
    resumed, calls = resumed_after(hook, 4)
    run_hook(resumed, start=4)
    assert calls == expected
    assert resumed.done == 9


def test_an_extended_run_evaluates_the_end_of_the_finished_one_and_keeps_its_best_model():
    hook, _ = evaluation(4, [30.0, 35.0], patience=0)
    run_hook(hook, end=10)  # the last checkpoint is written before the evaluation at the end
    resumed, calls = resumed_after(hook, 4, [40.0, 37.0, 38.0, 36.0])
    run_hook(resumed, start=10, stop=18)
    assert calls == [10, 11, 15, 18]
    assert (resumed.best.value, resumed.best.iteration) == (40.0, 9)


def test_training_stops_without_improvement():
    hook, calls = evaluation(2, [1.0, 3.0, 2.0, 2.5, 9.0], patience=2)
    with pytest.raises(EarlyStop) as stop:
        run_hook(hook)
    assert stop.value.iteration == 7
    assert calls == [1, 3, 5, 7]


def test_a_run_that_ended_early_or_should_have_ends_again_on_resume():
    ended, _ = evaluation(2, [3.0, 1.0, 2.0], patience=2)
    with pytest.raises(EarlyStop):
        run_hook(ended)
    killed, _ = evaluation(2, [3.0, 1.0], patience=2)
    run_hook(killed, end=5)  # before the evaluation of iteration 5
    for hook, again in ((ended, []), (killed, [6])):
        resumed, calls = resumed_after(hook, 2, [1.5], patience=2)
        with pytest.raises(EarlyStop) as stop:
            run_hook(resumed, start=6)
        assert (stop.value.iteration, calls) == (5, again)


def test_an_error_in_the_last_iteration_is_not_followed_by_an_evaluation():
    hook, calls = evaluation(0)
    hook.trainer = SimpleNamespace(iter=9, max_iter=10)
    hook.after_train()
    assert not calls


def test_early_stopping_ends_a_run_with_both_models(tmp_path, caplog):
    options = ["TEST.BEST.PATIENCE", 1, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 50]
    options += ["TEST.LOSS", True, "SOLVER.BASE_LR", 1e-30]  # so nothing can improve
    cfg = quick_cfg(tmp_path / "out", *coco_options(tmp_path), *options, "LOG.IMAGES", 0)
    with caplog.at_level(logging.INFO):
        trainer = train(cfg)
    assert set(trainer._last_eval_results) == {"bbox"}
    assert "Traceback" not in caplog.text
    assert "training ends early" in caplog.text
    assert torch.load(tmp_path / "out/model_final.pth")["iteration"] == 1
    files = sorted(path.name for path in (tmp_path / "out").glob("model_*.pth"))
    for _ in range(3):  # each of which leaves the run as it was
        resumed = Trainer(cfg)
        resumed.resume_or_load(resume=True)
        assert resumed.start_iter == 2
        assert resumed.train() == {}
        assert torch.load(tmp_path / "out/model_final.pth")["iteration"] == 1
        assert sorted(path.name for path in (tmp_path / "out").glob("model_*.pth")) == files
    assert (tmp_path / "out/model_best.pth").is_file()
    logged = trainer.storage.latest()
    assert {"validation/total_loss", "validation/loss_ce", "bbox/AP"} <= set(logged)


def test_predictions_are_drawn_at_every_evaluation(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(quick_cfg(tmp_path / "out", *coco_options(tmp_path), "LOG.IMAGES", 2))
    events = EventAccumulator(str(tmp_path / "out"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["predictions/0", "predictions/3"]


def test_with_several_test_sets_the_first_one_decides(tmp_path):
    cfg = quick_cfg(tmp_path, "DATASETS.TEST", "('shapes_val', 'shapes_train')")
    assert Trainer(cfg).best.metric == "shapes_val/bbox/AP"


BN = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]


def test_validation_losses_are_deterministic_and_leave_the_model_unchanged():
    opts = [*BN, "MODEL.SparseRCNN.DROPOUT", 0.5, "MODEL.SparseRCNN.DPG.ENABLED", True]
    model = build_model(tiny_cfg(*opts))
    model.head.eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [batch([(64, 96)], [2], seed=s) for s in range(3)]
    losses = validation_losses(model, batches)
    assert validation_losses(model, batches) == losses
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    parts = [value for name, value in losses.items() if name != "total_loss"]
    assert losses["total_loss"] == pytest.approx(sum(parts))


@pytest.mark.parametrize(("name", "key"), [
    ("quick/dynamic_rcnn_shapes", "MODEL.ROI_HEADS.NUM_CLASSES"),  # samples proposals
    ("quick/asag_a_shapes", "MODEL.SparseRCNN.NUM_CLASSES"),  # has noisy queries with DN
])  # fmt: skip
def test_validation_losses_do_not_depend_on_the_draws_of_training(name, key):
    options = ["MODEL.DEVICE", "cpu", key, 5, "MODEL.ASAG.DN.ENABLED", True]
    model = build_model(read_cfg(name, options)).train()
    batches = [batch([(64, 96)], [6], seed=s) for s in range(2)]
    with torch.no_grad(), EventStorage():
        drawn = {float(sum(model(batches[0]).values())) for _ in range(3)}
    assert len(drawn) > 1
    losses = []
    for seed in range(2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        losses.append(validation_losses(model, batches))
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]


def test_validation_losses_are_without_stochastic_depth():
    pytest.importorskip("timm")
    network = ["MODEL.BACKBONE.NAME", "build_timm_fpn_backbone", "MODEL.TIMM.NAME", "test_convnext"]
    model = build_model(tiny_cfg(*network, "MODEL.TIMM.DROP_PATH", 0.5))
    batches = [batch([(64, 96)], [2], seed=s) for s in range(3)]
    losses = validation_losses(model, batches)
    plain = build_model(tiny_cfg(*network))
    plain.load_state_dict(model.state_dict())
    assert losses == pytest.approx(validation_losses(plain, batches), rel=1e-5)


def test_validation_losses_are_those_of_the_cascade_without_recollection():
    stages = ["MODEL.SparseRCNN.NUM_HEADS", 4]
    plain = build_model(tiny_cfg(*stages))
    recollecting = build_model(tiny_cfg(*stages, "MODEL.SparseRCNN.SQR.ENABLED", True))
    recollecting.load_state_dict(plain.state_dict())
    inputs = batch([(64, 96)], [2])
    assert validation_losses(recollecting, [inputs]) == validation_losses(plain, [inputs])
    recollecting.train()
    assert len(recollecting.raw_predictions(inputs)[0].stage) == 1 + 2 + 3 + 5


def test_validation_losses_are_means_over_images():
    model = build_model(tiny_cfg()).eval()
    batches = [batch([(64, 96)], [2], seed=s) for s in range(2)]
    means = validation_losses(model, batches)
    with eval_loss_mode(model):
        losses = [model(b)["loss_giou"].item() for b in batches]
    assert means["loss_giou"] == pytest.approx(sum(losses) / 2)


def test_norms_use_stored_statistics_for_validation_losses():
    model = build_model(tiny_cfg(*BN))
    inputs = batch([(64, 96)], [2])
    with eval_loss_mode(model):
        logits = model.raw_predictions(inputs)[0].logits[-1]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(logits, model.raw_predictions(inputs)[0].logits[-1])
