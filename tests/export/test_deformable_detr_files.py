"""Exported Deformable DETR: its variants in every format."""

import numpy as np
import pytest
import torch
from conftest import ANIMALS
from detectron2.modeling import build_model

import dsrcnn
from dsrcnn.config import read_cfg
from dsrcnn.export.formats import FORMATS

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

NODE = "MODEL.SparseRCNN."
SMALL = [
    *("MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", 64, "INPUT.MAX_SIZE_TEST", 128),
    *(f"{NODE}NUM_CLASSES", 5, f"{NODE}NUM_PROPOSALS", 20),
]
VARIANTS = {
    "refinement": [],
    "plain": ["MODEL.DeformableDETR.BOX_REFINEMENT", False],
    "two stages": [f"{NODE}PROPOSALS.NAME", "EncoderQueries"],
}


def detector_of(folder, name):
    """A detector whose parameters differ from their start, with scores around a half."""
    cfg = read_cfg("quick/deformable_detr_shapes", [*SMALL, *VARIANTS[name]])
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.startswith(("encoder.", "proposals.", "head.")):
                parameter.add_(torch.randn_like(parameter) * 0.05)
            if key.endswith("class_embed.bias"):
                parameter.zero_()
    path = folder / "model_final.pth"
    torch.save({"model": model.state_dict(), "config": cfg.dump(), "classes": ANIMALS}, path)
    return dsrcnn.load(path, device="cpu")


SLOW = [
    *(("plain", "torch-export", False), ("two stages", "onnx", True)),
    *(("refinement", "onnx", False), ("two stages", "onnx", False)),
]


@pytest.mark.parametrize(("name", "kind", "half"), [
    *((name, "torchscript", False) for name in VARIANTS), ("refinement", "torchscript", True),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW),
])  # fmt: skip
def test_files_agree_with_the_model_for_images_of_any_shape(tmp_path, photos, name, kind, half):
    detector = detector_of(tmp_path, name)
    path = tmp_path / f"model{FORMATS[kind].suffix}"
    dynamic = FORMATS[kind].dynamic_batch and not half
    options = {"size": (64, 96), "images": photos, "dynamic_batch": dynamic, "half": half}
    export = detector.export(path, kind, **options)
    assert export.parity.detections >= 5 * 20  # of upright and wide photographs
    assert export.parity.missing == 0
    assert export.parity.pixels < (0.5 if half else 0.01)
    assert export.parity.score < (5e-3 if half else 1e-5)
    # Pixels that the canvas has unscaled are the detector's input, too.
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    boxes, scores, _ = FORMATS[kind].open(path).run(image[None])[0]
    expected = detector.predict(image, threshold=0)
    assert len(scores) == len(expected)
    np.testing.assert_allclose(boxes[:5], expected.boxes[:5], atol=0.5 if half else 0.01)
