import json

import pytest
import torch
from conftest import QUICK, SMALL, coco_options, quick_cfg

from dsrcnn.analysis.report import evaluate_in_detail
from dsrcnn.config import load_cfg
from dsrcnn.engine.main import evaluate, run
from dsrcnn.engine.setup import resolve_solver, setup_run
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import ConfigError


def test_a_resolved_config_stays_as_it_is(tmp_path):
    options = ["SOLVER.EPOCHS.MAX", 6, "SOLVER.REFERENCE_BATCH", 4, "SOLVER.BASE_LR", 0.004]
    cfg = quick_cfg(tmp_path / "out", *coco_options(tmp_path), *options, "SEED", -1)
    resolved = resolve_solver(cfg)
    assert resolved.SOLVER.MAX_ITER == 12  # four images in batches of two
    assert pytest.approx(0.002) == resolved.SOLVER.BASE_LR
    assert resolved.SEED >= 0
    assert resolve_solver(resolved) == resolved
    assert cfg.SOLVER.EPOCHS.MAX == 6  # the argument is not modified


def test_a_batch_that_grows_with_the_processes_scales_the_learning_rate_once(tmp_path, monkeypatch):
    options = ["SOLVER.REFERENCE_BATCH", 2, "SOLVER.REFERENCE_WORLD_SIZE", 2]
    cfg = quick_cfg(tmp_path, *options, "SOLVER.BASE_LR", 0.001)
    monkeypatch.setattr("detectron2.utils.comm.get_world_size", lambda: 4)
    resolved = resolve_solver(cfg)
    assert resolved.SOLVER.IMS_PER_BATCH == 4
    assert pytest.approx(0.002) == resolved.SOLVER.BASE_LR


def test_every_start_of_a_run_is_recorded(tmp_path):
    output = tmp_path / "out"
    options = ["SOLVER.EPOCHS.MAX", "1", "SOLVER.REFERENCE_BATCH", "4", "SEED", "-1"]
    options += [*SMALL, *coco_options(tmp_path), "OUTPUT_DIR", str(output)]
    assert run([*QUICK, *options]) == 0
    log = (output / "log.txt").read_text()
    for text in ("epochs of 4 images", "meant for 4 images, becomes", "SEED is drawn"):
        assert log.count(text) == 1, text
    assert run([*QUICK, "--resume", *options]) == 0
    starts = [json.loads(x) for x in (output / "environment.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert torch.__version__.startswith(starts[0]["packages"]["torch"])
    assert starts[0]["seed"] == starts[1]["seed"]  # drawn once
    assert {"command", "device", "processes", "dsrcnn", "commit", "changed"} <= set(starts[0])
    assert "PyTorch" in (output / "environment.txt").read_text()
    assert "(backbone)" in (output / "model.txt").read_text()


def test_a_config_that_could_not_be_read_again_stops_before_training(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dsrcnn.config.files._MAX_BYTES", 8_000)  # as with 100,000 class names
    assert run([*QUICK, *SMALL, "OUTPUT_DIR", str(tmp_path)]) == 2
    assert "The config has more than 8000 bytes" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pth"))


def stop_here(*_):
    raise InterruptedError


def test_the_precision_of_matrix_products_is_set(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    for opts in ((), ("FLOAT32_PRECISION", "high")):
        words = [*SMALL, "OUTPUT_DIR", str(tmp_path / str(len(opts))), *opts]
        setup_run("quick/sparse_rcnn_shapes", words)
    assert chosen == ["high"]
    cfg = load_cfg("quick/sparse_rcnn_shapes", [*SMALL, "FLOAT32_PRECISION", "medium"])
    monkeypatch.setattr(Trainer, "build_model", stop_here)
    with pytest.raises(InterruptedError):  # evaluation without `setup_run`
        evaluate(cfg)
    monkeypatch.setattr("dsrcnn.analysis.report.load_predictor", stop_here)
    with pytest.raises(InterruptedError):
        evaluate_in_detail(cfg)
    assert chosen == ["high", "medium", "medium"]
    with pytest.raises(ConfigError, match=r"FLOAT32_PRECISION is 'tf32'"):
        load_cfg("quick/sparse_rcnn_shapes", ["FLOAT32_PRECISION", "tf32"])
