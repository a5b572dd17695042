"""A command that runs after every evaluation."""

import logging
import sys
import time

import pytest
from conftest import coco_options, quick_cfg, save_model

import dsrcnn
from dsrcnn.engine.command_hook import CommandAfterEvaluation
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import ConfigError

NOTE = "import sys; open(sys.argv[1] + '/notes', 'a').write(' '.join(sys.argv[2:]) + chr(10))"


def trainer_with(folder, *words, resume=False):
    options = [*coco_options(folder / "data"), "LOG.IMAGES", 0, "HOOKS.AFTER_EVAL", list(words)]
    options += ["SOLVER.MAX_ITER", 5, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 2]
    trainer = Trainer(quick_cfg(folder, *options))
    trainer.resume_or_load(resume=resume)
    return trainer


def test_a_command_runs_after_every_evaluation_with_its_iteration_and_no_shell(tmp_path):
    words = [sys.executable, "-c", NOTE, "{output}", "{iteration}", "$HOME; exit 3", "{other}"]
    trainer_with(tmp_path, *words).train()
    lines = (tmp_path / "notes").read_text().splitlines()
    assert lines == [f"{i} $HOME; exit 3 {{other}}" for i in (1, 3, 4)]
    # The last checkpoint was written before its evaluation, which is made up for.
    trainer_with(tmp_path, *words, resume=True).train()
    assert (tmp_path / "notes").read_text().splitlines()[3:] == lines[2:]


@pytest.mark.parametrize(("words", "problem"), [
    (["/no/such/program"], "No such file"),
    ([sys.executable, "-c", "print('full disk'); raise SystemExit(7)"], "status 7: full disk"),
    ([sys.executable, "-c", "import time; time.sleep(60)"], "timed out"),
])  # fmt: skip
def test_a_command_that_fails_or_hangs_is_a_warning(tmp_path, messages, words, problem):
    trainer = trainer_with(tmp_path, *words)
    for hook in trainer._hooks:
        if hasattr(hook, "timeout"):
            hook.timeout = 0.2 if "sleep" in words[-1] else 60.0
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()
    assert any(problem in text and "Training continues" in text for text in messages())


def test_no_command_starts_when_a_run_is_stopping(tmp_path):
    stopping = [True]
    hook = CommandAfterEvaluation(
        ["touch", "{output}/ran"], str(tmp_path), lambda: 3, 20.0, lambda: stopping[0]
    )
    hook.after_step()
    assert hook.state_dict() == {"seen": -1}
    assert not (tmp_path / "ran").exists()
    stopping[0] = False  # the resumed run
    hook.before_train()
    assert (tmp_path / "ran").exists()


def test_a_command_may_leave_something_running(tmp_path, messages, caplog):
    caplog.set_level(logging.INFO)
    words = ["sh", "-c", "sleep 30 & echo started"]
    hook = CommandAfterEvaluation(words, str(tmp_path), lambda: 3, 20.0)
    start = time.monotonic()
    hook.after_step()
    assert time.monotonic() - start < 10
    assert "HOOKS.AFTER_EVAL: started" in messages()


def test_a_command_that_takes_too_long_ends_with_all_that_it_has_started(tmp_path, messages):
    words = ["sh", "-c", f"(sleep 2; touch {tmp_path}/late) & sleep 60"]
    hook = CommandAfterEvaluation(words, str(tmp_path), lambda: 3, 0.5)
    hook.after_step()
    time.sleep(3)
    assert not (tmp_path / "late").exists()
    assert any("timed out" in text for text in messages())


def test_a_request_to_stop_ends_the_command(tmp_path, messages):
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    stopping = iter([False, True])
    hook = CommandAfterEvaluation(words, str(tmp_path), lambda: 3, 60.0, lambda: next(stopping))
    start = time.monotonic()
    hook.after_step()
    assert time.monotonic() - start < 20
    texts = messages()
    assert any("was ended: training is asked to stop" in text for text in texts)
    assert not any("Training continues" in text for text in texts)


def test_a_command_that_is_no_list_of_words_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"HOOKS\.AFTER_EVAL"):
        quick_cfg(tmp_path, "HOOKS.AFTER_EVAL", [1, 2])


def test_a_model_from_elsewhere_runs_no_command(tmp_path):
    save_model(tmp_path / "model.pth", "HOOKS.AFTER_EVAL", ["touch", str(tmp_path / "ran")])
    assert tuple(dsrcnn.load(tmp_path / "model.pth").cfg.HOOKS.AFTER_EVAL) == ()
