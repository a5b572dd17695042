"""`dsrcnn <command>`."""

import json
import re

import cv2
import pytest
from conftest import SMALL

from dsrcnn.cli.main import main
from dsrcnn.engine.main import run


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(
        name in printed
        for name in ("demo", "draw", "assignment", "proposals", "benchmark", "benchmark-matching")
    )


def test_the_demo_trains_draws_and_says_where_everything_is(tmp_path, capsys):
    output = tmp_path / "demo"
    assert main(["demo", "--images", "2", *SMALL, "OUTPUT_DIR", str(output)]) == 0
    printed = capsys.readouterr().out
    for name in ("predictions", "curves.png", "metrics.json", "log.txt", "model_final.pth"):
        assert (output / name).exists(), name
        assert str(output / name) in printed
    pictures = sorted((output / "predictions").glob("*.png"))
    assert [p.stem for p in pictures] == ["00000_0", "00199_199"]  # first and last of shapes_val
    assert cv2.imread(str(pictures[0])).shape[1] > 600

    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    arguments = ["draw", "--config-file", str(output / "config.yaml"), "--images", "3"]
    assert main([*arguments, "--output", str(tmp_path / "drawn"), *weights]) == 0
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 3

    arguments = ["assignment", "--config-file", str(output / "config.yaml"), "--images", "2"]
    assert main([*arguments, "--output", str(tmp_path / "assigned"), *weights]) == 0
    pictures = [cv2.imread(str(p)) for p in (tmp_path / "assigned").glob("*.png")]
    assert len(pictures) == 2
    assert all(p.shape[0] > 2 * 240 and p.shape[1] > 2 * 240 for p in pictures)  # 2 rows, 2 stages


def test_proposals_of_a_dpg_model_are_drawn_with_numbers(tmp_path, capsys):
    output = tmp_path / "demo"
    dpg = ["MODEL.SparseRCNN.DPG.ENABLED", "True", "OUTPUT_DIR", str(output)]
    config = ["--config-file", "quick/sparse_rcnn_shapes"]
    assert run([*config, *SMALL, *dpg]) == 0
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    arguments = ["proposals", "--config-file", str(output / "config.yaml"), "--images", "3"]
    assert main([*arguments, "--output", str(tmp_path / "drawn"), *weights]) == 0
    printed = capsys.readouterr().out
    for name in ("proposals.png", "weights.png", "curves.png"):
        assert str(tmp_path / "drawn" / name) in printed
        assert cv2.imread(str(tmp_path / "drawn" / name)).std() > 5
    assert "entropy" in printed
    assert "variation" in printed


def test_anchors_of_an_asag_are_drawn_by_level(tmp_path, capsys):
    output = tmp_path / "run"
    small = ["MODEL.ASAG.ANCHORS.HIDDEN", "32", "MODEL.AdaMixer.IN_POINTS", "4"]
    config = ["--config-file", "quick/asag_a_shapes"]
    assert run([*config, *SMALL, *small, "OUTPUT_DIR", str(output)]) == 0
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    arguments = ["anchors", "--config-file", str(output / "config.yaml"), "--images", "3"]
    assert main([*arguments, "--output", str(tmp_path / "drawn"), *weights]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "drawn" / "anchors.png") in printed
    assert "patches of P4" in printed
    picture = cv2.imread(str(tmp_path / "drawn" / "anchors.png"))
    assert picture.shape[0] > 3 * 240  # a row for every image
    assert picture.shape[1] > 3 * 240  # three levels
    assert (
        main(
            [
                *arguments,
                "--output",
                str(tmp_path),
                *weights,
                "MODEL.META_ARCHITECTURE",
                "SparseRCNN",
                "MODEL.ROI_BOX_HEAD.POOLER_TYPE",
                "ROIAlignV2",
            ]
        )
        == 2
    )
    assert "SparseRCNN generates none" in capsys.readouterr().err


def test_augmented_images_are_drawn(tmp_path, capsys):
    output = tmp_path / "drawn"
    arguments = ["draw-augmented", "--config-file", "quick/sparse_rcnn_shapes", "--images", "2"]
    mosaic = ["INPUT.AUG.MOSAIC.PROB", "1.0", "INPUT.AUG.MOSAIC.SIZE", "96"]
    assert main([*arguments, "--times", "3", "--output", str(output), *SMALL, *mosaic]) == 0
    path = output / "augmented.png"
    assert str(path) in capsys.readouterr().out
    picture = cv2.imread(str(path))
    assert picture.shape[0] > 2 * 320  # two rows
    assert picture.shape[1] > 3 * 320


@pytest.mark.parametrize("count", ["0", "-1", "some"])
def test_a_count_of_pictures_that_makes_no_sense_is_refused(count, capsys):
    with pytest.raises(SystemExit):
        main(["draw", "--config-file", "x", "--output", "y", "--images", count])
    assert f"'{count}' is not a number of at least 1" in capsys.readouterr().err


def test_a_model_without_dpg_has_no_mixtures_to_draw(tmp_path, capsys):
    arguments = ["proposals", "--config-file", "quick/sparse_rcnn_shapes"]
    assert main([*arguments, "--output", str(tmp_path), *SMALL]) == 2
    assert "DPG.ENABLED is False" in capsys.readouterr().err


def test_matching_is_timed(capsys):
    sizes = ["--stages", "2", "--images", "1", "--proposals", "20", "--objects", "3"]
    assert main(["benchmark-matching", *sizes, "--repeats", "2"]) == 0
    assert "transport, batched" in capsys.readouterr().out


def test_bad_input_of_a_command_is_one_message(capsys):
    assert main(["draw", "--config-file", "nothing", "--output", "x"]) == 2
    assert "error: Config file 'nothing' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["draw", "assignment"])
def test_drawing_without_weights_is_an_error(command, tmp_path, capsys):
    arguments = [command, "--config-file", "quick/sparse_rcnn_shapes", "--output", str(tmp_path)]
    assert main([*arguments, *SMALL]) == 2
    assert "random weights" in capsys.readouterr().err


def test_routes_and_lost_objects_of_recollection_are_drawn(tmp_path, capsys):
    output = tmp_path / "run"
    config = ["--config-file", "quick/sparse_rcnn_sqr_shapes"]
    # With all else that changes how a step is done: averaged weights, precision, parts.
    extra = ["MODEL.SparseRCNN.NUM_HEADS", "4", "MODEL.EMA.ENABLED", "True"]
    extra += ["SOLVER.AMP.ENABLED", "True", "SOLVER.ACCUMULATE", "2"]
    assert run([*config, *SMALL, *extra, "OUTPUT_DIR", str(output)]) == 0
    weights = ["MODEL.WEIGHTS", str(output / "model_final.pth")]
    arguments = ["recollection", "--config-file", str(output / "config.yaml"), "--images", "2"]
    options = ["--looked-at", "5", "--threshold", "0.0", "--output", str(tmp_path / "drawn")]
    assert main([*arguments, *options, *weights]) == 0
    printed = capsys.readouterr().out
    for name in ("routes.png", "found_by_stage.png", "lost_00.png", "lost_01.png"):
        assert str(tmp_path / "drawn" / name) in printed
        assert cv2.imread(str(tmp_path / "drawn" / name)).std() > 5
    counts = re.findall(r"stage (\d): (\d+) of (\d+) objects found, (\d+) lost", printed)
    assert [c[0] for c in counts] == ["1", "2", "3", "4"]
    assert all(
        int(found) <= int(total) and int(lost) <= int(found) for _, found, total, lost in counts
    )
    assert counts[-1][-1] == "0"  # what the last stage finds is not lost


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [("NUM_HEADS", "1", "NUM_HEADS is 1"), ("DEEP_SUPERVISION", "False", "Write True")],
)
def test_stages_that_cannot_be_compared_are_one_message(key, value, words, tmp_path, capsys):
    arguments = ["recollection", "--config-file", "quick/sparse_rcnn_shapes"]
    options = [f"MODEL.SparseRCNN.{key}", value]
    assert main([*arguments, "--output", str(tmp_path), *SMALL, *options]) == 2
    assert words in capsys.readouterr().err


def test_curves_of_a_training_are_drawn(tmp_path, capsys):
    lines = [
        {"iteration": 19, "total_loss": 2.0, "lr": 0.1, "dynamic_rcnn/iou_thresh": 0.4},
        {"iteration": 39, "total_loss": 1.0, "plain/total_loss": 0.5, "bbox/AP": 3.0},
        {"iteration": 39, "dynamic_rcnn/beta": 0.5, "dynamic_rcnn/iou_stat": 0.5, "loss_cls": 0.1},
    ]
    (tmp_path / "metrics.json").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert main(["curves", str(tmp_path), "--output", str(tmp_path / "new/drawn.png")]) == 0
    assert str(tmp_path / "new/drawn.png") in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / "new/drawn.png")).shape[1] == 5 * 440
    assert main(["curves", str(tmp_path / "new")]) == 2
    assert "metrics.json does not exist" in capsys.readouterr().err
