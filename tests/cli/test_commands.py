"""``dsrcnn <command>``."""

import csv
import json
import re
import sys

import cv2
import pytest
from conftest import QUICK, SMALL, coco_options, refusal, run_program

import dsrcnn_command
from dsrcnn.cli.main import main
from dsrcnn.engine.main import run

NODE = "MODEL.SparseRCNN"
RECOLLECTION = ["draw", "recollection", *QUICK, "--output", "x", *SMALL]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The folder of a short run."""
    folder = tmp_path_factory.mktemp("run")
    options = [*coco_options(folder / "data"), "LOG.IMAGES", "0"]
    options += [*SMALL, "OUTPUT_DIR", str(folder / "out"), *QUICK]  # options after the pairs
    assert main(["train", *options]) == 0
    return folder / "out"


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["draw", "--help"], []])
def test_help_and_version_need_no_import(words):
    code = f"import sys, dsrcnn_command as c; c.main({words}); print('torch' in sys.modules)"
    printed = run_program(sys.executable, "-c", code)
    assert printed.endswith("False\n")
    names = {0: dsrcnn_command.COMMANDS, 2: dsrcnn_command.DRAWINGS}.get(len(words), ())
    assert all(re.search(rf"^  {name} ", printed, re.MULTILINE) for name in names)
    if words == ["--version"]:
        assert re.match(r"dsrcnn \d+\.\d+", printed)


@pytest.mark.parametrize(("words", "message"), [
    (["evl"], "unknown command 'evl'; did you mean eval?"),
    (["draw", "assignments"], "unknown drawing 'assignments'; did you mean assignment"),
    (["draw", "predictions", *QUICK, "--output", "x", "--imges", "2"], "option --imges"),
    (["draw", "predictions", *QUICK, "--output", "x", "--images", "0"], "'0' is not a number"),
    (["draw", "predictions", "nothing"], "nothing/config.yaml does not exist"),
    (["draw", "predictions"], "write RUN, the output folder of a training"),
    (["draw", "predictions", *QUICK], "write --output"),
    (["draw", "predictions", "--config-file", "nothing", "--output", "x"], "'nothing' does not"),
    (["draw", "assignment", *QUICK, "--output", "x", *SMALL], "random weights"),
    (["draw", "proposals", *QUICK, "--output", "x", *SMALL], "DPG.ENABLED is False"),
    (["draw", "anchors", *QUICK, "--output", "x", *SMALL], "META_ARCHITECTURE is SparseRCNN"),
    ([*RECOLLECTION, f"{NODE}.NUM_HEADS", "1"], "NUM_HEADS is 1"),
    ([*RECOLLECTION, f"{NODE}.DEEP_SUPERVISION", "False"], "Write True"),
    (["eval", *QUICK, "MODLE.DEVICE", "cpu"], "Did you mean MODEL.DEVICE"),
    (["train", "MODEL.DEVICE", "cpu", "--eval-only"], "unknown option --eval-only"),
    (["train"], "write --config-file"),
    (["eval", "x", "--checkpoints", "last"], "'last' is neither all nor numbers"),
    (["weights", "in.pth"], "the following arguments are required: output"),
    (["check-data", "."], "none of the known layouts"),
    (["check-data", ".", "--output", "sheet"], "ends in one of .png"),
    (["check-data", "folder", "more"], "more"),
])  # fmt: skip
def test_invalid_input_is_one_message(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *words)


def test_a_run_folder_is_evaluated(output, capsys):
    saved = (output / "config.yaml").read_text()
    words = ["TEST.DETECTIONS_PER_IMAGE", "3", str(output), "MODEL.DEVICE", "cpu"]
    assert main(["eval", *words]) == 0
    results = json.loads((output / "inference/coco_instances_results.json").read_text())
    assert 0 < len(results) <= 3 * 4  # of the 8 proposals of each image
    assert (output / "config.yaml").read_text() == saved
    assert capsys.readouterr().out.count("AP50") == 1


def test_all_checkpoints_of_a_run_or_some_are_evaluated(tmp_path, capsys):
    options = ["--config-file", "quick/sparse_rcnn_shapes", *coco_options(tmp_path / "data")]
    options += [*SMALL, "LOG.IMAGES", "0", "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2"]
    options += ["TEST.EVAL_PERIOD", "2"]
    out = tmp_path / "out"
    assert main(["train", *options, "OUTPUT_DIR", str(out)]) == 0
    trained = [entry["bbox/AP"] for entry in metrics(out) if "bbox/AP" in entry]
    assert main(["eval", str(out), "--checkpoints", "all"]) == 0
    rows = read_table(out / "checkpoints.csv")
    found = {int(row["iteration"]): float(row["bbox/AP"]) for row in rows}
    assert list(found) == [1, 3]
    assert list(found.values()) == pytest.approx(trained, nan_ok=True)
    assert cv2.imread(str(out / "checkpoints.png")).shape[0] > 300
    assert "bbox/AP50" in capsys.readouterr().out
    views = ["TEST.AUG.ENABLED", "True", "TEST.AUG.SCALE_FILTER", "False"]
    views += ["TEST.AUG.MIN_SIZES", "(64,)"]
    assert main(["eval", str(out), "--checkpoints", "3", *views]) == 0
    row = read_table(out / "checkpoints.csv")[0]
    assert float(row["bbox/AP"]) == pytest.approx(found[3], nan_ok=True)
    assert "bbox_TTA/AP" in row
    assert main(["eval", str(out), "--checkpoints", "1"]) == 0
    assert [row["iteration"] for row in read_table(out / "checkpoints.csv")] == ["1"]
    detections = [(out / "inference/coco_instances_results.json").read_text()]
    for number in (1, 3):
        assert (
            main(["eval", str(out), "MODEL.WEIGHTS", str(out / f"model_000000{number}.pth")]) == 0
        )
        detections.append((out / "inference/coco_instances_results.json").read_text())
    assert detections[0] == detections[1] != detections[2]
    assert "has 1, 3; write some" in refusal(capsys, "eval", str(out), "--checkpoints", "1,2")
    refused = refusal(capsys, "eval", str(out), "--checkpoints", "1", "--report")
    assert "exclude each other" in refused


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


def read_table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_folder_is_a_model_with_its_best_weights(output, tmp_path, capsys):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.yaml", "model_best.pth", "model_final.pth"):
        (moved / name).write_bytes((output / name).read_bytes())
    arguments = ["draw", "predictions", str(moved), "MODEL.DEVICE", "cpu", "--images", "3"]
    assert main(arguments) == 0
    assert len(list((moved / "predictions").glob("*.png"))) == 3
    assert f"3 pictures in {moved / 'predictions'}" in capsys.readouterr().out
    (moved / "model_best.pth").write_bytes(b"broken")  # the best weights are preferred
    assert "model_best.pth' cannot be read" in refusal(capsys, *arguments)
    (moved / "model_best.pth").unlink()
    (moved / "model_final.pth").rename(moved / "model_0000001.pth")
    assert main(arguments) == 0
    (moved / "model_0000001.pth").unlink()
    assert "has no model_*.pth" in refusal(capsys, *arguments)


def test_the_demo_trains_draws_and_prints_where_everything_is(tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", "--images", "2", *SMALL, "OUTPUT_DIR", str(output)]) == 0
    printed = capsys.readouterr().out
    for name in ("predictions", "curves.png", "metrics.json", "log.txt", "model_final.pth"):
        assert (output / name).exists(), name
        assert str(output / name) in printed
    pictures = sorted((output / "predictions").glob("*.png"))
    assert [p.stem for p in pictures] == ["00000_0", "00199_199"]  # first and last of shapes_val
    assert cv2.imread(str(pictures[0])).shape[1] > 600


def test_assignments_are_drawn_by_matcher_and_stage(output, tmp_path):
    arguments = ["draw", "assignment", str(output), "--images", "2", "--output", str(tmp_path)]
    assert main(arguments) == 0
    pictures = [cv2.imread(str(p)) for p in tmp_path.glob("*.png")]
    assert len(pictures) == 2
    assert all(p.shape[0] > 2 * 240 and p.shape[1] > 2 * 240 for p in pictures)  # 2 rows, 2 stages


def test_proposals_of_a_dpg_model_are_drawn_with_statistics(tmp_path, capsys):
    options = [*coco_options(tmp_path), f"{NODE}.DPG.ENABLED", "True", "OUTPUT_DIR", str(tmp_path)]
    assert run([*QUICK, *SMALL, *options]) == 0
    arguments = ["draw", "proposals", str(tmp_path), "--images", "3", "--permutations", "3"]
    assert main([*arguments, "--num-images", "4"]) == 0
    printed = capsys.readouterr().out
    for name in ("proposals.png", "weights.png", "curves.png", "permutations.png"):
        assert str(tmp_path / "proposals" / name) in printed
        assert cv2.imread(str(tmp_path / "proposals" / name)).std() > 5
    assert "entropy" in printed
    assert "variation" in printed
    assert "own is lower by deviations" in printed


def test_anchors_of_asag_are_drawn_by_level(tmp_path, capsys):
    options = ["MODEL.ASAG.ANCHORS.HIDDEN", "32", "MODEL.AdaMixer.IN_POINTS", "4"]
    options += [*coco_options(tmp_path), "OUTPUT_DIR", str(tmp_path)]
    assert run(["--config-file", "quick/asag_a_shapes", *SMALL, *options]) == 0
    assert main(["draw", "anchors", str(tmp_path), "--images", "3"]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "anchors/anchors.png") in printed
    assert "patches of P4" in printed
    picture = cv2.imread(str(tmp_path / "anchors/anchors.png"))
    assert picture.shape[0] > 3 * 240  # a row for every image
    assert picture.shape[1] > 3 * 240  # three levels


def test_augmented_images_are_drawn_without_weights(tmp_path, capsys):
    mosaic = ["INPUT.AUG.MOSAIC.PROB", "1.0", "INPUT.AUG.MOSAIC.SIZE", "96"]
    arguments = ["draw", "augmented", *QUICK, *SMALL, *mosaic, "--images", "2", "--times", "3"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert str(tmp_path / "augmented.png") in capsys.readouterr().out
    picture = cv2.imread(str(tmp_path / "augmented.png"))
    assert picture.shape[0] > 2 * 320  # two rows
    assert picture.shape[1] > 3 * 320


def test_routes_and_lost_objects_of_recollection_are_drawn(tmp_path, capsys):
    # With everything else that changes a step: averaged weights, precision, parts.
    options = [f"{NODE}.NUM_HEADS", "4", "MODEL.EMA.ENABLED", "True", "SOLVER.AMP.ENABLED", "True"]
    options += ["SOLVER.ACCUMULATE", "2", "OUTPUT_DIR", str(tmp_path), *coco_options(tmp_path)]
    assert run(["--config-file", "quick/sparse_rcnn_sqr_shapes", *SMALL, *options]) == 0
    arguments = ["draw", "recollection", str(tmp_path), "--images", "2", "--threshold", "0.0"]
    assert main([*arguments, "--num-images", "4"]) == 0
    printed = capsys.readouterr().out
    for name in ("routes.png", "found_by_stage.png", "lost_00.png", "lost_01.png"):
        assert str(tmp_path / "recollection" / name) in printed
        assert cv2.imread(str(tmp_path / "recollection" / name)).std() > 5
    counts = re.findall(r"stage (\d): (\d+) of (\d+) objects detected, (\d+) lost", printed)
    assert [c[0] for c in counts] == ["1", "2", "3", "4"]
    for _, detected, total, lost in counts:
        assert int(lost) <= int(detected) <= int(total)
    assert counts[-1][-1] == "0"  # the last stage loses nothing


def test_curves_of_a_training_are_drawn(tmp_path, capsys):
    lines = [
        {"iteration": 19, "total_loss": 2.0, "lr": 0.1, "dynamic_rcnn/iou_thresh": 0.4},
        {"iteration": 39, "total_loss": 1.0, "plain/total_loss": 0.5, "bbox/AP": 3.0},
        {"iteration": 39, "dynamic_rcnn/beta": 0.5, "dynamic_rcnn/iou_stat": 0.5, "loss_cls": 0.1},
    ]
    (tmp_path / "metrics.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    file = tmp_path / "new/drawn.png"
    assert main(["draw", "curves", str(tmp_path), "--output", str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    assert cv2.imread(str(file)).shape[1] == 5 * 440
    message = refusal(capsys, "draw", "curves", str(tmp_path / "new"))
    assert "metrics.json does not exist" in message
