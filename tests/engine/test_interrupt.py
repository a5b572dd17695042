import logging
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import quick_cfg
from detectron2.engine import hooks
from torch import nn

from dsrcnn.engine.interrupt import StopSignals, handled_by
from dsrcnn.engine.main import exit_status
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import TrainingInterrupted


def test_the_first_signal_is_noted_its_copy_ignored_and_a_second_one_ends_at_once(monkeypatch):
    signals, now = StopSignals(), [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    before = signal.getsignal(signal.SIGTERM)
    with signals.handled():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        now[0] += 0.5  # the parent process passes it on
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += 5
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_evaluation_is_left_before_the_next_image_and_not_begun_after_a_signal():
    signals, model = StopSignals(), nn.Identity()
    steps = []

    def evaluate():
        with signals.interrupting(model):
            for image in range(3):
                steps.append(model(image))
                if image == 1:
                    os.kill(os.getpid(), signal.SIGINT)
                    steps.append("measured")

    with signals.handled():
        for _ in range(2):
            with pytest.raises(TrainingInterrupted):
                evaluate()
    assert steps == [0, 1, "measured"]
    assert model(5) == 5  # as before


def test_a_signal_may_come_anywhere_in_an_evaluation(capsys, monkeypatch):
    signals, model, dropped, steps = StopSignals(), nn.Identity(), [], []
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    class Workers:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            steps.append("shut down")

    class Handler(logging.StreamHandler):
        def format(self, record):
            os.kill(os.getpid(), signal.SIGTERM)
            return "written"

    logger = logging.Logger("evaluation")
    logger.addHandler(Handler())

    def evaluate(begin):
        with signals.interrupting(model):
            begin()
            model(1)
            steps.append("continued")

    for begin in (Workers, lambda: logger.info("Serialized dataset")):
        signals.received = None
        with signals.handled(), pytest.raises(TrainingInterrupted):
            evaluate(begin)
    assert steps == ["shut down"]
    assert dropped == []
    assert capsys.readouterr().err == "written\n"


@pytest.mark.parametrize(("number", "expected"), [
    (signal.SIGTERM, TrainingInterrupted), (None, RuntimeError),
])  # fmt: skip
def test_a_connection_that_is_lost_after_a_signal_is_its_consequence(number, expected):
    signals = StopSignals()

    def evaluate():
        with signals.interrupting(nn.Identity()):
            signals.received = number
            raise RuntimeError("Connection closed by peer")

    with pytest.raises(expected):
        evaluate()


def test_a_checkpoint_that_is_being_written_is_completed_before_training_stops(
    tmp_path, monkeypatch
):
    save = torch.save

    def save_and_be_stopped(content, file):
        monkeypatch.setattr(torch, "save", save)  # a second signal ends the process at once
        os.kill(os.getpid(), signal.SIGTERM)
        save(content, file)

    monkeypatch.setattr(torch, "save", save_and_be_stopped)
    options = ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", 9, "DATASETS.TEST", "()"]
    trainer = Trainer(quick_cfg(tmp_path, *options))
    with pytest.raises(TrainingInterrupted, match=r"after 3 iterations is saved as model_0000002"):
        trainer.train()
    iterations = {p.name: torch.load(p)["iteration"] for p in tmp_path.glob("*.pth")}
    assert iterations == {"model_0000001.pth": 1, "model_0000002.pth": 2}
    again = Trainer(quick_cfg(tmp_path, *options))
    again.resume_or_load(resume=True)
    assert again.start_iter == 3


def test_a_run_that_reads_losses_late_saves_its_state_when_it_is_stopped(tmp_path):
    trainer = Trainer(quick_cfg(tmp_path, "SOLVER.MAX_ITER", 9, "DATASETS.TEST", "()"))
    trainer._trainer.reads_late = True
    stop = hooks.CallbackHook(
        before_step=lambda t: os.kill(os.getpid(), signal.SIGTERM) if t.iter == 2 else None
    )
    trainer.register_hooks([stop])
    # The request of iteration 2 is read in iteration 3, whose losses are not read when it ends.
    with pytest.raises(TrainingInterrupted, match=r"after 4 iterations is saved"):
        trainer.train()
    assert [iteration for _, iteration in trainer.storage.history("total_loss").values()] == [
        0, 1, 2, 3,
    ]  # fmt: skip


@pytest.mark.parametrize(("processes", "expected"), [(2, TrainingInterrupted), (1, RuntimeError)])
def test_the_state_is_saved_if_another_process_stops_first(
    tmp_path, monkeypatch, processes, expected
):
    trainer = Trainer(quick_cfg(tmp_path, "SOLVER.MAX_ITER", 9, "DATASETS.TEST", "()"))
    here = SimpleNamespace(get_world_size=lambda: processes, is_main_process=lambda: True)

    def lose_connection():
        if trainer.iter == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            monkeypatch.setattr("dsrcnn.engine.trainer.comm", here)
            raise RuntimeError("Connection closed by peer")

    trainer.register_hooks([hooks.CallbackHook(before_step=lambda _: lose_connection())])
    with pytest.raises(expected) as error:
        trainer.train()
    saved = [path.name for path in tmp_path.glob("model_0*.pth")]
    assert saved == (["model_0000001.pth"] if processes == 2 else [])
    assert ("after 2 iterations is saved" in str(error.value)) == (processes == 2)


@pytest.mark.parametrize("period", [1, 20])
def test_a_run_can_be_stopped_in_its_first_iteration(tmp_path, period):
    cfg = quick_cfg(tmp_path, "SOLVER.MAX_ITER", 9, "DATASETS.TEST", "()", "LOG.PERIOD", period)
    trainer = Trainer(cfg)
    stop = hooks.CallbackHook(before_step=lambda _: os.kill(os.getpid(), signal.SIGTERM))
    trainer.register_hooks([stop])
    with pytest.raises(TrainingInterrupted, match=r"after 1 iterations is saved"):
        trainer.train()


@pytest.mark.parametrize(("error", "status", "text"), [
    (KeyboardInterrupt(), 130, "Interrupted.\n"),
    (TrainingInterrupted(signal.SIGINT), 130, "Interrupted by SIGINT.\n"),
    (TrainingInterrupted(signal.SIGTERM, "Saved."), 143, "Saved.\n"),
])  # fmt: skip
def test_the_exit_status_is_that_of_shells(error, status, text, capsys):
    def work():
        raise error

    assert exit_status(work) == status
    assert capsys.readouterr().err == text


def test_a_hangup_that_nohup_ignores_stays_ignored():
    seen, before = [], signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handled_by(lambda number, _: seen.append(number), (signal.SIGHUP, signal.SIGTERM)):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        assert seen == [signal.SIGTERM]
        with handled_by(lambda number, _: seen.append(number), (signal.SIGHUP,)):
            os.kill(os.getpid(), signal.SIGHUP)
        assert seen == [signal.SIGTERM, signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)
