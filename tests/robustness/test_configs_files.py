"""Config files of any content, and command lines: one message each, and no code is run."""

import os
import socket
import stat
from itertools import pairwise

import pytest
from conftest import QUICK, refusal

from dsrcnn.config import load_cfg, read_cfg
from dsrcnn.config.files import read_yaml
from dsrcnn.errors import ConfigError

STEPS = [(f"{b}: &{b}", ", ".join([f"*{a}"] * 9)) for a, b in pairwise("abcdefgh")]
BOMB = "".join(f"{start} [{aliases}]\n" for start, aliases in STEPS)
MERGES = "".join(f"{start} {{{{<<: [{aliases}]}}}}\n" for start, aliases in STEPS)
PYTHON = "asks to run Python code"


def refused(path, phrase):
    with pytest.raises(ConfigError) as caught:
        read_cfg(path)
    message = str(caught.value)
    assert phrase in message
    assert "\n" not in message
    assert str(path) in message


@pytest.mark.parametrize(("text", "phrase"), [
    ("SEED: !!python/object/apply:os.system ['touch {marker}']\n", PYTHON),
    ("SEED: !!python/object/apply:eval ['1']\n", "line 1: the tag !!python/object/apply:eval"),
    ("VERSION: 2\nSEED: !!python/object/new:os.system ['touch {marker}']\n", "line 2"),
    ("SEED: !!python/name:os.system\n", PYTHON),
    ("SEED: !!python/module:os\n", PYTHON),
    ("INPUT: {{MIN_SIZE_TRAIN: !!python/tuple [64]}}\n", PYTHON),
    ("!!python/object/apply:os.system ['touch {marker}']: 1\n", PYTHON),
    ("MODEL: !!python/object:dsrcnn.config.rules.Allowed {{test: 1}}\n", PYTHON),
    ("SEED: !own 3\n", "not valid YAML"),
    ("SEED: !!int ''\n", "not valid YAML"),
    ("SEED: !!float x\n", "not valid YAML"),
    ("SEED: !!bool maybe\n", "not valid YAML"),
    ("SEED: !!timestamp x\n", "not valid YAML"),
    ("SEED: 2022-99-99\n", "not valid YAML"),
    ("SEED: 2022-09-09\n", "SEED"),
    ("SEED: !!binary AAAA\n", "SEED"),
    ("SEED: !!set {{a, b}}\n", "SEED"),
    ("SEED: 1\nSEED: 2\n", "the key SEED stands on line 1 and again on line 2"),
    ("MODEL: {{DEVICE: cpu, DEVICE: cuda}}\n", "the key DEVICE stands on line 1"),
    ("SEED: 1\nSEED: '1'\n", "the key SEED stands on line 1"),  # a number and a text
    ("INPUT: {{FORMAT: RGB}}\nINPUT: {{FORMAT: RGB}}\n", "the key INPUT stands on line 1"),
    ("1: 2\n", "the key '1' is no name"),
    ("on: 2\n", "the key 'on' is no name"),
    ("? [a, b]\n: 2\n", "the key of several values is no name"),
    ("null: 2\n", "the key 'null' is no name"),
    ("SEED: &a [*a]\n", "contains itself"),
    ("MODEL: &m\n  FPN: *m\n", "contains itself"),
    ("a: &a [1]\n" + BOMB, "it is no config"),
    ("a: &a {{X: 1}}\n" + MERGES, "it is no config"),
    ("SEED: " + "[" * 5000 + "]" * 5000 + "\n", "nested too deep"),
    ("".join(f"{' ' * i}A:\n" for i in range(60)), "nested too deep"),
    ("SEED: '" + "(" * 5000 + "'\n", "SEED is (((("),
    ("SEED: " + "9" * 5000 + "\n", "not valid YAML"),
    ("SEED: *nothing\n", "not valid YAML"),
    ("SEED: 1\n---\nSEED: 2\n", "not valid YAML"),
    ("SEED: 'open\n", "not valid YAML"),
    ("\tSEED: 1\n", "not valid YAML"),
    ("SEED: 1\x00\n", "not valid YAML"),
    ("", "is empty"), ("# only words\n", "is empty"), ("null\n", "is empty"),
    ("just words\n", "holds a str"), ("- SEED\n", "holds a list"), ("7\n", "holds a int"),
    ("MODEL: 3\n", "MODEL"), ("MODEL:\n", "MODEL"), ("MODEL: []\n", "MODEL"),
    ("SOLVER.BASE_LR: 0.1\n", "keys of a file are nested; write BASE_LR below SOLVER:."),
    ("SOLVER: {{BASE_LR: 1}}\n", "decimal point"),
    ("VERSION: '2'\n", "VERSION"), ("VERSION: two\n", "vtwo config"), ("VERSION: 0\n", "v0 config"),
    ("VERSION: true\n", "vTrue config"), ("VERSION: []\n", "v[] config"),
    ("VERSION: 1\nMODEL: {{WEIGHTS: x}}\n", "MODEL.WEIGHTS"),
    ("VERSION: 1\nMODEL: {{WEIGHT: {{A: 1}}}}\n", "MODEL.WEIGHT is A: 1 (in"),
    ("_BASE_: http://localhost:9/a.yaml\n", "an address; bases are local files only"),
    ("_BASE_: HTTPS://localhost/a.yaml\n", "an address"),
    ("_BASE_: s3://bucket/a.yaml\n", "an address"),
    ("_BASE_: detectron2://a.yaml\n", "an address"),
    ("_BASE_: file:///etc/hosts\n", "an address"),
    ("_BASE_: nowhere.yaml\n", "nowhere.yaml (_BASE_ of"),
    ("_BASE_: .\n", "is a folder"), ("_BASE_: ..\n", "is a folder"),
    ("_BASE_: /dev/zero\n", "is a device"), ("_BASE_: mine.yaml\n", "is its own _BASE_"),
    ("_BASE_: ./x/../mine.yaml\n", ""),
    ("_BASE_: ''\n", "_BASE_ is ''"), ("_BASE_:\n", "_BASE_ is None"),
    ("_BASE_: 3\n", "_BASE_ is 3"), ("_BASE_: [3]\n", "_BASE_ is 3"),
    ("_BASE_: {{a: b}}\n", "_BASE_ is {'a': 'b'}"),
    ('_BASE_: "a\\0b"\n', "_BASE_ is 'a"), (f"_BASE_: {'a' * 300}\n", "File name too long"),
    ("MODEL: {{_BASE_: a.yaml}}\n", "_BASE_"),
])  # fmt: skip
def test_an_unusable_file_is_one_message_and_runs_nothing(write, tmp_path, text, phrase):
    marker = tmp_path / "marker"
    refused(write(text.format(marker=marker)), phrase)
    assert not marker.exists()


@pytest.mark.parametrize(("content", "phrase"), [
    (b"\xff\xfe\x00S", "no UTF-8 text (byte 0 is 0xff)"),
    ("SEED: ä\n".encode("latin-1"), "no UTF-8 text"),
    (bytes(range(256)), "UTF-8"), (b"\x80\x04\x95", "UTF-8"), (b"PK\x03\x04\x00", "not valid YAML"),
    (b"#" * 5_000_001, "more than 5000000 bytes"),
])  # fmt: skip
def test_a_file_that_is_no_text_is_one_message(tmp_path, content, phrase):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    refused(path, phrase)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, kind in (("pipe", "a named pipe"), ("socket", "a socket"), (".", "a folder")):
            refused(tmp_path / name, kind)
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)
    (tmp_path / "endless").symlink_to("endless")
    with pytest.raises(ConfigError, match="does not exist"):
        read_cfg(tmp_path / "endless")


def test_bases_that_name_each_other_are_refused_with_the_chain(write):
    write("_BASE_: c.yaml\n", "b.yaml")
    write("_BASE_: [mine.yaml]\n", "c.yaml")
    with pytest.raises(ConfigError, match=r"mine\.yaml -> .*b\.yaml -> .*c\.yaml -> .*its own"):
        read_cfg(write("_BASE_: b.yaml\n"))


def test_bases_that_multiply_are_refused(write):
    for index in range(20):
        write(f"_BASE_: [b{index + 1}.yaml, b{index + 1}.yaml]\n", f"b{index}.yaml")
    write("SEED: 1\n", "b20.yaml")
    with pytest.raises(ConfigError, match="more than 50 files"):
        read_yaml(write("_BASE_: b0.yaml\n"))


def test_a_node_in_one_file_and_a_value_in_its_base_are_refused(write):
    write("MODEL: 3\n", "b.yaml")
    with pytest.raises(ConfigError, match="its _BASE_ has the value 3"):
        read_cfg(write("_BASE_: b.yaml\nMODEL: {DEVICE: cpu}\n"))


def test_bases_are_merged_in_order_and_relative_to_their_file(write, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    write("SEED: 1\nMODEL: {DEVICE: cpu, MASK_ON: True}\n", "sub/first.yaml")
    write("_BASE_: first.yaml\nSEED: 2\n", "sub/second.yaml")
    write("SEED: 3\n", "home.yaml")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write("_BASE_: [sub/second.yaml, '~/home.yaml']\nMODEL: {MASK_ON: False}\n")
    assert read_yaml(path) == {"SEED": 3, "MODEL": {"DEVICE": "cpu", "MASK_ON": False}}
    assert read_yaml(write(f"_BASE_: {path}\nSEED: 4\n", "last.yaml"))["SEED"] == 4


@pytest.mark.parametrize("content", [
    b"\xef\xbb\xbfSEED: 5\n", b"SEED: 5\r\nVERSION: 2\r\n", b"SEED: 5", b"---\nSEED: 5\n...\n",
    b"SEED: '5'\n", b"# \xc3\xa4\nSEED: 5\n", b"SEED: &s 5\n", b"{SEED: 5, VERSION: 2}\n",
    b"MODEL: {FPN: &n {NORM: BN}, RESNETS: {<<: *n}}\nSEED: 5\n",
])  # fmt: skip
def test_usual_ways_to_write_yaml_are_accepted(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    assert read_cfg(path).SEED == 5


def test_a_config_of_detectron2s_first_version_is_upgraded(write, caplog):
    cfg = read_cfg(write("MODEL: {WEIGHT: old.pkl}\n"))
    assert cfg.MODEL.WEIGHTS == "old.pkl"
    assert "upgraded to v2" in caplog.text


@pytest.mark.parametrize("words", [
    ["__import__('os').system('touch marker')"], ["!!python/object/apply:os.system [touch marker]"],
    ["[x for x in (1,)]"], ["${oc.env:HOME}"], ["lambda: 1"],
])  # fmt: skip
def test_overrides_are_literals_and_never_run(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    cfg = read_cfg("quick/sparse_rcnn_shapes", ["MODEL.WEIGHTS", *words])
    assert words == [cfg.MODEL.WEIGHTS]
    with pytest.raises(ConfigError, match="SEED"):
        read_cfg("quick/sparse_rcnn_shapes", ["SEED", *words])
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("opts", "phrase"), [
    ("SEED 1", "as a list"), (["SEED"], "come in pairs"), ([None, 1], "Unknown config key 'None'"),
    ([3, 4], "Unknown config key '3'"), (["", 1], "Unknown config key ''"),
    (["SEED.", 1], "Unknown config key 'SEED.'"), (["MODEL", "{}"], "MODEL"),
    (["SEED", "(" * 5000], ""), (["SEED", "-" * 5000 + "1"], ""), (["_BASE_", "a.yaml"], "_BASE_"),
    (["SEED", "\0"], "SEED"), (["SEED", object()], "SEED"), (["SEED", b"1"], "SEED"),
    (["SEED", 1j], "SEED"), (["DATASETS.TRAIN", {"a"}], "DATASETS.TRAIN"),
])  # fmt: skip
def test_odd_overrides_are_one_message(opts, phrase):
    with pytest.raises(ConfigError) as caught:
        load_cfg("quick/sparse_rcnn_shapes", opts)
    assert phrase in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("words", "phrase"), [
    (["train", *QUICK, "--num-gpus", "-3"], "--num-gpus: '-3' is not a number of at least 0"),
    (["train", *QUICK, "--num-gpus", "two"], "--num-gpus: 'two' is not a number"),
    (["train", *QUICK, "--num-gpus", "1e3"], "--num-gpus: '1e3' is not a number"),
    (["train", *QUICK, "--num-machines", "0"], "--num-machines: '0' is not a number of at least 1"),
    (["train", *QUICK, "--machine-rank", "1"], "--machine-rank is 1, but --num-machines is 1"),
    (["train", *QUICK, "--machine-rank", "-1"], "'-1' is not a number of at least 0"),
    (["eval", *QUICK, "--num-machines", "2", "--machine-rank", "2"], "from 0 to 1"),
    (["train", *QUICK, "--dist-url", "localhost"], "--dist-url is 'localhost'; write tcp://HOST:"),
    (["train", *QUICK, "--dist-url", "tcp://host"], "tcp://HOST:PORT"),
    (["train", *QUICK, "--dist-url", "tcp://host:99999"], "a port up to 65535"),
    (["train", *QUICK, "--dist-url", "tcp://host:0"], "tcp://HOST:PORT"),
    (["train", *QUICK, "--num-machines", "2", "--dist-url", "auto"], "cannot reach"),
    (["train", *QUICK, "--num-gpus"], "expected one argument"),
    (["train", "--config-file"], "expected one argument"),
    (["train", "--config-file", ""], "write --config-file"),
    (["train", "--config-file", "."], "is a folder"),
    (["train", "--config-file", "/dev/null"], "is a device"),
    (["train", "--config-file", "a" * 5000], "does not exist"),
    (["train", "--config-file", "text.yaml"], "no UTF-8 text"),
    (["train", *QUICK, "MODEL.DEVICE", "cudaa"], "MODEL.DEVICE is 'cudaa'"),
    (["train", *QUICK, "OUTPUT_DIR", ""], "OUTPUT_DIR is ''"),
    (["train", *QUICK, "OUTPUT_DIR", "text.yaml"], "OUTPUT_DIR is 'text.yaml', which is a file"),
    (["train", *QUICK, "OUTPUT_DIR", "text.yaml/x"], "cannot be written to: Not a directory"),
    (["train", *QUICK, "OUTPUT_DIR", "x" * 300], "File name too long"),
    (["train", *QUICK, "OUTPUT_DIR", "/proc/x"], "which cannot be written to"),
    (["train", *QUICK, "OUTPUT_DIR", "loop"], "which is a file"),
    (["train", *QUICK, "DATASETS.TRAIN", "()", "OUTPUT_DIR", "o"], "DATASETS.TRAIN is empty"),
    (["train", *QUICK, "DATASETS.TEST", "('shapes_vall',)", "OUTPUT_DIR", "o"], "shapes_val"),
    (["eval", *QUICK, "DATASETS.TEST", "()", "OUTPUT_DIR", "o"], "DATASETS.TEST is empty"),
    (["train", *QUICK, "DATASETS.TEST", "('coco_2017_val',)", "DATASETS.TRAIN",
      "('coco_2017_train',)", "MODEL.SparseRCNN.NUM_CLASSES", "80", "OUTPUT_DIR", "o"],
     "is not on this machine"),
    (["draw", "predictions", *QUICK, "--output", "text.yaml"], "--output is 'text.yaml', which is"),
    (["draw", "predictions", *QUICK, "--output", "o", "--threshold", "nan"], "from 0 to 1"),
    (["draw", "predictions", *QUICK, "--output", "o", "--threshold", "high"], "--threshold"),
    (["draw", "augmented", *QUICK, "--output", "text.yaml/x"], "Not a directory"),
    (["draw", "curves", "run", "--output", "a.xyz"], "ends in one of .png"),
    (["draw", "curves", "run", "--output", "a"], "ends in one of .png"),
    (["draw", "curves", "run", "--output", "folder.png"], "which is a folder; write a file"),
    (["draw", "curves", "run", "--output", "text.yaml/a.png"], "'text.yaml', which is a file"),
    (["draw", "curves", "text.yaml"], "metrics.json does not exist"),
    (["draw", "curves", "\0"], "metrics.json does not exist"),
    (["draw", "curves", "pipes"], "metrics.json is no file"),
    (["eval", "pipes"], "config.yaml"),
])  # fmt: skip
def test_an_odd_command_line_is_one_message(words, phrase, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.yaml").write_bytes(b"SEED: \xff\n")
    (tmp_path / "loop").symlink_to("loop")
    for folder in ("folder.png", "run", "pipes"):
        (tmp_path / folder).mkdir()
    for name in ("metrics.json", "config.yaml"):
        os.mkfifo(tmp_path / "pipes" / name)
    (tmp_path / "run/metrics.json").write_text('{"iteration": 1, "total_loss": 2.0}\n')
    options = [] if words[:2] == ["draw", "curves"] else ["MODEL.WEIGHTS", ""]
    options = [] if words[-1] in ("--config-file", "--num-gpus") else options
    assert phrase in refusal(capsys, *words, *options)


@pytest.mark.parametrize("content", [
    b"", b"\n\n", b"{", b"[]\n", b"7\n", b"null\n", b"\xff\xfe\x00\n", b'{"iter": 1, "loss": 2}\n',
    b'{"iteration": "one", "total_loss": 1}\n', b'{"iteration": 1}\n', b'{"iteration": null}\n',
    b'{"iteration": 1, "total_loss": "much"}\n', b'{"iteration": NaN, "total_loss": 1}\n',
    b'{"iteration": 1e999, "total_loss": 1}\n', b'{"iteration": 1, "total_loss": [1]}\n',
    b"[" * 100_000, b'{"iteration": 1, "total_loss": ' + b"9" * 400 + b"}\n", b"epoch,loss\n1,2\n",
    b'{"mode": "train", "epoch": 1}\n',
])  # fmt: skip
def test_metrics_without_scalars_are_one_message(content, capsys, tmp_path):
    (tmp_path / "metrics.json").write_bytes(content)
    assert "has no scalars of a training" in refusal(capsys, "draw", "curves", tmp_path)
    assert not (tmp_path / "curves.png").exists()
