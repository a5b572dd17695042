"""Detectron2 0.6 on current libraries after `import dsrcnn`."""

import importlib.machinery
import importlib.util
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY, quick_cfg, write_coco
from detectron2 import _C
from detectron2.data import DatasetCatalog, build, print_instances_class_histogram
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.layers.rotated_boxes import pairwise_iou_rotated
from detectron2.structures import Boxes, Instances
from detectron2.utils import collect_env

from dsrcnn import compat
from dsrcnn.errors import ConfigError

pure_python = pytest.mark.skipif(
    not isinstance(_C, compat._MissingExtension), reason="Detectron2 is compiled here"
)


@pytest.mark.parametrize(("augmentation", "shape"), [
    (T.ResizeShortestEdge([32], 100, "choice"), (32, 64)),
    (T.Resize((10, 30)), (10, 30)), (T.RandomFlip(prob=1.0), (20, 40)),
    (T.RandomCrop("absolute", (8, 9)), (8, 9)),
    (T.RandomExtent((1.0, 1.0), (0.0, 0.0)), (20, 40)),
    (T.RandomRotation([90, 90]), (40, 20)),
])  # fmt: skip
def test_transforms_of_detectron2_work(augmentation, shape):
    augmented = T.AugInput(np.full((20, 40, 3), 99, np.uint8))
    augmentation(augmented)
    assert augmented.image.shape[:2] == shape
    assert (augmented.image == 99).all()


def test_the_environment_is_described():
    text = collect_env.collect_env_info()
    for word in ("detectron2", "PyTorch", "Compiler", "numpy"):
        assert word in text


def test_the_class_histogram_is_logged(monkeypatch):
    logged = []
    monkeypatch.setattr(build, "log_first_n", lambda level, text, **_: logged.append(text))
    annotations = [{"category_id": i, "iscrowd": 0} for i in (0, 1, 1)]
    print_instances_class_histogram([{"annotations": annotations}], ["cat", "dog"])
    rows = [[cell.strip() for cell in line.split("|")] for line in logged[0].splitlines()]
    assert any(row[1:5] == ["cat", "1", "dog", "2"] for row in rows)


@pure_python
def test_a_function_of_the_missing_extension_names_itself():
    with pytest.raises(RuntimeError, match=r"_C\.box_iou_rotated needs .* compiled extension"):
        pairwise_iou_rotated(torch.ones(1, 5), torch.ones(1, 5))


@pure_python
def test_the_missing_extension_is_no_package_and_modules_can_import_it():
    assert not hasattr(_C, "__path__")
    assert importlib.util.find_spec("detectron2._C") is not None  # for collect_env
    for name in ("layers.deform_conv", "layers.roi_align_rotated", "evaluation.fast_eval_api"):
        assert importlib.import_module(f"detectron2.{name}")._C is _C


def test_a_second_call_changes_nothing():
    def state():
        return sys.modules["detectron2._C"], getattr(PIL.Image, "LINEAR", None), set(np.__dict__)

    before = state()
    compat.ensure_compatible()
    assert state() == before


@pytest.mark.parametrize(("module", "name", "source", "restored"), [
    (np, "int", "x.astype(np.int)", True), (np, "int", "x.astype(np.int64)", False),
    (np, "int", "", False),
    (PIL.Image, "LINEAR", "interp=Image.LINEAR", True),
    (PIL.Image, "LINEAR", "interp=Image.BILINEAR", False),
])  # fmt: skip
def test_a_removed_name_is_restored_only_if_detectron2_uses_it(
    monkeypatch, tmp_path, module, name, source, restored
):
    monkeypatch.setattr(module, name, None, raising=False)  # to be undone after the test
    delattr(module, name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/build.py").write_text(source)
    compat._restore_removed_names(tmp_path)
    assert (name in vars(module)) == restored


def test_an_existing_extension_is_left_alone(monkeypatch):
    compiled = object()
    monkeypatch.setitem(sys.modules, "detectron2._C", compiled)
    compat._provide_compiled_extension()
    assert sys.modules["detectron2._C"] is compiled


# A clone's root folder, seen from its parent, is found as a package without files.
EMPTY_FOLDER = importlib.machinery.ModuleSpec("detectron2", None, is_package=True)


@pytest.mark.parametrize("spec", [None, EMPTY_FOLDER], ids=["nothing", "folder"])
def test_a_missing_detectron2_is_explained(monkeypatch, spec):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec)
    with pytest.raises(ImportError, match=r"not installed.*make setup.*pip install"):
        compat.ensure_compatible()


def test_the_import_prints_nothing():
    command = [sys.executable, "-c", "import dsrcnn.engine.processes"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_detectron2s_evaluator_works_without_compiled_operators(tmp_path):
    write_coco(tmp_path / "data.json", tmp_path / "images")
    register_coco_instances("compat_test", {}, str(tmp_path / "data.json"), str(tmp_path))
    DatasetCatalog.get("compat_test")  # sets the ids of its classes
    evaluator = COCOEvaluator("compat_test", output_dir=str(tmp_path / "out"))
    evaluator.reset()
    for image in (1, 2):
        detections = Instances((64, 96))
        detections.pred_boxes = Boxes(torch.tensor([[5.0, 5, 35, 35], [50, 20, 90, 50]]))
        detections.scores, detections.pred_classes = torch.ones(2), torch.arange(2)
        evaluator.process([{"image_id": image}], [{"instances": detections}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_detectron2s_trainer_refuses_models_of_this_package_and_no_others(tmp_path):
    with pytest.raises(ConfigError, match=r"Use dsrcnn\.engine\.trainer\.Trainer"):
        DefaultTrainer(quick_cfg(tmp_path))
    cfg = quick_cfg(tmp_path, "SOLVER.CLIP_GRADIENTS.ENABLED", False)
    optimizer = DefaultTrainer.build_optimizer(cfg, torch.nn.Linear(2, 2))
    assert isinstance(optimizer, torch.optim.SGD)


def test_a_trainer_with_its_own_optimizer_is_not_refused(tmp_path):
    class OwnTrainer(DefaultTrainer):
        @classmethod
        def build_optimizer(cls, cfg, model):
            return torch.optim.AdamW(model.parameters(), cfg.SOLVER.BASE_LR)

    assert isinstance(OwnTrainer(quick_cfg(tmp_path)).optimizer, torch.optim.AdamW)
