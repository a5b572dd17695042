"""A run that is killed and resumed equals an uninterrupted one bit for bit."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ENVIRONMENT,
    QUICK,
    REPOSITORY,
    SMALL,
    coco_options,
    quick_cfg,
    run_program,
    train,
)

from dsrcnn.engine.trainer import Trainer

# Everything that has state: EMA, accumulation, mixed precision, DLA, DPG's temperature, dropout,
# trainable batch norms, augmentation, the best model.
EVERYTHING = [
    *("MODEL.META_ARCHITECTURE", "DynamicSparseRCNN", "MODEL.SparseRCNN.DLA.ENABLED", "True"),
    *("MODEL.SparseRCNN.DPG.ENABLED", "True", "MODEL.SparseRCNN.DPG.HIDDEN", "32"),
    *("MODEL.SparseRCNN.DROPOUT", "0.1", "MODEL.EMA.ENABLED", "True"),
    *("SOLVER.ACCUMULATE", "2", "SOLVER.AMP.ENABLED", "True", "SOLVER.IMS_PER_BATCH", "4"),
    *("INPUT.MIN_SIZE_TRAIN", "(48, 64)", "INPUT.CROP.ENABLED", "True"),
    *("INPUT.CROP.TYPE", "relative_range", "INPUT.CROP.SIZE", "(0.6, 0.6)"),
    *("SOLVER.MAX_ITER", "10", "SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "6"),
    *("TEST.LOSS", "True", "LOG.IMAGES", "0", "DATALOADER.NUM_WORKERS", "1"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Few images, so that evaluations are short."""
    return coco_options(tmp_path_factory.mktemp("data"), count=9)


def command(folder, *options):
    words = [*QUICK, "--resume", *SMALL, *EVERYTHING, "OUTPUT_DIR", str(folder), *options]
    return [sys.executable, "train_net.py", *words]


def finish(folder, *options):
    run_program(*command(folder, *options))


def kill_when_written(file, folder, *options):
    """Start a run and kill it as soon as the file exists."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    words = command(folder, *options)
    process = subprocess.Popen(words, cwd=REPOSITORY, env=ENVIRONMENT, **quiet)
    end = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert file.exists()


def differences(a, b, path=""):
    """Paths at which two nested checkpoints differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [d for k in a for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)):
        return [
            d for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{path}/{i}")
        ]  # fmt: skip
    return [] if a == b else [path]


def last_checkpoint(folder):
    content = torch.load(folder / "model_0000009.pth")
    content["config"] = content["config"].replace(str(folder), "")
    return content


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("uninterrupted")
    finish(folder, *data)
    return last_checkpoint(folder)


def stop_when_written(file, folder, number, *options):
    """Start a run and send it a signal as soon as the file exists; its status and messages."""
    pipe = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    pipe["start_new_session"] = True
    process = subprocess.Popen(command(folder, *options), cwd=REPOSITORY, env=ENVIRONMENT, **pipe)
    end = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    os.killpg(process.pid, number)  # loader workers get it, too: from terminals and schedulers
    _, messages = process.communicate(timeout=120)
    return process.returncode, messages


def test_a_run_stopped_by_signals_saves_its_state_and_equals_an_uninterrupted_one(
    tmp_path, uninterrupted, data
):
    # In training, then in the evaluation after the sixth iteration.
    for name, number, status in (
        ("model_0000002.pth", signal.SIGINT, 130), ("model_0000005.pth", signal.SIGTERM, 143),
        ("model_best.pth", signal.SIGTERM, 143),
    ):  # fmt: skip
        returned, messages = stop_when_written(tmp_path / name, tmp_path, number, *data)
        assert returned == status, messages
        saved = re.search(r"after (\d+) iterations is saved as (model_\d+\.pth)", messages)
        assert saved, messages
        assert "--resume continues from there" in messages
        assert "Traceback" not in messages
        assert torch.load(tmp_path / saved[2])["iteration"] + 1 == int(saved[1])
    finish(tmp_path, *data)
    assert differences(uninterrupted, last_checkpoint(tmp_path)) == []


@pytest.mark.slow
def test_a_run_killed_three_times_equals_an_uninterrupted_one(tmp_path, uninterrupted, data):
    # Soon after the first checkpoint, at an evaluation, and after the best model was written.
    for last_file in ("model_0000002.pth", "model_0000005.pth", "model_best.pth"):
        kill_when_written(tmp_path / last_file, tmp_path, *data)
        assert not (tmp_path / "model_final.pth").exists()
    finish(tmp_path, *data)
    log = (tmp_path / "log.txt").read_text()
    starts = re.findall("Starting training from iteration ([0-9]+)", log)
    assert starts[0] == "0"
    assert int(starts[-1]) >= 6
    assert differences(uninterrupted, last_checkpoint(tmp_path)) == []


def test_a_checkpoint_has_all_state(uninterrupted):
    trainer = uninterrupted["trainer"]
    assert uninterrupted["ema"]["updates"] == 11  # the copy at the start and ten iterations
    assert trainer["_trainer"]["optimizer"]["state"]
    assert trainer["seed"] == 40244023
    assert uninterrupted["model"]["proposal_generator.step"] == 10
    assert trainer["hooks"]["Evaluation"]["done"] == 5
    assert uninterrupted["iteration"] == 9


def test_the_checkpoint_before_a_truncated_and_an_empty_one_is_used(tmp_path, caplog):
    options = ["SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()"]
    train(quick_cfg(tmp_path, *options, "SOLVER.MAX_ITER", 5))
    (tmp_path / "model_0000004.pth").write_bytes(b"")
    newest = tmp_path / "model_0000003.pth"
    newest.write_bytes(newest.read_bytes()[:100_000])
    trainer = Trainer(quick_cfg(tmp_path, *options, "SOLVER.MAX_ITER", 5))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert caplog.text.count("Trying the checkpoint before it") == 2


def test_a_drawn_seed_is_kept_on_resume(tmp_path):
    train(quick_cfg(tmp_path, "SEED", -1, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"))
    seed = torch.load(tmp_path / "model_0000000.pth")["trainer"]["seed"]
    cfg = quick_cfg(tmp_path, "SEED", -1, "SOLVER.MAX_ITER", 2, "DATASETS.TEST", "()")
    trainer = train(cfg, resume=True)
    assert trainer._trainer.seed == trainer.data_loader.batch_sampler.seed == seed
    assert seed != trainer.cfg.SEED


def test_the_same_seed_gives_the_same_losses_and_another_does_not(tmp_path):
    losses = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        options = ["SEED", seed, "SOLVER.MAX_ITER", 3, "DATASETS.TEST", "()"]
        torch.manual_seed(seed)  # as `setup_run` does before the model is built
        trainer = train(quick_cfg(tmp_path / name, *options))
        losses[name] = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert losses["a"] == losses["b"]
    assert losses["a"] != losses["c"]
