"""Prediction: batches, tiles, stages, settings; results of every kind of source."""

import threading
import time

import cv2
import numpy as np
import pytest
import torch
from comparing import same
from conftest import ANIMALS, gray_frames, save_model, write_clip
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

import dsrcnn
from dsrcnn.errors import ConfigError, DataError


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
        images = [image.resize(images[0].size) for image in images]
        frames = [np.asarray(image)[..., ::-1] for image in images]
        write_clip(tmp_path / "clip.avi", frames, codec="FFV1")
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
    same(tiled, whole)
    small = detector.predict(path, threshold=0, tile=50)
    assert (small.boxes[:, 2] <= 100).all()
    assert (small.boxes[:, 3] <= 70).all()
    assert (small.boxes[:, 2] > 60).any()  # beyond the first tile
    assert (np.diff(small.scores) <= 0).all()


def test_the_limit_of_detections_is_that_of_a_tile_unless_it_is_given(model_file, photos):
    detector = dsrcnn.load(model_file, device="cpu", opts=["TEST.DETECTIONS_PER_IMAGE", 5])
    image = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    assert len(detector.predict(image, threshold=0)) == 5
    assert len(detector.predict(image, threshold=0, tile=100)) > 10
    assert len(detector.predict(image, threshold=0, tile=100, max_detections=4)) == 4


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


def test_a_single_image_runs_on_all_cores_in_the_thread_that_calls(detector, photos, monkeypatch):
    """In a thread of its own OpenMP would leave the other cores asleep."""
    forward, seen = detector.model.inference, []

    def note(*args, **options):
        seen.append((threading.current_thread(), torch.get_num_threads()))
        return forward(*args, **options)

    monkeypatch.setattr(detector.model, "inference", note)
    detector.predict(photos / "a.png")
    assert seen == [(threading.current_thread(), torch.get_num_threads())]


def test_on_a_cpu_images_run_side_by_side_with_the_same_results(detector, photos, monkeypatch):
    expected = detector.predict(photos, threshold=0)
    tiled = detector.predict(photos, tile=64, threshold=0)
    forward, running, most = detector.model.inference, [], []

    def slow(*args, **options):
        running.append(torch.get_num_threads())
        most.append(len(running))
        time.sleep(0.05)
        running.pop()
        return forward(*args, **options)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(detector.model, "inference", slow)
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
    clip = write_clip(tmp_path / "clip.mp4", gray_frames(range(0, 200, 10)))
    results = list(detector.predict(clip, stream=True))
    assert [r.frame for r in results] == list(range(20))
    assert [round(float(r.image.mean()) / 10) for r in results] == list(range(20))
    before = threading.active_count()
    stream = detector.predict(clip, stream=True)
    next(stream)
    stream.close()
    assert threading.active_count() <= before


def test_detectors_without_cascade_predict_but_have_no_stages(tmp_path, photos):
    opts = ["MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", 64, "MODEL.WEIGHTS", ""]
    cfg = dsrcnn.load_cfg("quick/faster_rcnn_shapes", opts)
    model = build_model(cfg)
    torch.save({"model": model.state_dict(), "config": cfg.dump()}, tmp_path / "model.pth")
    detector = dsrcnn.load(tmp_path / "model.pth")
    assert detector.predict(photos / "a.png", threshold=0).size == (64, 96)
    with pytest.raises(ConfigError, match="stages needs a cascade; GeneralizedRCNN has none"):
        detector.predict(photos / "a.png", stages=True)
    with pytest.raises(ConfigError, match="max_detections is a setting of sparse detectors"):
        detector.predict(photos / "a.png", max_detections=5)
