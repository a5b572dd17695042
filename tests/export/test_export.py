"""Exported models: the same detections as the model, in each format, from each program."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ANIMALS, REPOSITORY, save_model, tiny_cfg
from detectron2.modeling import build_model
from PIL import Image

import dsrcnn
from dsrcnn.cli.main import main
from dsrcnn.errors import ConfigError, DataError, ExportError, MissingPackageError
from dsrcnn.export import program as programs
from dsrcnn.export import resize
from dsrcnn.export.formats import FORMATS, run_program
from dsrcnn.export.program import DetectionProgram
from dsrcnn.export.resize import resize_to_canvas
from dsrcnn.modeling import postprocessing

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DENSE = ("MODEL.SparseRCNN.PROPOSALS.NAME", "DenseDistinct", "MODEL.SparseRCNN.NUM_PROPOSALS", 20)
DYNAMIC = ("MODEL.SparseRCNN.DLA.ENABLED", True, "MODEL.SparseRCNN.DPG.ENABLED", True)


def detector_with(folder, *opts):
    """A detector whose scores are around a half."""
    path = folder / "model_final.pth"
    save_model(path, *opts)
    content = torch.load(path)
    for name, value in content["model"].items():
        if name.endswith("class_logits.bias"):
            value.zero_()
    torch.save(content, path)
    return dsrcnn.load(path, device="cpu")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A detector with DLA and DPG."""
    return detector_with(tmp_path_factory.mktemp("dynamic"), *DYNAMIC)


@pytest.fixture(scope="module")
def exported(dynamic, photos, tmp_path_factory):
    """Its ONNX file, which takes batches."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return dynamic.export(path, size=(64, 96), images=photos, dynamic_batch=True)


@pytest.mark.parametrize("opts", [
    (), DYNAMIC, DENSE, ("INPUT.FORMAT", "BGR"),
    ("INPUT.PAD_TO", 160), ("INPUT.BUCKETS", ((96, 128), (128, 192))),
])  # fmt: skip
def test_a_program_detects_what_the_detector_does_at_its_size(tmp_path, opts):
    detector = detector_with(tmp_path, *opts)
    image = np.random.randint(0, 256, (64, 90, 3), dtype=np.uint8)
    model, bgr = copy.deepcopy(detector.model), detector.cfg.INPUT.FORMAT == "BGR"
    program = DetectionProgram(model, (64, 90), model.detection, bgr=bgr).eval()
    boxes, scores, labels = run_program(program, image[None])[0]
    expected = detector.predict(image, threshold=0)
    assert len(expected) == len(scores)
    np.testing.assert_allclose(scores, expected.scores, atol=1e-6)
    np.testing.assert_allclose(boxes, expected.boxes, atol=1e-3)
    assert labels.tolist() == expected.labels.tolist()


def test_an_onnx_file_agrees_with_the_model_and_knows_itself(exported):
    assert exported.parity.detections > 10
    assert exported.parity.pixels < 0.05
    assert exported.parity.score < 1e-4
    session = onnxruntime.InferenceSession(exported.path, providers=["CPUExecutionProvider"])
    info = json.loads(session.get_modelmeta().custom_metadata_map["dsrcnn"])
    assert info["classes"] == ANIMALS
    assert info["nms"] == 0.7
    assert (info["height"], info["width"]) == (64, 96)
    assert [x.name for x in session.get_outputs()] == ["boxes", "scores", "labels"]
    assert [p.name for p in exported.path.parent.iterdir()] == ["model.onnx"]
    assert str(REPOSITORY).encode() not in exported.path.read_bytes()  # no folders of this machine


def test_an_onnx_file_is_smaller_than_its_operators_would_be_unfolded(exported):
    onnx = pytest.importorskip("onnx")
    kinds = [node.op_type for node in onnx.load(exported.path).graph.node]
    assert not {"BatchNormalization", "Loop", "NonMaxSuppression", "If"} & set(kinds)
    assert kinds.count("Conv") == 20 + 8 + 3  # R18, its pyramid, DPG; norms are inside


def test_an_exported_detector_predicts_as_the_detector(exported, dynamic, photos):
    loaded = dsrcnn.load_exported(exported.path)
    assert loaded.classes == ANIMALS
    for batch in (None, 3):
        results = loaded.predict(photos, threshold=0.05, batch=batch)
        assert [r.path for r in results] == [r.path for r in dynamic.predict(photos)]
        for result in results:
            size = (64, 96) if result.size == (64, 96) else None
            if size:  # the others are letterboxed
                expected = dynamic.predict(result.path, threshold=0.05)
                np.testing.assert_allclose(result.boxes, expected.boxes, atol=0.05)
                assert result.names == expected.names
    tiled = loaded.predict(np.zeros((128, 200, 3), dtype=np.uint8), tile=64, max_detections=3)
    assert len(tiled) <= 3


@pytest.mark.parametrize(("settings", "text"), [
    ({"tta": True}, "tta is not possible"), ({"stages": True}, "stages is not possible"),
    ({"size": 32}, "size is not possible"), ({"max_detections": 101}, "returns at most 100"),
])  # fmt: skip
def test_settings_that_a_file_does_not_have_are_refused(exported, photos, settings, text):
    with pytest.raises(ConfigError, match=text):
        dsrcnn.load_exported(exported.path).predict(photos, **settings)


def test_an_exported_file_runs_without_torch(exported, photos):
    """Any program with onnxruntime and an image."""
    code = (
        "import sys, numpy as np, onnxruntime\n"
        "sys.modules['torch'] = None\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "images = np.zeros((1, 50, 70, 3), np.uint8)\n"
        "boxes, scores, labels = session.run(None, {'images': images})\n"
        "assert boxes.shape[2] == 4 and boxes.max() <= 70, boxes\n"
    )
    subprocess.run([sys.executable, "-c", code, exported.path], check=True, timeout=120)


@pytest.mark.parametrize(
    ("kind", "half"), [("torch-export", False), ("torchscript", False), ("torchscript", True)]
)
def test_other_formats_agree_with_the_model(dynamic, photos, tmp_path, kind, half):
    path = tmp_path / f"model{FORMATS[kind].suffix}"
    export = dynamic.export(path, kind, size=(32, 48), images=photos, half=half)
    assert export.parity.detections > 10
    limit = 1.0 if half else 0.01
    assert export.parity.pixels < limit
    assert FORMATS[kind].open(path).info.half is half
    if kind == "torch-export":
        assert str(REPOSITORY).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "kind",
    ["torchscript", *(pytest.param(k, marks=pytest.mark.slow) for k in ("onnx", "torch-export"))],
)
def test_distinct_proposals_agree_in_every_format(photos, tmp_path, kind):
    detector = detector_with(tmp_path, *DENSE)
    path = tmp_path / f"model{FORMATS[kind].suffix}"
    is_onnx = kind == "onnx"
    export = detector.export(path, kind, size=(64, 96), images=photos, dynamic_batch=is_onnx)
    assert export.parity.detections > 10
    assert export.parity.pixels < 0.05


@pytest.mark.parametrize("kind", [
    "torchscript", pytest.param("onnx", marks=pytest.mark.slow)
])  # fmt: skip
def test_a_file_has_the_box_coder_of_its_model(photos, tmp_path, kind):
    """Divisors ten and five times as large, of weights that are as much larger: equal boxes."""
    weights = ("MODEL.SparseRCNN.BOX_WEIGHTS", (20.0, 20.0, 5.0, 5.0))
    plain, scaled = detector_with(tmp_path), detector_with(tmp_path, *weights)
    files = []
    for number, detector in enumerate((plain, scaled)):
        if detector is scaled:
            with torch.no_grad():
                for stage in detector.model.head.head_series:
                    for parameter in stage.bboxes_delta.parameters():
                        parameter[:2].mul_(10)
                        parameter[2:].mul_(5)
        path = tmp_path / f"{number}{FORMATS[kind].suffix}"
        detector.export(path, kind, size=(32, 48), images=photos)
        files.append(FORMATS[kind].open(path))
    image = np.random.randint(0, 256, (1, 32, 48, 3), dtype=np.uint8)
    (boxes, scores, _), (others, _, _) = (session.run(image)[0] for session in files)
    assert len(scores) > 5
    np.testing.assert_allclose(others, boxes, atol=0.01)


def test_half_precision_is_compared_with_full_precision(dynamic, photos, tmp_path, monkeypatch):
    traced, compared = [], []
    forward, predict = programs.DetectionProgram.forward, type(dynamic.model).predict

    def note_program(self, images):
        traced.append(self.half_precision)
        return forward(self, images)

    def note_model(self, images):
        if self is dynamic.model:
            compared.append((torch.is_autocast_enabled("cpu"), self.pixel_mean.dtype))
        return predict(self, images)

    monkeypatch.setattr(programs.DetectionProgram, "forward", note_program)
    monkeypatch.setattr(type(dynamic.model), "predict", note_model)
    path = tmp_path / "model.torchscript"
    dynamic.export(path, "torchscript", size=(32, 48), images=photos, half=True)
    assert all(traced)
    assert set(compared) == {(False, torch.float32)}


@pytest.mark.parametrize("part", ["resizing", "normalizing", "nms"])
def test_a_program_that_differs_from_evaluation_is_not_written(
    dynamic, photos, tmp_path, monkeypatch, part
):
    """What the file and the program have in common is compared with the model, too."""
    if part == "resizing":
        monkeypatch.setattr(programs, "resize_to_canvas", _moved)
        monkeypatch.setattr(resize, "resize_to_canvas", _moved)
    elif part == "normalizing":
        original = programs.Program._preprocess
        brighter = lambda self, x: (b := original(self, x))._replace(tensor=b.tensor + 1)  # noqa: E731
        monkeypatch.setattr(programs.Program, "_preprocess", brighter)
    else:
        monkeypatch.setattr(postprocessing, "dense_nms", lambda scores, *_: scores > 0)
    with pytest.raises(ExportError, match=r"disagree|gray levels from Pillow"):
        dynamic.export(tmp_path / "m.torchscript", "torchscript", size=(64, 96), images=photos)
    assert not list(tmp_path.iterdir())


def _moved(images, canvas):
    pixels, before, after = resize_to_canvas(images, canvas)
    return pixels.roll(2, dims=3), before, after


def test_the_size_is_that_of_evaluation_of_a_photograph_without_a_test_set(dynamic, tmp_path):
    export = dynamic.export(tmp_path / "model.torchscript", "torchscript")
    assert (export.info.height, export.info.width) == (64, 85)  # 480 x 640 at INPUT.MIN_SIZE_TEST
    assert export.images == "1 image that Matplotlib ships, as no test set can be read"


@pytest.mark.slow
def test_half_precision_halves_an_onnx_file(dynamic, exported, photos, tmp_path):
    export = dynamic.export(tmp_path / "half.onnx", size=(64, 96), images=photos, half=True)
    assert export.parity.detections > 10
    assert export.path.stat().st_size < 0.6 * exported.path.stat().st_size


def test_a_file_that_disagrees_is_not_written(dynamic, photos, tmp_path, monkeypatch):
    path = tmp_path / "model.torchscript"
    path.write_text("an earlier file")
    original = programs.DetectionProgram.forward

    def shifted(self, images):
        boxes, scores, labels = original(self, images)
        return boxes + 1.0 * torch.jit.is_tracing(), scores, labels

    monkeypatch.setattr(programs.DetectionProgram, "forward", shifted)
    with pytest.raises(ExportError, match=r"disagree.*No file was written"):
        dynamic.export(path, "torchscript", size=(32, 48), images=photos)
    assert path.read_text() == "an earlier file"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(("arguments", "error", "text"), [
    ({"path": "model.pt2"}, ConfigError, "files of onnx end with .onnx"),
    ({"format": "caffe"}, ConfigError, "'caffe'; write one of onnx, torch-export, torchscript"),
    ({"path": "m.torchscript", "format": "torchscript", "dynamic_batch": True}, ConfigError,
     "torchscript cannot have a dynamic batch"),
    ({"size": (0, 64)}, ConfigError, r"size is \(0, 64\); write height and width"),
    ({"size": 640}, ConfigError, "size is 640; write height and width"),
    ({"images": []}, DataError, "No image can be read"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(
    dynamic, photos, arguments, error, text, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=text):
        dynamic.export(**{"path": "model.onnx", "images": photos, **arguments})


@pytest.mark.parametrize("version", ["2.4.1", "2.5.1+cpu", "2.6.0", "2.10.0+cu130"])
def test_onnx_export_names_the_torch_it_needs_before_it_starts(
    version, dynamic, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch, "__version__", version)
    if version in ("2.6.0", "2.10.0+cu130"):
        FORMATS["onnx"].check()
        return
    text = f"needs torch 2.6 or newer, and this is torch {version}. .*pip install --upgrade torch"
    with pytest.raises(MissingPackageError, match=text.replace("+", r"\+")):
        dynamic.export(tmp_path / "new/model.onnx", images=photos)
    assert not (tmp_path / "new").exists()


def test_models_without_fixed_shapes_are_refused(tmp_path, photos):
    cfg = tiny_cfg(config="small/asag_s_R18")
    model = build_model(cfg)
    path = tmp_path / "model.pth"
    torch.save({"model": model.state_dict(), "config": cfg.dump(), "classes": ANIMALS}, path)
    with pytest.raises(ExportError, match="ASAG cannot be exported"):
        dsrcnn.load(path, device="cpu").export(tmp_path / "model.onnx", images=photos)


def test_other_files_are_refused(exported, tmp_path):
    onnx = pytest.importorskip("onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(exported.path.read_bytes()[:1000])
    foreign, other = tmp_path / "foreign.onnx", tmp_path / "other.onnx"
    model = onnx.load(exported.path)
    onnx.helper.set_model_props(model, {"dsrcnn": json.dumps({"classes": "cat"})})
    onnx.save(model, other)
    del model.metadata_props[:]
    onnx.save(model, foreign)
    table = {
        broken: "cannot be opened",
        foreign: "was not exported by",
        other: "was not exported by",
        tmp_path / "no.onnx": "not exist",
    }
    for path, text in table.items():
        with pytest.raises(ExportError, match=text):
            dsrcnn.load_exported(path)
    with pytest.raises(ExportError, match="is no ONNX file"):
        dsrcnn.load_exported(tmp_path / "model.pt2")
    with pytest.raises(ConfigError, match="load_exported"):
        dsrcnn.load(exported.path)


def test_the_command_exports_and_says_what(tmp_path, photos, capsys):
    save_model(tmp_path / "model_final.pth")
    model, output = str(tmp_path / "model_final.pth"), tmp_path / "model.torchscript"
    words = ["--model", model, "--output", str(output), "--images", str(photos), "--size"]
    assert main(["export", *words, "64", "96", "--nms", "--format", "torchscript"]) == 0
    text = capsys.readouterr().out
    assert "resized to fit 64 x 96" in text
    assert "NMS 0.7" in text
    assert "Compared on 5 images of the source" in text


def test_the_command_predicts_with_an_exported_model(exported, tmp_path, photos, capsys):
    words = ["predict", str(photos), "--model", str(exported.path), "--save", "csv"]
    assert main([*words, "--threshold", "0.05", "--output", str(tmp_path / "csv")]) == 0
    assert "5 images" in capsys.readouterr().out
    assert main([*words, "--device", "cpu"]) == 2
    assert "--device does not go with an exported model" in capsys.readouterr().err


def test_an_image_larger_than_the_canvas_gets_boxes_in_its_own_pixels(exported):
    loaded = dsrcnn.load_exported(exported.path)
    image = Image.fromarray(np.random.randint(0, 256, (640, 960, 3), dtype=np.uint8))
    small = loaded.predict(image.resize((96, 64), Image.Resampling.BILINEAR), threshold=0.05)
    large = loaded.predict(image, threshold=0.05)
    count = min(3, len(small), len(large))
    assert count
    np.testing.assert_allclose(large.boxes[:count] / 10, small.boxes[:count], atol=1)


def test_files_with_operators_of_torchvision_say_so(dynamic, photos, tmp_path, monkeypatch, caplog):
    options = {"size": (64, 96), "images": photos / "a.png"}
    dynamic.export(tmp_path / "plain.torchscript", "torchscript", **options)
    assert "torchvision" not in caplog.text
    monkeypatch.setattr("dsrcnn.export.model.has_deformable", lambda program: True)
    dynamic.export(tmp_path / "model.torchscript", "torchscript", **options)
    assert "model.torchscript has deformable convolutions of torchvision: import" in caplog.text
