"""``dsrcnn predict``: sources, files that it writes, summary, exit status."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
from conftest import ANIMALS, ENVIRONMENT, gray_frames, refusal, write_clip, write_coco
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dsrcnn.cli.main import main
from dsrcnn.errors import DataError
from dsrcnn.inference import Result
from dsrcnn.inference.saving import ResultsWriter


def predict(*words):
    return main(["predict", *map(str, words), "--device", "cpu"])


def test_a_folder_becomes_pictures_tables_and_a_coco_file(photos, model_file, tmp_path, capsys):
    words = ("--model", model_file, "--output", tmp_path / "out", "--save", "pictures,coco,csv")
    assert predict(photos, *words, "--threshold", "0") == 0
    printed = capsys.readouterr().out
    assert "\n5 images, " in f"\n{printed}"
    assert "images/s (ms: reading " in printed
    out = tmp_path / "out"
    pictures = sorted(p.name for p in (out / "pictures").iterdir())
    assert pictures == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    assert Image.open(out / "pictures/d.jpg").size == (100, 70)
    coco = json.loads((out / "detections.json").read_text())
    assert [x["name"] for x in coco["categories"]] == ANIMALS
    assert [x["file_name"] for x in coco["images"]][:2] == [f"{photos}/a.png", f"{photos}/b.jpg"]
    rows = list(csv.DictReader((out / "detections.csv").open()))
    assert len(rows) == len(coco["annotations"]) > 5
    x, _, width, _ = coco["annotations"][0]["bbox"]
    assert float(rows[0]["x2"]) == pytest.approx(x + width, abs=0.02)
    assert rows[0]["class"] == ANIMALS[int(rows[0]["label"])]


def test_results_with_the_ids_of_an_annotation_file(photos, model_file, tmp_path):
    content = {
        "images": [{"id": 10 * i, "file_name": n} for i, n in enumerate(("c.png", "a.png"), 1)],
        "categories": [{"id": 100 + i, "name": name} for i, name in enumerate(reversed(ANIMALS))],
    }
    (tmp_path / "gt.json").write_text(json.dumps(content))
    words = ("--model", model_file, "--output", tmp_path, "--save", "coco", "--threshold", "0")
    words += ("--annotations", tmp_path / "gt.json")
    assert predict(photos / "a.png", photos / "c.png", *words) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(dict.fromkeys(r["image_id"] for r in results)) == [20, 10]
    assert {r["category_id"] for r in results} <= set(range(100, 105))
    assert predict(photos / "b.jpg", *words) == 1


def test_originals_in_the_folder_of_the_pictures_are_not_overwritten(
    photos, model_file, tmp_path, capsys
):
    (tmp_path / "pictures").mkdir()
    original = tmp_path / "pictures/b.jpg"
    original.write_bytes((photos / "b.jpg").read_bytes())
    (tmp_path / "linked.jpg").symlink_to(original)
    before = original.read_bytes()
    for source in (tmp_path / "pictures", original, tmp_path / "linked.jpg"):
        words = (source, "--model", model_file, "--output", tmp_path)
        message = refusal(capsys, "predict", *map(str, words))
        assert "is the file" in message
        assert "which results may replace. Write another folder" in message
    assert original.read_bytes() == before
    assert predict(original, "--model", model_file, "--output", tmp_path, "--save", "csv") == 0


def test_a_video_that_is_a_source_is_not_overwritten_by_that_of_another(
    model_file, tmp_path, capsys
):
    write_clip(tmp_path / "a.mp4", gray_frames([10, 200]))
    write_clip(tmp_path / "a_predicted.mp4", gray_frames([10, 200]))
    before = (tmp_path / "a_predicted.mp4").read_bytes()
    sources = (tmp_path / "a.mp4", tmp_path / "a_predicted.mp4")
    words = (*sources, "--model", model_file, "--output", tmp_path)
    assert "which results may replace" in refusal(capsys, "predict", *map(str, words))
    assert (tmp_path / "a_predicted.mp4").read_bytes() == before


def test_a_second_job_leaves_out_the_pictures_of_the_first(
    photos, model_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes((photos / "a.png").read_bytes())
    for source in (".", ".", "**/*.[jp][pn]g"):
        assert predict(source, "--model", model_file) == 0
        assert "\n1 images, " in "\n" + capsys.readouterr().out
    (tmp_path / "a.png").unlink()
    message = refusal(capsys, "predict", ".", "--model", str(model_file))
    assert "no images but those in detections/pictures" in message


def test_a_job_leaves_out_the_pictures_of_jobs_with_another_output(
    photos, model_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes((photos / "a.png").read_bytes())
    for output in ("first", "deep/second", "third"):
        assert predict(".", "--model", model_file, "--output", output) == 0
        assert "\n1 images, " in "\n" + capsys.readouterr().out
    words = ("--model", model_file, "--output", "fourth", "--save", "csv")
    assert predict("first/pictures", *words) == 0  # named itself
    assert predict("first/../first/pictures/a.jpg", *words) == 0
    assert predict("first", "a.png", *words) == 0
    assert "\n1 images, " in "\n" + capsys.readouterr().out.splitlines()[-2]


def test_a_folder_in_place_of_a_file_is_found_before_the_work(photos, tmp_path, capsys):
    for name, kind in (("detections.csv", "csv"), ("detections.json", "coco")):
        (tmp_path / name).mkdir()
        words = (photos, "--model", "nowhere", "--output", tmp_path, "--save", kind)
        message = refusal(capsys, "predict", *map(str, words))
        assert f"where {name} is a folder, not a file" in message


def test_a_failed_job_keeps_the_results_of_an_earlier_one(photos, model_file, tmp_path, capsys):
    images = [{"id": 7, "file_name": "a.png"}]
    categories = [{"id": i, "name": name} for i, name in enumerate(ANIMALS)]
    (tmp_path / "gt.json").write_text(json.dumps({"images": images, "categories": categories}))
    words = ("--model", model_file, "--output", tmp_path / "out", "--save", "coco,csv")
    annotations = ("--annotations", tmp_path / "gt.json")
    assert predict(photos / "a.png", *words) == 0
    assert predict(photos / "a.png", *words, *annotations) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(before) == ["detections.csv", "detections.json", "results.json"]
    for more in ((), annotations):
        for failing in ((photos / "nope.jpg",), (photos, "--tta", "--tile", 64)):
            refusal(capsys, "predict", *map(str, (*failing, *words, *more)))
        after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert after == before
    only = ("--model", model_file, "--output", tmp_path / "out", "--save", "coco", *annotations)
    assert predict(photos / "b.jpg", *only) == 1  # has no id
    assert (tmp_path / "out/results.json").read_bytes() == before["results.json"]


def test_videos_become_videos_and_sources_may_stand_anywhere(photos, model_file, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", gray_frames(range(0, 240, 40)))
    words = (photos / "a.png", "--model", model_file, clip, "--output", tmp_path / "out")
    assert predict(*words, "INPUT.MIN_SIZE_TEST", "32", photos / "c.png") == 0
    capture = cv2.VideoCapture(str(tmp_path / "out/clip_predicted.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 6
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    assert sorted(p.name for p in (tmp_path / "out/pictures").iterdir()) == ["a.jpg", "c.jpg"]


def test_originals_in_a_folder_named_pictures_are_never_replaced(
    photos, model_file, tmp_path, capsys
):
    for place in ("pictures", "new"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "a.jpg").write_bytes((photos / "b.jpg").read_bytes())
    words = ("--model", model_file, "--output", tmp_path, "--save")
    for source in (tmp_path, tmp_path / "new"):
        message = refusal(capsys, "predict", *map(str, (source, *words, "pictures")))
        assert "Write another folder" in message
        assert "a.jpg" in message
    assert (tmp_path / "pictures/a.jpg").read_bytes() == (photos / "b.jpg").read_bytes()
    assert predict(tmp_path, *words, "csv") == 0
    assert "2 images" in capsys.readouterr().out


def test_sources_with_equal_names_do_not_replace_each_other(photos, model_file, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.png").write_bytes((photos / "a.png").read_bytes())
    words = ("--model", model_file, "--output", tmp_path / "out", "--save", "pictures")
    assert predict(photos / "a.png", tmp_path / "other/a.png", *words) == 0
    assert sorted(p.name for p in (tmp_path / "out/pictures").iterdir()) == ["a.jpg", "a_2.jpg"]


def test_frames_of_videos_with_equal_names_do_not_replace_each_other(model_file, tmp_path):
    clips = [tmp_path / folder / "clip.mp4" for folder in ("one", "two")]
    for clip in clips:
        clip.parent.mkdir()
        write_clip(clip, gray_frames([0, 0]))
    words = ("--model", model_file, "--output", tmp_path / "out", "--save", "pictures")
    assert predict(*clips, *words) == 0
    assert sorted(p.name for p in (tmp_path / "out/pictures").iterdir()) == [
        "clip_000000.jpg", "clip_000001.jpg", "clip_2_000000.jpg", "clip_2_000001.jpg",
    ]  # fmt: skip


def test_a_frame_and_an_image_with_its_name_are_two_pictures(photos, model_file, tmp_path):
    write_clip(tmp_path / "clip.mp4", gray_frames([0, 0]))
    (tmp_path / "clip_000001.png").write_bytes((photos / "a.png").read_bytes())
    words = ("--model", model_file, "--output", tmp_path / "out", "--save", "pictures")
    assert predict(tmp_path / "clip.mp4", tmp_path / "clip_000001.png", *words) == 0
    assert sorted(p.name for p in (tmp_path / "out/pictures").iterdir()) == [
        "clip_000000.jpg", "clip_000001.jpg", "clip_000001_2.jpg",
    ]  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are text elsewhere")
def test_names_in_another_encoding_are_written_as_they_are(photos, model_file, tmp_path):
    for name in (b"a.png", b"b_\xe4.png", b"c.png"):
        path = os.path.join(os.fsencode(tmp_path), name)
        with open(path, "wb") as file:
            file.write((photos / "a.png").read_bytes())
    words = ("--model", model_file, "--output", tmp_path / "out", "--save", "csv,coco,pictures")
    assert predict(tmp_path, *words, "--threshold", 0) == 0
    table = (tmp_path / "out/detections.csv").read_bytes()
    assert b"b_\xe4.png" in table
    assert b"c.png" in table
    assert len(list((tmp_path / "out/pictures").iterdir())) == 3
    assert len(json.loads((tmp_path / "out/detections.json").read_text())["images"]) == 3


def test_images_that_cannot_be_read_are_skipped_and_give_status_1(
    photos, model_file, tmp_path, capsys
):
    (tmp_path / "bad.jpg").write_text("no image")
    words = ("--model", model_file, "--output", tmp_path / "out", "--save", "csv")
    assert predict(photos / "a.png", tmp_path / "bad.jpg", *words) == 1
    assert "1 images" in (printed := capsys.readouterr().out)
    assert "1 skipped" in printed


def test_what_was_done_is_written_if_the_job_is_interrupted(
    photos, model_file, tmp_path, monkeypatch
):
    from dsrcnn.inference.predictor import Predictor

    stream = Predictor._stream

    def interrupted(self, source, settings):
        for i, result in enumerate(stream(self, source, settings)):
            if i == 2:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(Predictor, "_stream", interrupted)
    words = ("--model", model_file, "--output", tmp_path, "--save", "coco,csv", "--threshold", "0")
    assert predict(photos, *words) == 130
    assert len(json.loads((tmp_path / "detections.json").read_text())["images"]) == 2
    rows = list(csv.DictReader((tmp_path / "detections.csv").open()))
    assert len({row["image"] for row in rows}) == 2


def test_files_are_completed_if_the_job_is_ended_by_sigterm(model_file, tmp_path):
    clip = write_clip(tmp_path / "clip.mp4", gray_frames([0] * 2000))
    command = [sys.executable, "-m", "dsrcnn_command", "predict", clip, "--model", str(model_file)]
    command += ["--output", str(tmp_path / "out"), "--save", "video,coco,csv", "--device", "cpu"]
    with subprocess.Popen([*command, "--threshold", "0"], env=ENVIRONMENT) as process:
        try:
            table, end = tmp_path / "out/detections.csv", time.monotonic() + 120
            while not (table.is_file() and table.stat().st_size > 5000):
                assert time.monotonic() < end
                time.sleep(0.1)
            process.terminate()
            assert process.wait(60) == 128 + signal.SIGTERM
        finally:
            process.kill()
    images = json.loads((tmp_path / "out/detections.json").read_text())["images"]
    assert 5 < len(images) < 2000
    capture = cv2.VideoCapture(str(tmp_path / "out/clip_predicted.mp4"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == len(images)


def test_an_image_that_cannot_be_written_does_not_end_the_job(
    photos, model_file, tmp_path, capsys, monkeypatch
):
    save = Result.save

    def failing(result, path):
        if path.stem == "b":
            raise DataError("Picture b.jpg cannot be written.")
        return save(result, path)

    monkeypatch.setattr(Result, "save", failing)
    words = ("--model", model_file, "--output", tmp_path, "--save", "pictures,csv")
    assert predict(photos, *words) == 1
    assert "5 images" in (printed := capsys.readouterr().out)
    assert "1 not written" in printed
    names = [p.name for p in (tmp_path / "pictures").iterdir()]
    assert sorted(names) == ["a.jpg", "c.jpg", "d.jpg", "e.jpg"]


def test_a_file_whose_name_is_a_number_is_no_camera(photos, model_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024").mkdir()
    (tmp_path / "2024/a.png").write_bytes((photos / "a.png").read_bytes())
    assert predict("2024", "--model", model_file, "--output", "out", "--save", "pictures") == 0
    assert (tmp_path / "out/pictures/a.jpg").is_file()


def test_ids_follow_the_folders_of_the_annotations(photos, model_file, tmp_path):
    for folder in ("one", "two", "elsewhere"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes((photos / "a.png").read_bytes())
    images = [{"id": i, "file_name": f"{n}/a.png"} for i, n in enumerate(("one", "two"), start=1)]
    categories = [{"id": i, "name": name} for i, name in enumerate(ANIMALS)]
    (tmp_path / "gt.json").write_text(json.dumps({"images": images, "categories": categories}))
    words = ("--model", model_file, "--output", tmp_path, "--save", "coco")
    words += ("--annotations", tmp_path / "gt.json")
    assert predict(tmp_path / "two", tmp_path / "one", *words) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(dict.fromkeys(r["image_id"] for r in results)) == [2, 1]
    assert min(r["score"] for r in results) < 0.3  # metrics need all detections
    assert predict(tmp_path / "elsewhere", *words) == 1  # one/a.png or two/a.png?


@pytest.mark.parametrize(("entry", "paths", "ids"), [
    ("001.png", ["train/001.png", "val/001.png"], [7]),  # the second is another image
    ("001.png", ["train/001.png", "train/../train/001.png"], [7]),  # the same twice
    ("train/001.png", ["val/001.png"], []),
    ("train/001.png", ["train/001.png"], [7]),
    ("/moved/train/001.png", ["train/001.png"], [7]),
    ("/moved/train/001.png", ["val/001.png"], []),
    ("train\\001.png", ["train/001.png"], [7]),
])  # fmt: skip
def test_two_images_never_have_one_id(entry, paths, ids, tmp_path):
    content = {
        "images": [{"id": 7, "file_name": entry}], "categories": [{"id": 3, "name": "cat"}],
    }  # fmt: skip
    (tmp_path / "gt.json").write_text(json.dumps(content), encoding="utf-16")  # as data may be
    writer = ResultsWriter(tmp_path, ["cat"], tmp_path / "gt.json")
    box = (np.array([[1, 2, 5, 9]], np.float32), np.array([0.5], np.float32), np.array([0]))
    for number, path in enumerate(paths):
        result = Result(*box, classes=["cat"], size=(20, 20), path=str(tmp_path / path))
        is_known = number < len(ids)
        with nullcontext() if is_known else pytest.raises(DataError, match="in --annotations"):
            writer.write(result)
    written = writer.close()
    assert [r["image_id"] for p in written for r in json.loads(p.read_text())] == ids


def test_annotations_are_not_replaced_by_the_results(photos, model_file, tmp_path, capsys):
    content = {"images": [], "categories": [{"id": i, "name": n} for i, n in enumerate(ANIMALS)]}
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    words = (photos, "--model", model_file, "--output", tmp_path, "--save", "coco")
    message = refusal(capsys, "predict", *map(str, (*words, "--annotations", path)))
    assert "which the results would replace. Write another --output" in message
    assert json.loads(path.read_text()) == content


@pytest.mark.parametrize(("words", "message"), [
    ([], "write SOURCE: an image"), (["a.jpg"], "write --model, the output folder"),
    (["a.jpg", "--model", "nowhere"], "Config file 'nowhere' does not exist"),
    (["missing.jpg", "--model", "MODEL"], "Image missing.jpg does not exist"),
    (["missing.mp4", "--model", "MODEL"], "Video missing.mp4 does not exist"),
    (["a.jpg", "--model", "MODEL", "--save", "png"], "--save names 'png'; write some of pictures"),
    (["a.jpg", "--model", "MODEL", "--threshold", "high"], "'high' is not a number from 0 to 1"),
    (["a.jpg", "--model", "MODEL", "--threshold", "2"], "'2' is not a number from 0 to 1"),
    (["a.jpg", "--model", "MODEL", "--batch", "0"], "'0' is not a number of at least 1"),
    (["a.jpg", "--model", "MODEL", "--tile", "3"], "tile is 3; write a whole number from 16"),
    (["a.jpg", "--model", "MODEL", "--annotations", "missing.json", "--save", "coco"],
     "--annotations missing.json cannot be used"),
    (["a.jpg", "--model", "MODEL", "--annotations", "gt.json"],
     "--annotations gt.json needs --save coco, but --save is 'pictures,video,csv'"),
    (["a.jpg", "--model", "MODEL", "--whatever"], "unknown option --whatever"),
    (["a.jpg", "--model", "MODEL", "MODEL.DEVISE", "cpu"], "MODEL.DEVISE"),
])  # fmt: skip
def test_bad_input_is_one_line(words, message, model_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(model_file) if word == "MODEL" else word for word in words]
    assert message in refusal(capsys, "predict", *words)


def test_coco_results_evaluate_to_the_ap_of_an_evaluation(detector, model_file, tmp_path):
    images, path = tmp_path / "images/val", tmp_path / "annotations/instances_val.json"
    write_coco(path, images, count=6, classes=ANIMALS)
    # Some objects are detections, moved a little, so that the AP is neither 0 nor 100.
    content = json.loads(path.read_text())
    content["annotations"] = []
    for record in content["images"]:
        result = detector.predict(images / record["file_name"], threshold=0)
        for entry in result.to_coco(record["id"])[::2]:
            x, y, width, height = entry["bbox"]
            box = [x, y + 0.1 * height, width, height]
            number = len(content["annotations"]) + 1
            content["annotations"].append(
                {**entry, "id": number, "bbox": box, "area": width * height, "iscrowd": 0}
            )
    path.write_text(json.dumps(content))
    words = ("--model", model_file, "--output", tmp_path, "--save", "coco", "--threshold", "0")
    assert predict(images, *words, "--annotations", path) == 0
    truth = COCO(str(path))
    evaluation = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    data = {"DATASETS.CUSTOM.TEST_JSON": str(path), "DATASETS.CUSTOM.TEST_IMAGES": str(images)}
    metrics = detector.evaluate(**{"DATASETS.CUSTOM.NAME": "parity", **data})["bbox"]
    assert 5 < metrics["AP"] < 95
    assert 100 * evaluation.stats[0] == pytest.approx(metrics["AP"], abs=0.01)
    assert 100 * evaluation.stats[1] == pytest.approx(metrics["AP50"], abs=0.01)
