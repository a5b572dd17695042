"""Prediction: batches, tiles, stages, settings; results of every kind of source."""

import json
import threading
import time

import cv2
import numpy as np
import pytest
import torch
from conftest import ANIMALS, save_model, tiny_cfg, write_coco
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from PIL import Image

import dsrcnn
from dsrcnn.errors import ConfigError, DataError, WeightsError


def same(a, b, atol=1e-4):
    assert len(a) == len(b)
    np.testing.assert_array_equal(a.labels, b.labels)
    np.testing.assert_allclose(a.scores, b.scores, atol=atol)
    np.testing.assert_allclose(a.boxes, b.boxes, atol=100 * atol)


def test_results_of_arrays_equal_detectron2s_predictor(detector, photos):
    cfg = detector.cfg.clone()
    image = cv2.imread(str(photos / "d.PNG"))
    expected = DefaultPredictor(cfg)(image)["instances"].to("cpu")
    result = detector.predict(image, bgr=True, threshold=0)
    assert len(result) == len(expected) > 3
    np.testing.assert_allclose(result.boxes, expected.pred_boxes.tensor.numpy(), atol=1e-3)
    np.testing.assert_allclose(result.scores, expected.scores.numpy(), atol=1e-5)
    assert result.labels.tolist() == expected.pred_classes.tolist()
    assert result.size == image.shape[:2]
    assert result.names == [ANIMALS[label] for label in result.labels]


def test_every_kind_of_source_of_an_image_gives_the_same_result(detector, photos):
    path = photos / "a.png"
    image = Image.open(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = detector.predict(str(path), threshold=0)
    assert expected.path == str(path)
    for source in (path, image, array, tensor, tensor / 255):
        same(detector.predict(source, threshold=0), expected)
    same(detector.predict(array[..., ::-1], bgr=True, threshold=0), expected)
    for several in ([path], np.stack([array]), str(photos / "a*.png"), iter([image])):
        (result,) = detector.predict(several, threshold=0)
        same(result, expected)


@pytest.mark.parametrize("batch", [2, 3, 8])
def test_batches_of_images_of_any_shape_give_the_results_of_single_images(detector, photos, batch):
    alone = [detector.predict(photos / n, threshold=0) for n in ("a.png", "b.jpg", "c.png")]
    results = detector.predict(photos, batch=batch, threshold=0)
    assert [r.path for r in results[:3]] == [r.path for r in alone]
    for result, expected in zip(results, alone, strict=False):
        same(result, expected)


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("batch", [None, 1, 4])
@pytest.mark.parametrize(
    "kind", ["paths", "folder", "pattern", "PIL", "arrays", "tensors", "video"]
)
def test_results_do_not_depend_on_kind_batch_and_device(
    detector, model_file, photos, tmp_path, kind, batch, device
):
    paths = [photos / name for name in ("a.png", "b.jpg", "c.png")]
    images = [Image.open(path).convert("RGB") for path in paths]
    if kind == "folder":
        for path, image in zip(paths, images, strict=True):
            image.save(tmp_path / f"{path.stem}.png")
    elif kind == "video":
        writer = cv2.VideoWriter(
            str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"FFV1"), 5, images[0].size
        )
        images = [image.resize(images[0].size) for image in images]
        for image in images:
            writer.write(np.asarray(image)[..., ::-1])
        writer.release()
    source = {
        "paths": paths,
        "folder": tmp_path,
        "pattern": str(photos / "[abc].*"),
        "PIL": images,
        "arrays": [np.asarray(image) for image in images],
        "tensors": [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images],
        "video": tmp_path / "clip.avi",
    }[kind]
    expected = [detector.predict(np.asarray(image), threshold=0.1) for image in images]
    if device != "cpu":
        detector = dsrcnn.load(model_file, device=device)
    results = detector.predict(source, batch=batch, threshold=0.1, stages=kind == "paths")
    assert len(results) == len(expected)
    for result, of_image in zip(results, expected, strict=True):
        same(result, of_image, atol=1e-4 if device == "cpu" else 1e-3)


def test_scores_below_the_threshold_and_more_than_the_limit_are_left_out(detector, photos):
    path = photos / "a.png"
    full = detector.predict(path, threshold=0)
    middle = float(full.scores[len(full) // 2])
    result = detector.predict(path, threshold=middle)
    assert len(result) == (full.scores >= middle).sum() < len(full)
    best = detector.predict(path, threshold=0, max_detections=3)
    assert best.scores.tolist() == full.scores[:3].tolist()


def test_more_detections_than_the_config_allows(photos, tmp_path):
    save_model(tmp_path / "model.pth", "TEST.DETECTIONS_PER_IMAGE", 2)
    detector = dsrcnn.load(tmp_path / "model.pth", device="cpu")
    path = photos / "a.png"
    assert len(detector.predict(path, threshold=0)) == 2
    assert len(detector.predict(path, threshold=0, max_detections=6)) == 6


def test_the_size_of_the_network_input_can_be_chosen(detector, photos, monkeypatch):
    sizes = []
    preprocess = detector.model.preprocess_image

    def record(inputs):
        sizes.append(tuple(inputs[0]["image"].shape[1:]))
        return preprocess(inputs)

    monkeypatch.setattr(detector.model, "preprocess_image", record)
    detector.predict(photos / "a.png")
    detector.predict(photos / "a.png", size=96)
    detector.predict(np.zeros((64, 640, 3), np.uint8), size=32)
    assert sizes == [(64, 96), (96, 144), (6, 64)]  # the longer side at most 128 * 32 / 64


def test_stages_are_the_detections_of_every_stage(detector, photos):
    path = photos / "a.png"
    result = detector.predict(path, threshold=0, stages=True)
    assert len(result.stages) == 2
    last = result.stages[-1]
    np.testing.assert_array_equal(last.boxes, result.boxes)
    assert not np.array_equal(result.stages[0].boxes, last.boxes)
    assert detector.predict(path).stages is None


def test_with_an_early_exit_stages_end_with_the_one_that_predicts(photos, tmp_path):
    save_model(tmp_path / "model.pth", "MODEL.SparseRCNN.INFERENCE_STAGES", 1)
    detector = dsrcnn.load(tmp_path / "model.pth", device="cpu")
    path = photos / "a.png"
    result = detector.predict(path, threshold=0, stages=True)
    assert len(result.stages) == 1
    same(result, detector.predict(path, threshold=0))


def test_tiles_of_the_whole_image_change_nothing_and_small_ones_find_more(detector, photos):
    path = photos / "d.PNG"
    whole = detector.predict(path, threshold=0)
    tiled = detector.predict(path, threshold=0, tile=200)
    assert set(tiled.scores.round(4)) <= set(whole.scores.round(4))
    small = detector.predict(path, threshold=0, tile=50)
    assert (small.boxes[:, 2] <= 100).all()
    assert (small.boxes[:, 3] <= 70).all()
    assert (small.boxes[:, 2] > 60).any()  # beyond the first tile
    assert (np.diff(small.scores) <= 0).all()


def test_a_large_image_is_predicted_in_tiles_of_the_batch(detector, monkeypatch):
    shapes = []
    run = detector._run

    def record(items, settings, **threads):
        shapes.append([tuple(x.record["image"].shape) for x in items])
        return run(items, settings, **threads)

    monkeypatch.setattr(detector, "_run", record)
    image = np.zeros((300, 3000, 3), np.uint8)
    detector.predict(image, tile=300, overlap=0.1, batch=4)
    assert all(len(batch) <= 4 for batch in shapes)
    assert {s for batch in shapes for s in batch} == {(3, 64, 64)}


def test_test_time_augmentation_is_an_option(tmp_path, photos):
    save_model(
        tmp_path / "model.pth", "TEST.AUG.MIN_SIZES", (64, 96), "TEST.AUG.SCALE_FILTER", False
    )
    detector = dsrcnn.load(tmp_path / "model.pth", device="cpu")
    result = detector.predict(photos / "a.png", tta=True, threshold=0)
    assert len(result) > 0
    assert (result.boxes[:, 2] <= 96).all()


def test_images_that_cannot_be_read_are_reported_and_left_out(detector, photos, tmp_path, caplog):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    sources = [photos / "a.png", broken, np.zeros((4, 4)), photos / "c.png"]
    results = detector.predict(sources)
    assert [r.path for r in results] == [str(photos / "a.png"), str(photos / "c.png")]
    assert len(detector.skipped) == 2
    assert f"Skipped: Image {broken} cannot be read" in caplog.text
    detector.predict(photos)
    assert detector.skipped == []
    for source in (broken, [broken]):
        with pytest.raises(DataError, match=r"broken.jpg cannot be read"):
            detector.predict(source)


def test_a_stream_reads_few_images_ahead(detector, photos, monkeypatch):
    read = []

    def images():
        for i in range(100):
            read.append(i)
            yield np.zeros((64, 64, 3), np.uint8)

    stream = detector.predict(images(), batch=1, stream=True)
    next(stream)
    stream.close()
    assert len(read) < 20


@pytest.mark.parametrize(("settings", "words"), [
    ({"threshold": 1.5}, "threshold is 1.5; write a number from 0 to 1"),
    ({"threshold": None}, "threshold is None"), ({"overlap": None}, "overlap is None"),
    ({"batch": 1.5}, "batch is 1.5; write a whole number"), ({"tile": 64.5}, "tile is 64.5"),
    ({"tta": True, "size": 64}, "tta cannot be combined with size"),
    ({"tta": True, "max_detections": 5}, "tta cannot be combined with max_detections"),
    ({"tile": 64, "stages": True}, "tile cannot be combined with stages"),
    ({"threshold": "high"}, "threshold is 'high'"), ({"batch": 0}, "batch is 0"),
    ({"threshold": float("nan")}, "threshold is nan"), ({"size": -3}, "size is -3"),
    ({"tile": 3}, "tile is 3"), ({"overlap": 1}, "overlap is 1"),
    ({"max_detections": 0}, "max_detections is 0"), ({"batch": True}, "batch is True"),
    ({"tta": True, "stages": True}, "tta cannot be combined"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(detector, settings, words):
    with pytest.raises(ConfigError, match=words):
        detector.predict("a.jpg", **settings)


def test_numbers_of_numpy_are_settings(detector, photos):
    settings = {"threshold": np.float32(0.25), "batch": np.int64(2), "max_detections": np.int64(3)}
    assert len(detector.predict(photos / "a.png", **settings)) <= 3


def test_a_bad_entry_of_a_pattern_is_left_out(detector, photos, tmp_path):
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes((photos / "a.png").read_bytes())
    (tmp_path / "b").mkdir()  # without images
    (tmp_path / "b.mp4").write_text("no video")
    for source in (str(tmp_path / "*"), [str(tmp_path / "*")]):
        results = detector.predict(source)
        assert [r.path for r in results] == [str(tmp_path / n) for n in ("a.png", "c.png")]
        assert len(detector.skipped) == 2


def test_pixels_of_large_files_are_not_kept_but_read_again(detector, photos, monkeypatch):
    monkeypatch.setattr("dsrcnn.inference.predictor._KEPT_PIXELS", 5000)
    small, large = photos / "a.png", photos / "d.PNG"  # 96 x 64 and 100 x 70
    assert 96 * 64 > 5000
    for settings in ({}, {"tile": 64}):
        for path in (small, large):
            (result,) = detector.predict([path], stream=True, **settings)
            assert result._image is None
            assert result.image.shape[:2] == result.size
    monkeypatch.setattr("dsrcnn.inference.predictor._KEPT_PIXELS", 6500)
    (kept,) = detector.predict([small], stream=True)
    assert kept._image is not None


def test_predictions_in_several_threads_do_not_share_errors(detector, photos, tmp_path):
    (tmp_path / "bad.jpg").write_text("no image")
    kinds = []

    def predict(path):
        for _ in range(30):
            try:
                detector.predict(path)
            except Exception as error:
                kinds.append(type(error))

    paths = (tmp_path / "bad.jpg", photos / "a.png")
    threads = [threading.Thread(target=predict, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert kinds == [DataError] * 30


def test_on_a_cpu_images_run_side_by_side_with_the_same_results(detector, photos, monkeypatch):
    expected = detector.predict(photos, threshold=0)
    tiled = detector.predict(photos, tile=64, threshold=0)
    forward, running, most = detector.model.raw_predictions, [], []

    def slow(*args, **options):
        running.append(torch.get_num_threads())
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return forward(*args, **options)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(detector.model, "raw_predictions", slow)
    try:
        results = detector.predict([photos] * 3, threshold=0)
        for result, of_image in zip(results, expected * 3, strict=True):
            same(result, of_image)
        assert max(most) == 3
        for result, of_image in zip(
            detector.predict(photos, tile=64, threshold=0), tiled, strict=True
        ):
            same(result, of_image)
        assert torch.get_num_threads() == 3
        most.clear()
        detector.predict(photos / "a.png")
        assert most == [1]
    finally:
        torch.set_num_threads(before)


def test_frames_of_a_video_are_decoded_ahead_and_stay_in_order(detector, tmp_path):
    clip = tmp_path / "clip.mp4"
    writer = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    for i in range(20):
        writer.write(np.full((48, 64, 3), 10 * i, np.uint8))
    writer.release()
    results = list(detector.predict(clip, stream=True))
    assert [r.frame for r in results] == list(range(20))
    assert [round(float(r.image.mean()) / 10) for r in results] == list(range(20))
    before = threading.active_count()
    stream = detector.predict(clip, stream=True)
    next(stream)
    stream.close()
    assert threading.active_count() <= before


def test_a_camera_needs_a_stream(detector):
    with pytest.raises(ConfigError, match="A camera has no end; write stream=True"):
        detector.predict(0)


def test_detectors_without_cascade_predict_but_have_no_stages(tmp_path, photos):
    opts = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", 64, "MODEL.WEIGHTS", ""]
    cfg = dsrcnn.load_cfg("quick/faster_rcnn_shapes", opts)
    model = dsrcnn_model(cfg)
    torch.save({"model": model.state_dict(), "config": cfg.dump()}, tmp_path / "model.pth")
    detector = dsrcnn.load(tmp_path / "model.pth")
    assert detector.predict(photos / "a.png", threshold=0).size == (64, 96)
    with pytest.raises(ConfigError, match="stages needs a cascade; GeneralizedRCNN has none"):
        detector.predict(photos / "a.png", stages=True)
    with pytest.raises(ConfigError, match="max_detections is a setting of sparse detectors"):
        detector.predict(photos / "a.png", max_detections=5)


def dsrcnn_model(cfg: CfgNode) -> torch.nn.Module:
    from detectron2.modeling import build_model

    return build_model(cfg)


def test_a_detector_is_fine_tuned_and_evaluated_on_a_folder(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / "cells"
        names = (folder / f"annotations/instances_{split}.json", folder / f"images/{split}")
        write_coco(*names, 3, seed=int(split == "val"))
    opts = ("SOLVER.IMS_PER_BATCH", 2, "INPUT.MIN_SIZE_TRAIN", (64,), "LOG.IMAGES", 0)
    save_model(tmp_path / "model.pth", *opts)
    detector = dsrcnn.load(tmp_path / "model.pth", device="cpu")
    overrides = {"SOLVER.MAX_ITER": 2, "TEST.EVAL_PERIOD": 0, "SOLVER.STEPS": (1,)}
    trained = detector.train(folder, output=str(tmp_path / "out"), **overrides)
    assert trained.classes == ["left", "right"]
    assert (tmp_path / "out/model_final.pth").is_file()
    assert "AP-left" in trained.evaluate(folder)["bbox"]
    assert detector.classes == ANIMALS  # the first one stays as it was


def test_a_run_folder_a_weight_file_and_a_config_with_weights_are_the_same_model(
    tmp_path, model_file, photos
):
    run = tmp_path / "run"
    run.mkdir()
    cfg = save_model(run / "model_final.pth")
    (run / "config.yaml").write_text(cfg.dump())
    expected = dsrcnn.load(model_file, device="cpu").predict(photos / "a.png", threshold=0)
    state = torch.load(model_file)["model"]
    bare = tmp_path / "bare.pth"
    torch.save(state, bare)
    for model, weights in ((run, None), (run / "config.yaml", bare)):
        detector = dsrcnn.load(model, weights, device="cpu")
        same(detector.predict(photos / "a.png", threshold=0), expected)
    assert detector.classes == ["0", "1", "2", "3", "4"]  # the file does not say
    with pytest.raises(WeightsError, match=r"nowhere.pth"):
        dsrcnn.load(run, device="cpu", opts=["MODEL.WEIGHTS", "nowhere.pth"])
    for more in ({"weights": bare}, {"opts": ["MODEL.WEIGHTS", str(bare)]}):
        with pytest.raises(ConfigError, match="is a weight file, so other weights are too many"):
            dsrcnn.load(model_file, device="cpu", **more)


def test_a_detector_is_evaluated_on_the_data_of_its_run(tmp_path, model_file):
    run = tmp_path / "run"
    run.mkdir()
    save_model(run / "model_final.pth")
    annotations, images = tmp_path / "val.json", tmp_path / "images"
    write_coco(annotations, images)
    content = json.loads(annotations.read_text())
    content["categories"] = [{"id": i, "name": name} for i, name in enumerate(ANIMALS, start=1)]
    annotations.write_text(json.dumps(content))
    data = {"TEST_JSON": str(annotations), "TEST_IMAGES": str(images), "NAME": "of_the_run"}
    opts = [word for key, value in data.items() for word in (f"DATASETS.CUSTOM.{key}", value)]
    cfg = tiny_cfg("INPUT.MIN_SIZE_TEST", 64, "DATASETS.TRAIN", (), *opts)
    (run / "config.yaml").write_text(cfg.dump())
    metrics = dsrcnn.load(run, device="cpu").evaluate(**{"OUTPUT_DIR": str(run)})
    assert "AP-cat" in metrics["bbox"]
    with pytest.raises(DataError, match="There is no test set; give a folder"):
        dsrcnn.load(model_file, device="cpu").evaluate(**{"DATASETS.TEST": ()})


def test_averaged_weights_and_safetensors_are_read(tmp_path, photos, model_file):
    from safetensors.torch import save_file

    content = torch.load(model_file)
    config = tmp_path / "config.yaml"
    config.write_text(content["config"])
    packed = {k: v.contiguous() for k, v in content["model"].items()}
    save_file(packed, tmp_path / "model.safetensors")
    zeros = {k: torch.zeros_like(v) for k, v in content["model"].items()}
    averaged = {"model": zeros, "ema": {"model": content["model"]}}
    torch.save(averaged, tmp_path / "model.pth")
    expected = dsrcnn.load(model_file, device="cpu").predict(photos / "a.png", threshold=0)
    for name, opts in (("model.safetensors", []), ("model.pth", ["MODEL.EMA.ENABLED", True])):
        detector = dsrcnn.load(config, tmp_path / name, device="cpu", opts=opts)
        same(detector.predict(photos / "a.png", threshold=0), expected)


def test_the_number_of_classes_comes_from_the_weights_if_the_config_leaves_it_to_the_data(
    tmp_path, photos, model_file
):
    content = torch.load(model_file)
    config = tmp_path / "config.yaml"
    config.write_text(content["config"].replace("NUM_CLASSES: 5", "NUM_CLASSES: 0"))
    detector = dsrcnn.load(config, model_file, device="cpu")
    assert detector.classes == ANIMALS
    del content["classes"]
    torch.save(content, tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 0, from the data, and .* has no class"):
        dsrcnn.load(config, tmp_path / "bare.pth")


def test_names_of_the_coco_classes_are_known_to_owners_of_official_weights(tmp_path):
    opts = ["MODEL.SparseRCNN.NUM_CLASSES", 80]
    cfg = save_model(tmp_path / "model.pth", *opts)
    state = torch.load(tmp_path / "model.pth")["model"]
    torch.save({"model": state}, tmp_path / "official.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    detector = dsrcnn.load(tmp_path / "config.yaml", tmp_path / "official.pth", device="cpu")
    assert detector.classes[:3] == ["person", "bicycle", "car"]


@pytest.mark.parametrize(("model", "weights", "error", "words"), [
    ("no_such_model", None, ConfigError, "Config file 'no_such_model' does not exist"),
    ("coco/sparse_rcnn_R50_100pro_3x", None, ConfigError, "is a config; give weights, too"),
    ("{tmp}", None, ConfigError, "config.yaml does not exist. Give the output folder"),
    ("{tmp}/missing.pth", None, WeightsError, "do not exist"),
    ("{tmp}/bare.pth", None, WeightsError, "has weights but no config"),
    ("coco/sparse_rcnn_R50_100pro_3x", "{tmp}/bare.pth", WeightsError, "weights do not fit"),
])  # fmt: skip
def test_models_that_cannot_be_loaded_are_one_error(tmp_path, model, weights, error, words):
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "bare.pth")
    paths = [x and x.format(tmp=tmp_path) for x in (model, weights)]
    with pytest.raises(error, match=words):
        dsrcnn.load(*paths, device="cpu")
