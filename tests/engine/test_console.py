import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import QUICK, SMALL, coco_options, quick_cfg, run_program, train
from detectron2.utils.events import EventStorage

from dsrcnn.engine.console import FILE_ONLY, configure_logging, results_table
from dsrcnn.engine.main import run
from dsrcnn.engine.resume import clear_folder
from dsrcnn.engine.writers import build_writers
from dsrcnn.errors import ConfigError


def test_a_training_prints_a_summary_one_table_and_what_to_do_next(tmp_path):
    output = tmp_path / "out"
    options = [*coco_options(tmp_path), "OUTPUT_DIR", output, "SOLVER.MAX_ITER", 3]
    text = run_program(sys.executable, "train_net.py", *QUICK, *SMALL, *options)
    assert "\x1b" not in text
    first_loss = text.index("total_loss")
    assert text[:first_loss].count("\n") <= 15
    for word in ("data", "classes", "model", "parameters", "schedule", "device", "output"):
        assert re.search(rf"^  {word} +\S", text[:first_loss], re.MULTILINE), word
    assert re.findall(r"iter: (\d)", text) == ["0", "2"]  # early, then regularly
    assert text.count("AP50") == 1
    assert "copypaste" not in text
    last = text.strip().splitlines()[-1]
    assert "bbox/AP " in last
    assert str(output / "model_best.pth") in last
    assert last.endswith(f"dsrcnn draw predictions {output}")
    log = (output / "log.txt").read_text()
    words = ("NUM_PROPOSALS", "(backbone)", "Start inference", "PyTorch")
    assert all(word in log for word in words)


def test_a_verbose_run_prints_everything(tmp_path, capsys):
    options = [*SMALL, *coco_options(tmp_path), "OUTPUT_DIR", str(tmp_path / "out")]
    assert run([*QUICK, *options, "LOG.LEVEL", "verbose"]) == 0
    text = capsys.readouterr().out
    for word in ("NUM_PROPOSALS", "(backbone)", "detectron2.evaluation.evaluator", "PyTorch"):
        assert word in text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("no_color", ["", "1"])
def test_warnings_always_reach_the_console_with_colors_on_terminals(
    tmp_path, monkeypatch, no_color
):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stdout", Terminal())
    configure_logging(tmp_path, verbose=False)
    logging.getLogger("fvcore.common").info("detail")
    logging.getLogger("fvcore.common").warning("trouble")
    logging.getLogger("dsrcnn.data").error("elsewhere", extra=FILE_ONLY)
    text = sys.stdout.getvalue()
    assert "trouble" in text
    assert "detail" not in text
    assert "elsewhere" not in text
    assert ("\x1b" in text) == (not no_color)
    log = (tmp_path / "log.txt").read_text()
    assert all(word in log for word in ("trouble", "detail", "elsewhere"))


def test_results_are_tables_of_the_totals_and_of_the_classes():
    classes = {f"AP-{name}": 1.0 for name in ("circle", "square", "star", "cross")}
    table = results_table({"bbox": {"AP": 12.345, "APl": float("nan"), **classes}})
    lines = [line.split() for line in table.splitlines() if line and "--" not in line]
    assert lines[:2] == [["AP", "APl"], ["bbox", "12.35", "nan"]]
    words = [word for line in lines[3:] for word in line]
    assert words[::2] == ["circle", "square", "star", "cross"]


@pytest.mark.parametrize(("package", "key"), [
    ("wandb", "LOG.WANDB_PROJECT"), ("mlflow", "LOG.MLFLOW_EXPERIMENT"),
])  # fmt: skip
def test_a_missing_tracker_is_an_error(tmp_path, monkeypatch, package, key):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f"pip install {package}"):
        build_writers(quick_cfg(tmp_path, key, "mine"), 10)


def test_a_resumed_training_continues_its_mlflow_run_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    cfg = quick_cfg(tmp_path / "cells", "LOG.MLFLOW_EXPERIMENT", "mine")
    (tmp_path / "cells").mkdir()
    for iteration, loss in ((3, 2.0), (4, 1.5)):
        writer = build_writers(cfg, 10)[-1]
        writer.begin(resumed=iteration > 3)
        with EventStorage(iteration) as storage:
            storage.put_scalars(**{"loss": loss, "bbox/AP": 10 * loss}, smoothing_hint=False)
            writer.write()
            writer.write()
        writer.close()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("mine").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.run_name == "cells"
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "bbox/AP")
    assert [(m.step, m.value) for m in history] == [(3, 20.0), (4, 15.0)]
    writer = build_writers(cfg, 10)[-1]
    writer.begin(resumed=False)  # another training in the folder
    writer.close()
    assert len(client.search_runs([experiment])) == 2


def test_mlflow_takes_the_names_of_any_classes(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    writer = build_writers(quick_cfg(tmp_path / "out", "LOG.MLFLOW_EXPERIMENT", "mine"), 10)[-1]
    writer.begin(resumed=False)
    classes = ["stop sign (small)", "C++", "C--", "R&D", "it's", "a,b", "Häuser"]
    with EventStorage(3) as storage:
        storage.put_scalars(**{f"bbox/AP-{c}": 1.0 for c in classes}, smoothing_hint=False)
        writer.write()
    writer.close()
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert len(run.data.metrics) == len(classes)
    assert "bbox/AP-C_2b__2b_" in run.data.metrics


def test_a_tracker_that_fails_is_one_warning_and_training_goes_on(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise RuntimeError("no route to host")

    run = SimpleNamespace(id="run7", log=fail, finish=fail)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    train(quick_cfg(tmp_path, "LOG.WANDB_PROJECT", "mine", "SOLVER.MAX_ITER", 3, "LOG.PERIOD", 1))
    assert (tmp_path / "model_final.pth").is_file()
    assert caplog.text.count("no route to host") == 1
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=fail))
    writer = build_writers(quick_cfg(tmp_path, "LOG.WANDB_PROJECT", "mine"), 10)[-1]
    with pytest.raises(ConfigError, match=r"LOG\.WANDB_PROJECT .* no route to host"):
        writer.begin(resumed=False)


def test_overwriting_a_run_forgets_its_runs_in_trackers(tmp_path):
    for name in ("wandb_run", "mlflow_run"):
        (tmp_path / name).write_text("run7")
    clear_folder(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_resumed_training_continues_its_wandb_run(tmp_path, monkeypatch):
    started, sent = [], []

    def init(**arguments):
        started.append(arguments)
        log = lambda values, step: sent.append((step, values))  # noqa: E731
        return SimpleNamespace(id="run7", log=log, finish=lambda: sent.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    cfg = quick_cfg(tmp_path, "LOG.WANDB_PROJECT", "mine")
    for resumed in (False, True, False):
        writer = build_writers(cfg, 10)[-1]
        writer.begin(resumed=resumed)
    with EventStorage(3) as storage:
        storage.put_scalars(loss=2.0, smoothing_hint=False)
        writer.write()
        writer.write()
    writer.close()
    assert [s["id"] for s in started] == [None, "run7", None]
    assert started[0]["project"] == "mine"
    assert sent == [(3, {"loss": 2.0}), "end"]


def test_names_of_classes_that_look_like_numbers_stay():
    table = results_table({"bbox": {"AP": 5.0, "AP-007": 50.0, "AP-1e3": 60.0, "AP-0.5": 1.0}})
    row = table.splitlines()[-1].split()
    assert row == ["007", "50.00", "1e3", "60.00", "0.5", "1.00"]
