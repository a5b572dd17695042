import json
import math
import os
import re
import signal

import pytest
import torch
import yaml
from conftest import QUICK, SMALL, coco_options, quick_cfg, refusal, train
from detectron2.engine import DefaultPredictor, hooks

import dsrcnn
from dsrcnn import load_cfg
from dsrcnn.cli.main import main
from dsrcnn.data.datasets.shapes import draw_scene
from dsrcnn.data.mapper import read_image
from dsrcnn.engine.main import evaluate, exit_status
from dsrcnn.engine.memory import is_out_of_memory, memory_advice, memory_keys, memory_message
from dsrcnn.engine.resume import clear_folder, newest_first
from dsrcnn.engine.trainer import Trainer
from dsrcnn.errors import (
    DataError,
    LoaderError,
    NonFiniteLossError,
    OutOfMemoryError,
    TrainingInterrupted,
)


def few_images(folder, *options):
    """The tiny model on four images of two classes."""
    return quick_cfg(folder, *coco_options(folder / "data"), *options)


def test_a_short_training_lowers_the_loss_evaluates_and_predicts(tmp_path):
    cfg = quick_cfg(tmp_path, "SOLVER.MAX_ITER", 60, "SOLVER.WARMUP_ITERS", 5)
    trainer = train(cfg)
    losses = [value for value, _ in trainer.storage.history("total_loss").values()]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert set(trainer._last_eval_results["bbox"]) >= {"AP", "AP50", "AP-circle"}
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    in_training = trainer._last_eval_results["bbox"]
    assert evaluate(cfg)["bbox"] == pytest.approx(in_training, nan_ok=True)

    (tmp_path / "config.yaml").write_text(cfg.dump())
    saved = load_cfg(tmp_path / "config.yaml", ["MODEL.WEIGHTS", cfg.MODEL.WEIGHTS])
    predictor = DefaultPredictor(saved)
    detections = predictor(draw_scene("val", 0))["instances"]
    assert detections.image_size == draw_scene("val", 0).shape[:2]
    assert predictor.metadata.thing_classes[0] == "circle"


def test_an_unreadable_image_stops_training_but_keeps_the_model(tmp_path, monkeypatch):
    calls = []

    def fail_at_the_sixth(record, *options):
        calls.append(record)
        if len(calls) == 6:
            raise DataError("Image gone.jpg cannot be read")
        return read_image(record, *options)

    monkeypatch.setattr("dsrcnn.data.mapper.read_image", fail_at_the_sixth)
    cfg = quick_cfg(tmp_path, "SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 30)
    with pytest.raises(DataError, match=r"gone\.jpg") as error:
        train(cfg)
    last = torch.load(sorted(tmp_path.glob("model_*.pth"))[-1])["iteration"]
    assert f"after {last + 1} iterations" in str(error.value)
    assert "--resume continues" in str(error.value)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == last + 1 > 1


def test_a_dead_loader_worker_is_one_message_and_the_model_is_kept(tmp_path):
    options = ["DATALOADER.NUM_WORKERS", 1, "SOLVER.MAX_ITER", 2000, "DATASETS.TEST", "()"]
    trainer = Trainer(quick_cfg(tmp_path, *options))

    def kill():
        if trainer.iter == 2:
            os.kill(trainer._trainer._batches._workers[0].pid, signal.SIGKILL)

    trainer.register_hooks([hooks.CallbackHook(after_step=lambda _: kill())])
    with pytest.raises(LoaderError, match=r"loads images \(\d+\) has died.*NUM_WORKERS") as error:
        trainer.train()
    assert "--resume continues" in str(error.value)
    (last,) = tmp_path.glob("model_*.pth")
    assert torch.load(last)["iteration"] >= 2


def test_memory_that_runs_out_keeps_the_model_and_names_what_helps(tmp_path):
    options = ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 5, "DATASETS.TEST", "()"]
    trainer = Trainer(quick_cfg(tmp_path, *options))

    def fail():
        if trainer.iter == 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.model.backbone.register_forward_hook(lambda *_: fail())
    with pytest.raises(OutOfMemoryError) as caught:
        trainer.train()
    message = str(caught.value)
    text = "GPU memory ran out when 2.00 GiB more were needed at iteration 3 with 4 images of up to"
    assert message.startswith(text)
    assert re.search(
        r"up to \d+ x \d+ pixels and \d+ objects\. Write SOLVER\.ACCUMULATE 2,", message
    )
    assert "MODEL.ACTIVATION_CHECKPOINT \"('backbone','stages')\"" in message
    assert "after 3 iterations is saved" in message
    again = train(quick_cfg(tmp_path, *options, "SOLVER.ACCUMULATE", 2), resume=True)
    assert again.start_iter == 3


@pytest.mark.parametrize("place", ["next_batch", "validation_losses"])
def test_memory_that_runs_out_anywhere_keeps_the_model(tmp_path, monkeypatch, place):
    def fail(*_, **__):
        raise MemoryError

    options = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "TEST.LOSS", True, "LOG.IMAGES", 0]
    trainer = Trainer(quick_cfg(tmp_path, *options, "SOLVER.CHECKPOINT_PERIOD", 9))
    if place == "validation_losses":
        monkeypatch.setattr("dsrcnn.engine.trainer.validation_losses", fail)
    else:
        loader = iter(trainer.data_loader)
        batches = [next(loader), next(loader)]
        trainer._trainer._batches = (batches.pop() if batches else fail() for _ in range(9))
    with pytest.raises(OutOfMemoryError, match=r"Main memory ran out at iteration \d") as error:
        trainer.train()
    assert "after 2 iterations is saved" in str(error.value)


@pytest.mark.parametrize(("images", "parts", "keys", "expected"), [
    (4, 1, ["A True", "b"], "Write SOLVER.ACCUMULATE 2, A True or b."),
    (9, 2, ["b"], "Write SOLVER.ACCUMULATE 3 or b."),
    (1, 1, ["b"], "Write b."),
])  # fmt: skip
def test_advice_about_memory_names_what_is_left_to_change(images, parts, keys, expected):
    assert memory_advice(images, parts, keys) == expected


@pytest.mark.parametrize(("name", "opts", "expected"), [
    ("sparse_rcnn", [], ["MODEL.ACTIVATION_CHECKPOINT \"('backbone','stages')\""]),
    ("sparse_rcnn", ["MODEL.ACTIVATION_CHECKPOINT", ("backbone", "stages")], []),
    ("asag_s", [], []), ("faster_rcnn", [], []),
])  # fmt: skip
def test_keys_that_save_memory_are_those_the_architecture_takes(name, opts, expected):
    cfg = load_cfg(f"quick/{name}_shapes", ["MODEL.DEVICE", "cpu", *opts])
    assert memory_keys(cfg) == [*expected, "a smaller INPUT.MIN_SIZE_TRAIN"]


@pytest.mark.parametrize(("error", "which"), [
    (RuntimeError("CUDA error: out of memory"), "GPU memory"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "GPU memory"),
    (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOCATION_FAILED"), "GPU memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "Main memory"),
    (MemoryError("Unable to allocate 9 GiB for an array"), "Main memory"),
    (RuntimeError("size mismatch"), None),
    (ValueError("out of memory"), None),
])  # fmt: skip
def test_errors_about_memory_are_recognized(error, which):
    assert is_out_of_memory(error) == (which is not None)
    assert which is None or memory_message(error) == f"{which} ran out"


def test_memory_that_runs_out_in_an_evaluation_keeps_the_model(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("dsrcnn.engine.trainer.inference_on_dataset", fail)
    options = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 9]
    with pytest.raises(OutOfMemoryError, match=r"evaluation on shapes_val.*MIN_SIZE_TEST") as error:
        train(quick_cfg(tmp_path, *options))
    assert "after 2 iterations is saved" in str(error.value)


def test_a_command_says_in_a_line_that_memory_ran_out(capsys):
    def work():
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert exit_status(work) == 2
    assert capsys.readouterr().err.startswith("error: GPU memory ran out when 2.00 GiB more")
    with pytest.raises(RuntimeError, match="a bug"):
        exit_status(lambda: (_ for _ in ()).throw(RuntimeError("a bug")))


def test_a_second_run_in_the_folder_needs_overwrite_and_then_leaves_nothing_of_the_first(
    tmp_path, capsys
):
    words = [*QUICK, *SMALL, *coco_options(tmp_path / "data"), "OUTPUT_DIR", tmp_path / "out"]
    words = [*map(str, words), "TEST.EVAL_PERIOD", "2", "LOG.IMAGES", "0"]
    assert main(["train", *words, "SOLVER.MAX_ITER", "4"]) == 0
    assert (tmp_path / "out/model_0000003.pth").is_file()
    assert "--overwrite" in refusal(capsys, "train", *words)
    assert main(["train", *words, "--overwrite"]) == 0
    names = sorted(p.name for p in (tmp_path / "out").glob("model_*.pth"))
    assert names in (["model_0000001.pth", "model_final.pth"],
                     ["model_0000001.pth", "model_best.pth", "model_final.pth"])  # fmt: skip
    lines = (tmp_path / "out/metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [1, 2]


@pytest.mark.parametrize(("kept", "expected"), [(2, [4, 5]), (0, [0, 1, 2, 3, 4, 5])])
def test_the_newest_checkpoints_are_kept(tmp_path, kept, expected):
    options = ["SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINTS_KEPT", kept]
    train(quick_cfg(tmp_path, *options, "SOLVER.MAX_ITER", 6, "DATASETS.TEST", "()"))
    found = sorted(int(p.stem[6:]) for p in tmp_path.glob("model_0*.pth"))
    assert found == expected


def test_norms_are_averaged_before_the_state_of_a_stop_is_saved(tmp_path, monkeypatch):
    averaged = []
    monkeypatch.setattr(dsrcnn.engine.hooks, "average_norms", lambda model: averaged.append(1))
    options = ["SOLVER.MAX_ITER", 9, "SOLVER.CHECKPOINT_PERIOD", 0, "DATASETS.TEST", "()"]
    trainer = Trainer(quick_cfg(tmp_path, *options))
    trainer._trainer.stop_requested = lambda: trainer.iter == 2
    with pytest.raises(TrainingInterrupted, match="iteration"):
        trainer.train()
    assert trainer.iter == 2
    assert averaged == [1]


def test_files_of_other_names_than_checkpoints_belong_to_the_user(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    names = ("model_0004999_best_of_paper.pth", "model_2024-05-01.pth", "model_3classes.pth")
    for name in names:
        (out / name).write_bytes(b"mine")
    assert newest_first(out) == []
    options = ["SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINTS_KEPT", 1, "SOLVER.MAX_ITER", 3]
    train(quick_cfg(out, *options, "DATASETS.TEST", "()"))
    clear_folder(out)
    assert sorted(path.name for path in out.glob("model_*.pth")) == sorted(names)
    assert all((out / name).read_bytes() == b"mine" for name in names)


def test_the_final_model_has_weights_config_and_classes_but_no_state(tmp_path):
    train(quick_cfg(tmp_path, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()"))
    content = torch.load(tmp_path / "model_final.pth")
    assert set(content) == {"model", "config", "classes", "iteration"}
    assert content["classes"][0] == "circle"
    assert yaml.safe_load(content["config"])["MODEL"]["SparseRCNN"]["NUM_CLASSES"] == 5
    sizes = [(tmp_path / f"model_{n}.pth").stat().st_size for n in ("final", "0000000")]
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.parametrize("late", [False, True], ids=["read at once", "read late"])
def test_a_diverging_loss_stops_training_and_names_the_last_checkpoint(tmp_path, late):
    options = ["SOLVER.BASE_LR", 1e12, "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 1]
    trainer = Trainer(quick_cfg(tmp_path, *options, "SOLVER.MAX_ITER", 50))
    trainer._trainer.reads_late = late
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    last = (tmp_path / "last_checkpoint").read_text()
    assert f"write MODEL.WEIGHTS {tmp_path / last} and another OUTPUT_DIR" in str(error.value)
    assert "shapes://train" in str(error.value)
    state = torch.load(tmp_path / last)["model"]
    assert not any(math.isnan(v.float().sum()) for v in state.values() if v.numel())


def test_what_is_written_does_not_depend_on_when_losses_are_read(tmp_path):
    logs = []
    for late in (False, True):
        options = ["LOG.PERIOD", 3, "SOLVER.MAX_ITER", 8, "DATASETS.TEST", "()"]
        torch.manual_seed(0)  # equal weights
        trainer = Trainer(quick_cfg(tmp_path / str(late), *options))
        trainer._trainer.reads_late = late
        trainer.train()
        lines = (tmp_path / str(late) / "metrics.json").read_text().splitlines()
        timed = ("time", "data_time", "eta_seconds")
        logs.append([{k: v for k, v in json.loads(x).items() if k not in timed} for x in lines])
    assert logs[0] == logs[1]
    assert [row["iteration"] for row in logs[0]] == [2, 5, 7]


def test_all_processes_have_the_same_hooks_in_order(tmp_path, monkeypatch):
    names = []
    for is_main in (True, False):
        monkeypatch.setattr("detectron2.utils.comm.is_main_process", lambda x=is_main: x)
        trainer = Trainer(few_images(tmp_path, "MODEL.EMA.ENABLED", True))
        names.append([type(hook).__name__ for hook in trainer._hooks])
    assert names[0] == names[1]
    order = ["LRScheduler", "CallbackHook", "AverageNorms", "Checkpoints", "Evaluation"]
    assert [n for n in names[0] if n in order] == order
    assert names[0][-2:] == ["ProgressBar", "Writers"]


def test_frozen_modules_stay_unchanged_and_mixed_precision_trains_on_a_cpu(tmp_path):
    options = ["MODEL.FREEZE", "('backbone',)", "LOG.IMAGES", 0, "SOLVER.AMP.ENABLED", True]
    trainer = Trainer(few_images(tmp_path, *options))
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if k.startswith("backbone"))
    assert not all(torch.equal(after[k], v) for k, v in before.items())
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_evaluation_with_test_time_augmentation_adds_its_metrics(tmp_path):
    train(few_images(tmp_path, "SOLVER.MAX_ITER", 1))
    options = ["TEST.AUG.ENABLED", True, "TEST.AUG.SCALE_FILTER", False]
    options += ["TEST.AUG.MIN_SIZES", "(64,)", "MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    results = evaluate(few_images(tmp_path, *options))
    assert set(results) == {"bbox", "bbox_TTA"}
    assert set(results["bbox_TTA"]) == set(results["bbox"])
    assert (tmp_path / "tta/inference/coco_instances_results.json").is_file()


@pytest.mark.parametrize(("period", "expected"), [(2, [1, 3, 4]), (0, [4])])
def test_metrics_are_written_every_log_period_and_at_the_end(period, expected, tmp_path):
    options = ["MODEL.SparseRCNN.DLA.ENABLED", True, "SOLVER.MAX_ITER", 5, "LOG.IMAGES", 0]
    train(few_images(tmp_path, *options, "LOG.PERIOD", period, "DATASETS.TEST", "()"))
    entries = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [e["iteration"] for e in entries if "total_loss" in e] == expected
    assert [e["iteration"] for e in entries if "dla/positives" in e] == [1, 3][: 2 * (period > 0)]
