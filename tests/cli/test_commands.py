"""`dsrcnn <command>`."""

import cv2
import pytest
from conftest import TINY

from dsrcnn.cli.main import main

SMALL = [
    *map(str, TINY), "MODEL.SparseRCNN.NUM_CLASSES", "0", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    "INPUT.MIN_SIZE_TEST", "64",
]  # fmt: skip


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("demo", "draw", "benchmark"))


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


def test_bad_input_of_a_command_is_one_message(capsys):
    assert main(["draw", "--config-file", "nothing", "--output", "x"]) == 2
    assert "error: Config file 'nothing' does not exist" in capsys.readouterr().err


def test_drawing_without_weights_is_an_error(tmp_path, capsys):
    arguments = ["draw", "--config-file", "quick/sparse_rcnn_shapes", "--output", str(tmp_path)]
    assert main([*arguments, *SMALL]) == 2
    assert "random weights" in capsys.readouterr().err
