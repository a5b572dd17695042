"""Configs run from end to end on records in COCO's layout."""

import json
import sys

import pytest
from conftest import REPOSITORY, write_coco

SAMPLE = [
    "coco/sparse_rcnn_R50_100pro_3x",
    "coco/dynamic_sparse_rcnn_sqr1_R50_100pro_3x",
    "coco/adamixer_R50_100pro_1x",
    "coco/asag_a_dn_R50_100pro_1x",
    "coco/sparse_rcnn_R50_128pro_640",  # a schedule in epochs
    "dynamic_rcnn/mask_rcnn_dynamic_R_50_FPN_1x",
    "crowdhuman/sparse_rcnn_R50_500pro_50e",
]


@pytest.fixture
def check_configs(monkeypatch):
    """The script."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import check_configs

    yield check_configs
    del sys.modules["check_configs"]


@pytest.fixture
def coco(tmp_path):
    """A folder in the layout of COCO 2017 with four images in each part."""
    folder = tmp_path / "coco"
    for part in ("train", "val"):
        annotations = folder / f"annotations/instances_{part}2017.json"
        write_coco(annotations, folder / f"{part}2017", 4)
        content = json.loads(annotations.read_text())
        for entry in content["annotations"]:  # for the masks of Mask R-CNN
            x, y, w, h = entry["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotations.write_text(json.dumps(content))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_a_config_trains_for_a_step_and_evaluates(check_configs, coco, tmp_path, name):
    sample = check_configs.write_sample(coco, tmp_path, images=2)
    row = check_configs.check_config(name, sample, tmp_path / "out", side=64)
    assert row.problem == ""
    assert row.loss > 0
    assert row.parameters > 10


def test_a_config_that_does_not_run_is_a_row_and_the_exit_status(check_configs, coco, capsys):
    words = ["--data", str(coco), "--side", "64", "--configs", "quick/none", "quick/vit_shapes"]
    assert check_configs.main([*words, "--images", "2"]) == 1
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| quick")]
    assert "quick/none" in rows[0]
    assert "does not" in rows[0]
    assert rows[1].rstrip(" |").endswith(tuple("0123456789"))  # no problem
