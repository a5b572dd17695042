"""Exported Faster R-CNN and Dynamic R-CNN."""

import copy

import numpy as np
import pytest
import torch
from conftest import ANIMALS
from detectron2.modeling import build_model

import dsrcnn
from dsrcnn.config import read_cfg
from dsrcnn.errors import ConfigError, ExportError
from dsrcnn.export import two_stage
from dsrcnn.export.formats import run_program
from dsrcnn.export.parity import FLOAT32, compare
from dsrcnn.export.two_stage import TwoStageProgram

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

ALIGNED = ("MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2")
SIZE = ("INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 96, "MODEL.FPN.OUT_CHANNELS", 32)
SMALL = ("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", 3, *SIZE)


def model_and_cfg(*opts, config="quick/faster_rcnn_shapes"):
    """A model with confident detections in noise."""
    cfg = read_cfg(config, [*SMALL, *opts])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    rpn, predictor = model.proposal_generator.rpn_head, model.roi_heads.box_predictor
    for weight, std in (
        (rpn.objectness_logits.weight, 0.3),
        (rpn.anchor_deltas.weight, 0.05),
        (predictor.cls_score.weight, 0.002),
        (predictor.bbox_pred.weight, 0.005),
    ):
        torch.nn.init.normal_(weight, std=std)
    return model, cfg


def image_of(seed, height=64, width=90):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def check_equal(actual, expected):
    assert [len(d[1]) for d in actual] == [len(d[1]) for d in expected]
    parity = compare(expected, actual, FLOAT32)
    assert parity.score < 1e-4
    assert parity.pixels < 0.1


@pytest.mark.parametrize(
    "opts",
    [
        (),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", 15, "TEST.DETECTIONS_PER_IMAGE", 7),
        (*ALIGNED, "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True),
        ("MODEL.RPN.NMS_THRESH", 0.3, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE", 12),
        ("MODEL.RPN.NMS_THRESH", 0.3, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3),
    ],
    ids=["default", "few", "class agnostic", "no small boxes", "thresholds"],
)  # fmt: skip
@pytest.mark.parametrize("config", ["quick/faster_rcnn_shapes", "quick/dynamic_rcnn_shapes"])
def test_the_program_detects_what_detectron2_does(config, opts):
    model, cfg = model_and_cfg(*opts, config=config)
    bgr = cfg.INPUT.FORMAT == "BGR"
    program = TwoStageProgram(copy.deepcopy(model), (64, 90), bgr=bgr).eval()
    counts = []
    for seed in range(3):
        image = image_of(seed)
        pixels = torch.as_tensor(image.transpose(2, 0, 1).copy())
        inputs = {"image": pixels.flip(0) if bgr else pixels, "height": 64, "width": 90}
        with torch.no_grad():
            (output,) = model([inputs])
        instances = output["instances"]
        fields = (instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
        expected = [tuple(x.numpy() for x in fields)]
        check_equal(run_program(program, image[None]), expected)
        check_equal([program.reference(model, image)], expected)
        counts.append(len(instances))
    assert min(counts) > 4


def test_a_batch_is_detected_as_its_images_are():
    model, _ = model_and_cfg()
    program = TwoStageProgram(model, (64, 90), bgr=True).eval()
    images = np.stack([image_of(seed) for seed in range(3)])
    check_equal(run_program(program, images), [run_program(program, x[None])[0] for x in images])


@pytest.fixture
def detector(tmp_path):
    """A detector from a weight file."""
    model, cfg = model_and_cfg()
    path = tmp_path / "model.pth"
    content = {"model": model.state_dict(), "config": cfg.dump(), "classes": ANIMALS[:3]}
    torch.save(content, path)
    return dsrcnn.load(path, device="cpu")


@pytest.mark.slow
def test_an_onnx_file_agrees_with_the_model_and_predicts(detector, tmp_path, monkeypatch):
    monkeypatch.setattr(two_stage, "_RPN_ROUNDS", 3)  # fewer nodes, sooner written
    images = [image_of(seed, 80, 100) for seed in range(2)]
    path = tmp_path / "model.onnx"
    export = detector.export(path, size=(64, 90), images=images, dynamic_batch=True)
    assert export.parity.detections > 10
    assert export.parity.pixels < 0.05
    assert export.info.nms == 0.5
    result = dsrcnn.load_exported(path).predict(images[0], threshold=0.3)
    expected = detector.predict(images[0], threshold=0.3)
    assert abs(len(result) - len(expected)) <= 2  # pixels are resized to another size


def test_what_cannot_be_exported_is_named(detector, tmp_path):
    with pytest.raises(ConfigError, match="cannot do without NMS"):
        detector.export(tmp_path / "model.onnx", images=[image_of(0)], nms=False)
    model, _ = model_and_cfg("MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO", 0)
    with pytest.raises(ExportError, match="POOLER_SAMPLING_RATIO above 0"):
        TwoStageProgram(model, (64, 90), bgr=True)
    model, _ = model_and_cfg()
    model.roi_heads.mask_on = True
    with pytest.raises(ExportError, match="masks or keypoints"):
        TwoStageProgram(model, (64, 90), bgr=True)


def test_detections_that_nms_would_change_are_not_those_of_the_reference(monkeypatch):
    monkeypatch.setattr(two_stage, "_RPN_ROUNDS", 0)  # all proposals stay
    monkeypatch.setattr(two_stage, "_CANDIDATES", 3)
    model, _ = model_and_cfg()
    program = TwoStageProgram(copy.deepcopy(model), (64, 90), bgr=True).eval()
    image = image_of(0)
    with pytest.raises(ExportError, match="disagree"):
        compare([program.reference(model, image)], run_program(program, image[None]), FLOAT32)
