"""Reading config files, and errors that say what to write."""

import pytest
import yaml
from conftest import tiny_cfg

from dsrcnn.config import read_cfg
from dsrcnn.config.load import find_config
from dsrcnn.config.rules import value_of
from dsrcnn.errors import ConfigError

NODE = "MODEL.SparseRCNN"


def test_overrides_come_last(write):
    path = write("MODEL:\n  SparseRCNN:\n    NUM_HEADS: 3\n    NUM_REG: 2\nVERSION: 2\n")
    cfg = read_cfg(path, ["MODEL.SparseRCNN.NUM_HEADS", "4", "SOLVER.BASE_LR", "1e-3"])
    node = cfg.MODEL.SparseRCNN
    assert (node.NUM_HEADS, node.NUM_REG, cfg.SOLVER.BASE_LR) == (4, 2, 0.001)


def test_reading_twice_gives_independent_configs():
    first = read_cfg("quick/sparse_rcnn_shapes")
    first.MODEL.SparseRCNN.NUM_HEADS = 99
    assert read_cfg("quick/sparse_rcnn_shapes").MODEL.SparseRCNN.NUM_HEADS != 99


def test_a_file_is_given_by_its_path_or_its_shipped_name(write, monkeypatch, tmp_path):
    path = write("VERSION: 2\n")
    assert find_config(path) == find_config(str(path)) == path
    monkeypatch.chdir(tmp_path)  # shipped names work from any folder
    name = "coco/sparse_rcnn_R50_100pro_3x"
    for text in (name, f"configs/{name}", f"configs/{name}.yaml"):
        assert find_config(text).name == "sparse_rcnn_R50_100pro_3x.yaml"


@pytest.mark.parametrize("in_file", [True, False], ids=["file", "override"])
@pytest.mark.parametrize(("key", "meant"), [
    ("MODEL.SparseRCNN.NUM_PROPOSAL", "MODEL.SparseRCNN.NUM_PROPOSALS"),
    ("SOLVER.BASELR", "SOLVER.BASE_LR"),
])  # fmt: skip
def test_an_unknown_key_suggests_the_one_meant(write, in_file, key, meant):
    content = {"VERSION": 2}
    if in_file:
        nested = content
        *parents, leaf = key.split(".")
        for parent in parents:
            nested = nested.setdefault(parent, {})
        nested[leaf] = 5
    path = write(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        read_cfg(path, [] if in_file else [key, 5])
    assert f"Unknown config key {key!r}" in str(caught.value)
    assert f"Did you mean {meant}" in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("opts", "unknown"), [
    (["SOLVR.BASE_LR", 1.0], "SOLVR.BASE_LR"),
    (["SOLVER.BASE_LR.X", 1.0], "SOLVER.BASE_LR.X"),  # below a number
    (["SOLVER.GAMMA", 0.5, "SOLVER.BASE_LR.X", 1.0], "SOLVER.BASE_LR.X"),
])  # fmt: skip
def test_a_key_below_an_unknown_node_or_a_value_is_unknown(write, opts, unknown):
    with pytest.raises(ConfigError, match=f"Unknown config key '{unknown}'"):
        read_cfg(write("VERSION: 2\n"), opts)


@pytest.mark.parametrize(("name", "close"), [
    ("coco/sparse_rcnn_R50_300pro", "coco/sparse_rcnn_R50_300pro_3x"),
    ("configs/coco/sparse_rcnn_R50_300pro_5x.yaml", "coco/sparse_rcnn_R50_300pro_3x"),
    ("sparse_rcnn_shapes", "quick/sparse_rcnn_shapes"),
    ("zzzz", "Base-SparseRCNN"),  # nothing is close: all are listed
])  # fmt: skip
def test_a_missing_file_lists_close_names(name, close):
    with pytest.raises(ConfigError) as caught:
        read_cfg(name)
    assert f"{name!r} does not exist" in str(caught.value)
    assert close in str(caught.value)


@pytest.mark.parametrize(("key", "value"), [
    ("MODEL.SparseRCNN.NUM_PROPOSALS", "many"),
    ("SOLVER.BASE_LR", "fast"),
    ("DATASETS.TRAIN", "shapes_train"),  # a name where a tuple belongs
    ("MODEL.SparseRCNN", 3),
])  # fmt: skip
def test_a_value_of_another_type_names_its_key(write, key, value):
    with pytest.raises(ConfigError) as caught:
        read_cfg(write("VERSION: 2\n"), [key, value])
    assert key in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize("opts", [["MODEL.DEVICE"], ["MODEL.DEVICE", "cpu", "SEED"]])
def test_an_odd_number_of_overrides_is_an_error(opts):
    with pytest.raises(ConfigError) as caught:
        read_cfg("quick/sparse_rcnn_shapes", opts)
    assert f"there are {len(opts)} words: {' '.join(opts)}" in str(caught.value)


@pytest.mark.parametrize(("text", "expected"), [
    ("MODEL: {DEVICE: [", "not valid YAML"), ("", "lines KEY: VALUE"),
    ("- VERSION\n", "lines KEY: VALUE"),
    ("_BASE_: nowhere.yaml\n", "/nowhere.yaml"),
    ("VERSION: 3\n", "v3 config"),
    ("VERSION: 2\nINPUT:\n  FORMAT: 2022-05-02\n", "INPUT.FORMAT"),
])  # fmt: skip
def test_an_invalid_config_file_is_named(write, text, expected):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        read_cfg(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", ["0", 0, "-2", "1"])
def test_an_override_may_be_an_integer_where_a_float_is_expected(value):
    cfg = tiny_cfg(f"{NODE}.DLA.UNIT_STEP", value)
    assert float(value) == cfg.MODEL.SparseRCNN.DLA.UNIT_STEP
    assert isinstance(cfg.MODEL.SparseRCNN.DLA.UNIT_STEP, float)


def test_an_integer_for_a_float_in_a_file_is_an_error_with_advice(write):
    with pytest.raises(ConfigError, match="Write the number with a decimal point"):
        read_cfg(write("MODEL:\n  SparseRCNN:\n    DLA: {UNIT_STEP: 0}\n"))


@pytest.mark.parametrize("name", ["2024", "2024_06_12", "1e5", "None", "(1, 2)", "0x10", "True"])
def test_text_that_looks_like_a_python_value_stays_text(write, name):
    keys = ("DATASETS.CUSTOM.FOLDER", "DATASETS.CUSTOM.TRAIN_SPLIT", "OUTPUT_DIR")
    by_override = read_cfg(
        "quick/sparse_rcnn_shapes", [word for key in keys for word in (key, name)]
    )
    by_file = read_cfg(write(by_override.dump()))  # as the config.yaml of a run
    content = {"DATASETS": {"CUSTOM": {"FOLDER": name, "TRAIN_SPLIT": name}}, "OUTPUT_DIR": name}
    by_hand = read_cfg(write(yaml.safe_dump(content)))
    for cfg in (by_override, by_file, by_hand):
        assert [value_of(cfg, key) for key in keys] == [name] * 3


def test_text_in_quotes_of_its_own_loses_them_as_in_detectron2(write):
    assert read_cfg("quick/sparse_rcnn_shapes", ["MODEL.WEIGHTS", "''"]).MODEL.WEIGHTS == ""
    assert read_cfg(write("MODEL: {WEIGHTS: \"'2'\"}\n")).MODEL.WEIGHTS == "2"


def test_words_that_are_no_pairs_are_shown_on_one_line():
    with pytest.raises(ConfigError, match=r"there are 3 words: SEED '\\n' 2\.$"):
        read_cfg("quick/sparse_rcnn_shapes", ["SEED", "\n", 2])


@pytest.mark.parametrize("value", ["2024", "2024.5", "[2024]"])
def test_a_number_for_text_says_to_quote_it(write, value):
    with pytest.raises(ConfigError, match=r"DATASETS\.CUSTOM\.NAME is \[?2024.*stands in quotes"):
        read_cfg(write(f"DATASETS: {{CUSTOM: {{NAME: {value}}}}}\n"))
