"""What `import dsrcnn` makes of an old Detectron2 on current libraries."""

import importlib.machinery
import importlib.util
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import REPOSITORY
from detectron2 import _C
from detectron2.data import build, print_instances_class_histogram
from detectron2.data import transforms as T
from detectron2.layers.rotated_boxes import pairwise_iou_rotated
from detectron2.utils import collect_env

from dsrcnn import compat

pure_python = pytest.mark.skipif(
    not isinstance(_C, compat._MissingExtension), reason="Detectron2 is compiled here"
)


def pretend_found(monkeypatch, spec):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: spec if name == "detectron2" else find(name, *rest),
    )


# What works after the import


@pytest.mark.parametrize(
    ("augmentation", "shape"),
    [
        (T.ResizeShortestEdge([32], 100, "choice"), (32, 64)),
        (T.Resize((10, 30)), (10, 30)),
        (T.RandomFlip(prob=1.0), (20, 40)),
        (T.RandomCrop("absolute", (8, 9)), (8, 9)),
        (T.RandomExtent((1.0, 1.0), (0.0, 0.0)), (20, 40)),
        (T.RandomRotation([90, 90]), (40, 20)),
    ],
)
def test_detectron2s_transforms_work(augmentation, shape):
    augmented = T.AugInput(np.zeros((20, 40, 3), np.uint8))
    augmentation(augmented)
    assert augmented.image.shape[:2] == shape


def test_a_resized_image_of_one_colour_keeps_it():
    augmented = T.AugInput(np.full((20, 40, 3), 99, np.uint8))
    T.Resize((7, 11))(augmented)
    assert (augmented.image == 99).all()


def test_the_environment_is_described():
    text = collect_env.collect_env_info()
    for word in ("detectron2", "PyTorch", "Compiler", "numpy"):
        assert word in text


def test_the_class_histogram_is_logged(monkeypatch):
    counted = []
    monkeypatch.setattr(build, "log_first_n", lambda level, text, **_: counted.append(text))
    annotations = [{"category_id": i, "iscrowd": 0} for i in (0, 1, 1)]
    print_instances_class_histogram([{"annotations": annotations}], ["cat", "dog"])
    (text,) = counted
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    assert any(row[1:5] == ["cat", "1", "dog", "2"] for row in rows)


# The extension that is not compiled


@pure_python
def test_a_function_of_the_missing_extension_says_which_one_is_missing():
    with pytest.raises(RuntimeError, match=r"_C\.box_iou_rotated needs .* compiled extension"):
        pairwise_iou_rotated(torch.ones(1, 5), torch.ones(1, 5))


@pure_python
def test_modules_that_import_the_missing_extension_can_be_imported():
    for name in ("layers.deform_conv", "layers.roi_align_rotated", "evaluation.fast_eval_api"):
        module = importlib.import_module(f"detectron2.{name}")
        assert module._C is _C


@pure_python
def test_the_missing_extension_has_no_special_attributes():
    assert not hasattr(_C, "__path__")
    assert importlib.util.find_spec("detectron2._C") is not None  # collect_env asks


# Conditions


def test_a_second_call_changes_nothing():
    before = sys.modules["detectron2._C"], getattr(PIL.Image, "LINEAR", None), dict(np.__dict__)
    compat.ensure_compatible()
    after = sys.modules["detectron2._C"], getattr(PIL.Image, "LINEAR", None), dict(np.__dict__)
    assert after[0] is before[0]
    assert after[1] is before[1]
    assert after[2].keys() == before[2].keys()


@pytest.mark.parametrize(
    ("source", "restored"), [("x.astype(np.int)", True), ("x.astype(np.int64)", False), ("", False)]
)
def test_a_numpy_name_returns_only_where_detectron2_uses_it(
    monkeypatch, tmp_path, source, restored
):
    monkeypatch.setattr(np, "int", None, raising=False)  # so that it is put back afterwards
    del np.int
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "build.py").write_text(source)
    compat._restore_numpy_aliases(tmp_path)
    assert (np.__dict__.get("int") is int) == restored


@pytest.mark.parametrize(
    ("source", "restored"), [("interp=Image.LINEAR", True), ("interp=Image.BILINEAR", False)]
)
def test_a_pillow_name_returns_only_where_detectron2_uses_it(
    monkeypatch, tmp_path, source, restored
):
    monkeypatch.setattr(PIL.Image, "LINEAR", None, raising=False)
    del PIL.Image.LINEAR
    (tmp_path / "data" / "transforms").mkdir(parents=True)
    (tmp_path / "data" / "transforms" / "transform.py").write_text(source)
    compat._restore_pillow_linear(tmp_path)
    assert hasattr(PIL.Image, "LINEAR") == restored


def test_an_extension_that_is_there_is_left_alone(monkeypatch):
    compiled = object()
    monkeypatch.setitem(sys.modules, "detectron2._C", compiled)
    compat._provide_compiled_extension()
    assert sys.modules["detectron2._C"] is compiled


# Detectron2 itself missing


def test_a_missing_detectron2_says_how_to_install_it(monkeypatch):
    pretend_found(monkeypatch, None)
    with pytest.raises(ImportError, match=r"not installed.*make setup.*pip install"):
        compat.ensure_compatible()


def test_a_mere_folder_called_detectron2_is_not_an_installation(monkeypatch):
    # A clone's root folder, seen from its parent, is found as a package without files.
    pretend_found(monkeypatch, importlib.machinery.ModuleSpec("detectron2", None, is_package=True))
    with pytest.raises(ImportError, match="not installed"):
        compat.ensure_compatible()


def test_the_import_prints_nothing():
    command = [sys.executable, "-c", "import dsrcnn.engine.launch"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""
