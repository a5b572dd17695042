"""Runs that are continued with another config, from odd checkpoints or in a used folder."""

import os
import shutil

import numpy as np
import pytest
import torch
from conftest import message_of, quick_cfg, train
from detectron2.data import DatasetCatalog, MetadataCatalog

from dsrcnn.engine.resume import check_folder, check_resume, newest_first
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import ConfigError, NonFiniteLossError, WeightsError

NODE = "MODEL.SparseRCNN"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(quick_cfg(folder, *RUN))
    return folder


RUN = ["SOLVER.MAX_ITER", 2, "SOLVER.CHECKPOINT_PERIOD", 1, "DATASETS.TEST", "()"]


@pytest.mark.parametrize(("opts", "words"), [
    ([f"{NODE}.NUM_CLASSES", 3], "NUM_CLASSES is 3, was"),
    (["SOLVER.OPTIMIZER", "SGD"], "SOLVER.OPTIMIZER is 'SGD', was 'ADAMW'"),
    (["MODEL.META_ARCHITECTURE", "AdaMixer"], "META_ARCHITECTURE is 'AdaMixer', was 'SparseRCNN'"),
    (["MODEL.FREEZE", "('backbone',)"], "MODEL.FREEZE is ['backbone'], was []"),
    (["MODEL.BACKBONE.FREEZE_AT", 2], "FREEZE_AT is 2, was"),
    (["SOLVER.NO_DECAY", "('norm',)"], "SOLVER.NO_DECAY is ['norm'], was []"),
    ([f"{NODE}.NUM_PROPOSALS", 5], "init_proposal"),
    ([f"{NODE}.NUM_HEADS", 3], "head.head_series"),
    ([f"{NODE}.NUM_HEADS", 1], "head.head_series"),
    ([f"{NODE}.DPG.ENABLED", True], "proposal_generator"),
    ([f"{NODE}.DIM_FEEDFORWARD", 48], "linear1"),
    (["MODEL.RESNETS.DEPTH", 34], "bottom_up"),
])  # fmt: skip
def test_a_run_does_not_continue_with_another_model_or_optimizer(run, opts, words):
    def resume():
        cfg = quick_cfg(run, *RUN)
        cfg.merge_from_list(opts)
        check_resume(cfg)
        Trainer(cfg).resume_or_load(resume=True)

    message = message_of(resume)
    assert words in message
    assert "leave out --resume" in message


@pytest.mark.parametrize(("key", "value"), [("SOLVER.BASE_LR", 0.5), ("SEED", 7)])
def test_records_of_a_resumed_run_have_the_values_that_the_checkpoint_keeps(run, key, value):
    before, cfg = dict(quick_cfg(run, *RUN)), quick_cfg(run, *RUN, key, value)
    check_resume(cfg)
    assert dict(cfg) == before


ORDERS = {
    "moved": (["a", "c", "b"], "Class 'b' is number 2 in the training data, but number 1"),
    "inserted": (["x", "a", "b"], "Class 'a' is number 1 in the training data, but number 0"),
    "renamed": (["a", "B", "c"], None),
}


@pytest.mark.parametrize("name", ORDERS)
def test_a_run_does_not_continue_with_its_classes_in_another_order(name, run, tmp_path, caplog):
    classes, words = ORDERS[name]
    cfg = quick_cfg(tmp_path, *RUN)
    content = torch.load(run / "model_0000001.pth") | {"classes": ["a", "b", "c"]}
    torch.save(content, tmp_path / "model_0000001.pth")
    DatasetCatalog.register("ordered", list)
    MetadataCatalog.get("ordered").thing_classes = classes
    cfg.DATASETS.TRAIN = ("ordered",)
    if words is None:
        check_resume(cfg)
        assert "class 'B' instead of 'b'" in caplog.text
        return
    message = message_of(lambda: check_resume(cfg))
    assert words in message


@pytest.mark.parametrize(("opts", "words"), [
    (["SOLVER.BASE_LR", 0.5], "SOLVER.BASE_LR 0.5 has no effect, the checkpoint keeps"),
    (["SEED", 7], "SEED 7 has no effect, the checkpoint keeps"),
    (["SOLVER.STEPS", "(1,)"], "SOLVER.STEPS [1] instead of"),
    (["SOLVER.MAX_ITER", 1], "nothing is left to train"),
    (["DATASETS.TRAIN", "('shapes_val',)"], "DATASETS.TRAIN ['shapes_val'] instead of"),
    (["MODEL.EMA.ENABLED", True], "MODEL.EMA.ENABLED True instead of False"),
    ([f"{NODE}.DLA.ENABLED", True], "DLA.ENABLED True instead of False"),
])  # fmt: skip
def test_changes_that_a_run_continues_with_are_said_in_one_line(run, opts, words, caplog):
    cfg = quick_cfg(run, *RUN, *opts)
    check_resume(cfg)
    Trainer(cfg).resume_or_load(resume=True)
    lines = [r.getMessage() for r in caplog.records if words in r.getMessage()]
    assert len(lines) == 1
    assert "\n" not in lines[0]


def test_an_optimizer_state_of_other_shapes_never_reaches_the_optimizer(run):
    trainer = Trainer(quick_cfg(run, *RUN))
    state = torch.load(run / "model_0000001.pth")["trainer"]
    optimizer = state["_trainer"]["optimizer"]
    first = next(iter(optimizer["state"].values()))
    first["exp_avg"] = first["exp_avg"].flatten()
    with pytest.raises(WeightsError, match="exp_avg of parameter"):
        trainer.load_state_dict(state)
    optimizer["param_groups"][0]["params"].pop()
    with pytest.raises(WeightsError, match="another set is trained"):
        trainer.load_state_dict(state)


STATES = {
    "no state": (lambda c: c.pop("trainer"), "not the state of trainer"),
    "negative iteration": (lambda c: c["trainer"].update(iteration=-5), "the iteration -5"),
    "iteration text": (lambda c: c["trainer"].update(iteration="3"), "the iteration '3'"),
    "iteration fraction": (lambda c: c["trainer"].update(iteration=2.5), "the iteration 2.5"),
    "iteration none": (lambda c: c["trainer"].update(iteration=None), "the iteration None"),
    "seed text": (lambda c: c["trainer"].update(seed="x"), "the seed 'x'"),
    "state list": (lambda c: c.update(trainer=[1]), "no optimizer state"),
    "no optimizer": (lambda c: c["trainer"]["_trainer"].pop("optimizer"), "does not fit"),
    "rate text": (lambda c: optimizer_of(c)["param_groups"][0].update(lr="x"), "no numbers"),
    "no moments": (lambda c: optimizer_of(c)["state"].clear(), "state of another optimizer"),
    "one moment": (lambda c: optimizer_of(c)["state"][0].pop("exp_avg"), "another optimizer"),
    "moments nan": (
        lambda c: optimizer_of(c)["state"][0]["exp_avg"].fill_(np.nan), "no finite numbers"
    ),
    "moments integers": (
        lambda c: optimizer_of(c)["state"][0].update(exp_avg=torch.zeros(3, dtype=torch.int64)),
        "no finite numbers",
    ),
}  # fmt: skip


def optimizer_of(content):
    return content["trainer"]["_trainer"]["optimizer"]


@pytest.mark.parametrize("name", STATES)
def test_training_does_not_continue_from_an_unusable_state(name, run, tmp_path):
    change, words = STATES[name]
    content = torch.load(run / "model_0000001.pth")
    change(content)
    torch.save(content, tmp_path / "model_0000001.pth")
    trainer = Trainer(quick_cfg(tmp_path, *RUN))
    assert words in message_of(lambda: trainer.resume_or_load(resume=True))


@pytest.mark.parametrize(
    "text", ["model_final.pth", "", "gone", "x" * 9999, "\0", "../x.pth", None]
)
def test_an_odd_tag_or_a_broken_link_does_not_hide_good_checkpoints(text, run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    (copy / "model_9999999.pth").symlink_to("gone")
    (copy / "model_9999998.pth").symlink_to("model_9999998.pth")
    (copy / "model_9999997.pth").mkdir()
    os.mkfifo(copy / "model_9999996.pth")
    (copy / "last_checkpoint").unlink()
    if text is None:
        os.mkfifo(copy / "last_checkpoint")
    else:
        (copy / "last_checkpoint").write_text(text)
    assert newest_first(copy)[0] == str(copy / "model_0000001.pth")


@pytest.mark.parametrize("config", [None, "[1]", 5, "a: [", {"a": 1}])
def test_a_checkpoint_without_a_config_says_that_changes_are_not_noticed(
    config, run, tmp_path, caplog
):
    content = torch.load(run / "model_0000001.pth") | {"config": config}
    torch.save(content, tmp_path / "model_0000001.pth")
    check_resume(quick_cfg(tmp_path, *RUN))
    assert "has no config" in caplog.text


def test_weights_that_are_not_finite_are_never_written(tmp_path):
    options = ["SOLVER.BASE_LR", 1e300, "SOLVER.WARMUP_ITERS", 0, "SOLVER.MAX_ITER", 1]
    with pytest.raises(NonFiniteLossError, match="weights are not finite after iteration 0"):
        train(quick_cfg(tmp_path, *options, "DATASETS.TEST", "()"))
    assert not list(tmp_path.glob("*.pth"))


def test_a_used_folder_is_refused_unless_continued_or_overwritten(run, tmp_path):
    message = message_of(lambda: check_folder(run, resume=False, overwrite=False))
    for words in ("holds another run", "--resume", "another OUTPUT_DIR", "--overwrite"):
        assert words in message
    assert "one of them" in message_of(lambda: check_folder(run, resume=True, overwrite=True))
    check_folder(run, resume=True, overwrite=False)
    check_folder(run, resume=False, overwrite=True)
    check_folder(tmp_path / "new", resume=False, overwrite=False)
    (tmp_path / "model_best.pth").write_bytes(b"")  # killed before its first checkpoint
    check_folder(tmp_path, resume=True, overwrite=False)
    (tmp_path / "model_final.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"no model_<iteration>\.pth from which training can"):
        check_folder(tmp_path, resume=True, overwrite=False)
