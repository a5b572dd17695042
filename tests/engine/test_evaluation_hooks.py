import logging
from types import SimpleNamespace

import pytest
import torch
from conftest import batch, coco_options, quick_cfg, tiny_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from dsrcnn.engine.eval_hooks import (
    BestModel,
    EarlyStop,
    Evaluation,
    losses_without_learning,
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


def best(**options):
    return BestModel("bbox/AP", checkpointer=Files(), weights=lambda: {"w": 1}, **options)


def test_the_best_model_is_written_when_it_is_better_and_only_then():
    model = best()
    for iteration, value in enumerate([3.0, 5.0, 5.0, float("nan"), 4.0]):
        model.update({"bbox/AP": value}, iteration)
    written = model.checkpointer.written["model_best.pth"]
    assert written == {"model": {"w": 1}, "iteration": 1, "bbox/AP": 5.0}
    assert model.waited == 3


def test_less_can_be_better():
    model = best(mode="min")
    for iteration, value in enumerate([3.0, 5.0, 2.0]):
        model.update({"bbox/AP": value}, iteration)
    assert (model.value, model.iteration) == (2.0, 2)


def test_patience_survives_a_resume():
    model = best(patience=2)
    for iteration, value in enumerate([3.0, 2.0]):
        model.update({"bbox/AP": value}, iteration)
    resumed = best(patience=2)
    resumed.load_state_dict(model.state_dict())
    assert not resumed.is_final
    resumed.update({"bbox/AP": 2.9}, 2)
    assert resumed.is_final
    assert not resumed.checkpointer.written


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ConfigError, match="'bbox/AP', but the evaluation gives AP, AR"):
        best().update({"AP": 1.0, "AR": 2.0}, 0)


def test_a_metric_that_was_not_asked_for_may_be_missing(caplog):
    model = best(required=False)
    model.update({"AP": 1.0}, 0)
    assert "No best model is kept" in caplog.text
    assert not model.checkpointer.written


def test_a_full_disk_costs_the_best_model_but_not_the_run(caplog):
    model = best()
    model.update({"bbox/AP": 3.0}, 0)
    model.checkpointer.full = True
    model.update({"bbox/AP": 5.0}, 1)
    assert "No space left" in caplog.text
    model.checkpointer.full = False
    model.update({"bbox/AP": 4.0}, 2)  # better than what is in the file
    assert model.checkpointer.written["model_best.pth"]["iteration"] == 2


def run_hook(hook, *, start=0, stop=10, end=None):
    """Iterations in which `hook` evaluates; `end` is where the run is cut off."""
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
    calls = []

    def evaluate():
        calls.append(evaluation_hook.trainer.iter)
        return {"bbox": {"AP": values[len(calls) - 1] if values else 1.0}}

    evaluation_hook = Evaluation(period, evaluate, best(**options) if values else None)
    return evaluation_hook, calls


def test_evaluation_every_period_and_once_at_the_end():
    for period, expected in ((4, [3, 7, 10]), (5, [4, 10]), (0, [10]), (20, [10])):
        hook, calls = evaluation(period)
        run_hook(hook)
        assert calls == expected, period


def test_an_evaluation_that_was_cut_off_is_made_up_for():
    hook, calls = evaluation(4)
    run_hook(hook, end=3)  # the checkpoint of iteration 3 was written, then came the end
    resumed, again = evaluation(4)
    resumed.load_state_dict(hook.state_dict())
    run_hook(resumed, start=4)
    assert calls == []
    assert again == [4, 7, 10]  # before the first step, then as usual
    assert resumed.done == 9


def test_an_evaluation_that_was_finished_is_not_repeated():
    hook, _ = evaluation(4)
    run_hook(hook, end=5)
    resumed, again = evaluation(4)
    resumed.load_state_dict(hook.state_dict())
    run_hook(resumed, start=4)
    assert again == [7, 10]


def test_training_stops_when_nothing_gets_better():
    hook, calls = evaluation(2, [1.0, 3.0, 2.0, 2.5, 9.0], patience=2)
    with pytest.raises(EarlyStop) as stop:
        run_hook(hook)
    assert stop.value.iteration == 7
    assert calls == [1, 3, 5, 7]


def test_a_run_that_ended_early_or_should_have_ends_again_on_resume():
    ended, _ = evaluation(2, [3.0, 1.0, 2.0], patience=2)
    with pytest.raises(EarlyStop):
        run_hook(ended)
    cut_off, _ = evaluation(2, [3.0, 1.0], patience=2)
    run_hook(cut_off, end=5)  # killed before the evaluation of iteration 5
    for state, again in ((ended.state_dict(), []), (cut_off.state_dict(), [6])):
        resumed, calls = evaluation(2, [1.5], patience=2)
        resumed.load_state_dict(state)
        with pytest.raises(EarlyStop) as stop:
            run_hook(resumed, start=6)
        assert (stop.value.iteration, calls) == (5, again)


def test_what_an_error_leaves_in_the_last_iteration_is_not_evaluated():
    hook, calls = evaluation(0)
    hook.trainer = SimpleNamespace(iter=9, max_iter=10)
    hook.after_train()
    assert not calls


def test_early_stopping_ends_a_run_with_both_models(tmp_path, caplog):
    options = ["TEST.BEST.PATIENCE", 1, "TEST.EVAL_PERIOD", 1, "SOLVER.MAX_ITER", 50]
    options += ["TEST.LOSS", True, "SOLVER.BASE_LR", 0.0]  # so nothing can get better
    cfg = quick_cfg(tmp_path / "out", *coco_options(tmp_path), *options, "LOG.IMAGES", 0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    with caplog.at_level(logging.INFO):
        results = trainer.train()
    assert "Traceback" not in caplog.text
    assert "training ends after" in caplog.text
    assert torch.load(tmp_path / "out/model_final.pth")["iteration"] == 1
    resumed = Trainer(cfg)
    resumed.resume_or_load(resume=True)
    assert resumed.train() == {}
    assert resumed.iter == resumed.start_iter == 2
    assert set(results) == {"bbox"}
    names = {p.name for p in (tmp_path / "out").glob("*.pth")}
    assert {"model_final.pth", "model_best.pth"} <= names
    logged = trainer.storage.latest()
    assert {"validation/total_loss", "validation/loss_ce", "bbox/AP"} <= set(logged)


def test_predictions_are_drawn_at_every_evaluation(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = quick_cfg(tmp_path / "out", *coco_options(tmp_path), "LOG.IMAGES", 2)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    events = EventAccumulator(str(tmp_path / "out"), size_guidance={"images": 0}).Reload()
    assert events.Tags()["images"] == ["predictions/0", "predictions/3"]


def test_losses_on_held_out_data_teach_nothing():
    opts = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
    opts += ["MODEL.SparseRCNN.DROPOUT", 0.5, "MODEL.SparseRCNN.DPG.ENABLED", True]
    model = build_model(tiny_cfg(*opts))
    model.head.eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batches = [batch([(64, 96)], [2], seed=s) for s in range(3)]
    first = validation_losses(model, batches)
    assert validation_losses(model, batches) == first  # nothing is dropped at random
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    parts = [value for name, value in first.items() if name != "total_loss"]
    assert first["total_loss"] == pytest.approx(sum(parts))


def test_losses_on_held_out_data_are_those_of_the_plain_cascade():
    four = ["MODEL.SparseRCNN.NUM_HEADS", 4]
    plain = build_model(tiny_cfg(*four))
    recollecting = build_model(tiny_cfg(*four, "MODEL.SparseRCNN.SQR.ENABLED", True))
    recollecting.load_state_dict(plain.state_dict())
    inputs = batch([(64, 96)], [2])
    assert validation_losses(recollecting, [inputs]) == validation_losses(plain, [inputs])
    recollecting.train()
    assert len(recollecting.predict(inputs)[0].stage) == 1 + 2 + 3 + 5  # training recollects again


def test_losses_on_held_out_data_are_means_over_images():
    model = build_model(tiny_cfg()).eval()
    batches = [batch([(64, 96)], [2], seed=s) for s in range(2)]
    means = validation_losses(model, batches)
    with losses_without_learning(model):
        each = [model(b)["loss_giou"].item() for b in batches]
    assert means["loss_giou"] == pytest.approx(sum(each) / 2)


def test_norms_use_stored_statistics_for_losses_on_held_out_data():
    opts = ["MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0]
    model = build_model(tiny_cfg(*opts))
    inputs = batch([(64, 96)], [2])
    with losses_without_learning(model):
        held_out = model.predict(inputs)[0].logits[-1]
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(held_out, model.predict(inputs)[0].logits[-1])


def test_with_several_test_sets_the_first_one_decides(tmp_path):
    cfg = quick_cfg(tmp_path, "DATASETS.TEST", "('shapes_val', 'shapes_train')")
    assert Trainer(cfg)._best_model().metric == "shapes_val/bbox/AP"
