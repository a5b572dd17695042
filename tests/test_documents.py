"""What the documents say can be typed, opened and found."""

import ast
import csv
import importlib
import json
import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
import yaml
from conftest import REPOSITORY, SMALL, write_coco
from detectron2.config import get_cfg

from benchmarks.__main__ import main as benchmarks_main
from dsrcnn.cli.main import main as dsrcnn_main
from dsrcnn.config.defaults import add_dsrcnn_config
from dsrcnn.config.load import find_config

DOCUMENTS = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "datasets/README.md")]
DOCUMENTS += sorted((REPOSITORY / "docs").glob("*.md"))
DOCUMENTS += sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
# Few iterations of a tiny model, so that the test takes seconds.
SHORT = [*SMALL, "LOG.IMAGES", "0", "SOLVER.WARMUP_ITERS", "0"]
PROJECT = r"https://(?:github\.com/dsrcnn/dsrcnn/(?:blob|tree)|raw\.githubusercontent\.com/dsrcnn/dsrcnn)/main/"
NOT_KEYS = {"BACKBONE_REGISTRY", "DETECTRON2_DATASETS", "META_ARCH_REGISTRY", "PIP_ARGS"}
NOT_KEYS |= {"MLFLOW_TRACKING_URI"}
PROGRAMS = {"dsrcnn": dsrcnn_main, "python -m benchmarks": benchmarks_main}

each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)


@pytest.mark.slow
def test_the_guide_to_custom_data_works_line_by_line(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / "cells"
        write_coco(folder / f"annotations/instances_{split}.json", folder / f"images/{split}", 4)
    for path in (tmp_path / "cells/images/val").glob("*.jpg"):  # no copies of training images
        path.write_bytes(path.read_bytes() + b"\0")
    guide = (REPOSITORY / "docs/CUSTOM_DATA.md").read_text()
    for line in re.search(r"```\n(.*?)```", guide, re.DOTALL)[1].strip().splitlines():
        words = [sys.executable, str(REPOSITORY / "dsrcnn_command.py"), *shlex.split(line)[1:]]
        if "small/best_lite0" in words:
            words += SHORT
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr[-2000:]}"
    for name in ("pictures/cells.png", "pictures/augmented.png", "output/cells/model_best.pth"):
        assert (tmp_path / name).is_file(), name
    assert len(list((tmp_path / "output/cells/predictions").glob("0*.png"))) == 4


@cache
def known_keys():
    """All keys and nodes, each with a dot before it: ``.MODEL.SparseRCNN.SQR.START``."""

    def walk(node, prefix=""):
        for name, value in node.items():
            yield f"{prefix}.{name}"
            if hasattr(value, "items"):
                yield from walk(value, f"{prefix}.{name}")

    return set(walk(add_dsrcnn_config(get_cfg())))


def text_of(path):
    """Text of a page, or of the markdown cells of a notebook."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def own_text(path):
    """Text without the first column of MIGRATION.md, which has names of other implementations."""
    text = text_of(path)
    if path.name == "MIGRATION.md":
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    return text


@each_document
def test_keys_that_documents_name_exist(path):
    text = own_text(path)
    tops = "MODEL|SOLVER|INPUT|DATASETS|DATALOADER|TEST|LOG"
    for key in re.findall(rf"(?<![\w./])(?:{tops})\.[A-Za-z_.]*[A-Za-z_]", text):
        assert f".{key}" in known_keys(), f"{path.name}: {key}"
    # Short forms: `SQR.START`, `TOP_Q`, or `.WARMUP` after a longer key.
    short = r"`\.?([A-Z][A-Za-z]*(?:\.[A-Z_]+)+|[A-Z][A-Z\d]*(?:_[A-Z\d]+)+)\b"
    for key in set(re.findall(short, text)) - NOT_KEYS:
        assert any(k.endswith(f".{key}") for k in known_keys()), f"{path.name}: {key}"


@each_document
def test_configs_and_links_of_documents_exist(path):
    text = text_of(path)
    folders = r"(?:coco|small|quick|voc|lvis|ablation|crowdhuman)/|dynamic_rcnn/\w*_R_"
    for name in re.findall(rf"(?<![\w/])((?:{folders})\w+)\b(?![/.*{{])", text):
        find_config(name)
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
    for target in re.findall(rf"{PROJECT}([^)#\s]+)", text):
        assert (REPOSITORY / target).exists(), f"{path.name}: {target}"


@each_document
def test_files_that_documents_name_exist(path):
    folders = "dsrcnn|benchmarks|configs|tests|tools|datasets|docs"
    for name in re.findall(rf"`((?:{folders})/[\w/.*-]*\w)`", own_text(path)):
        assert list(REPOSITORY.glob(name)), f"{path.name}: {name}"
    for name in re.findall(r"`(\w+\.py)`", own_text(path)):
        found = [*REPOSITORY.glob(name), *(REPOSITORY / "dsrcnn").rglob(name)]
        assert found, f"{path.name}: {name}"


@each_document
def test_files_that_documents_name_beside_a_folder_are_in_it(path):
    names = r"(`\w+\.py`(?:(?:,| and) `\w+\.py`)*)"
    text = own_text(path)
    files = re.findall(rf"{names} in `((?:dsrcnn|benchmarks|tools|tests)[\w/]*)`", text)
    beside = re.findall(rf"`([\w/]+)/\w+\.py`; {names} beside it", text)
    for found, folder in [*files, *(pair[::-1] for pair in beside)]:
        for name in re.findall(r"\w+\.py", found):
            assert (REPOSITORY / folder / name).is_file(), f"{path.name}: {folder}/{name}"


def test_the_guide_to_installation_has_a_row_for_each_extra():
    tree = ast.parse((REPOSITORY / "setup.py").read_text())
    keywords = [k for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords]
    extras = next(k.value for k in keywords if k.arg == "extras_require")
    table = (REPOSITORY / "docs/INSTALL.md").read_text().split("## Extras")[1].split("##")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))
    assert set(rows) == {ast.literal_eval(key) for key in extras.keys}
    assert "timm" in rows["weights"]
    assert "`predict`" in rows["app"]


def test_defaults_of_the_table_of_switches_are_those_of_the_code():
    """Values of base configs come after a semicolon."""
    text = (REPOSITORY / "docs/TRAINING.md").read_text()
    table = text.split("## All switches")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]* \| `([A-Z][\w.]*\*?)`[^|]* \| ([^|]+) \|", table, re.MULTILINE)
    assert len(rows) > 25
    for key, cell in rows:
        node = add_dsrcnn_config(get_cfg())
        for name in key.split("."):
            node = node[name]
        shown = cell.split(";")[0].strip("` ")
        assert shown in (str(node), repr(node).replace("'", '"'), f"{node}".removesuffix(".0")), key


def commands(text):
    """Program, command words and options of each command line in a code block or code span."""
    lines = text.replace("\\\n", " ")
    for program, rest in re.findall(rf"(?:^|`)({'|'.join(PROGRAMS)}) ([a-z][^`\n#]*)", lines, re.M):
        words = rest.split()
        yield program, words[: 1 + (words[0] == "draw")], re.findall(r"(?<!\S)--[a-z-]+", rest)


@each_document
def test_commands_that_documents_name_exist(path, capsys):
    for program, words, options in commands(text_of(path)):
        try:
            status = PROGRAMS[program]([*words, "--help"])
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        assert status == 0, f"{path.name}: {program} {words}\n{printed.err}"
        for option in options:
            assert option in printed.out, f"{path.name}: {program} {words} {option}"


def script_options(text):
    """Script and option: ``tools/NAME.py ... --option``, or `tools/NAME.py` (`--option`)."""
    lines = text.replace("\\\n", " ")
    for name, rest in re.findall(r"\btools/(\w+)\.py(?:` \(`)?([^`\n#]*)", lines):
        for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
            yield name, option


@each_document
def test_options_of_scripts_that_documents_name_exist(path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    for name, option in script_options(own_text(path)):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            importlib.import_module(name).main()
        printed = capsys.readouterr().out
        assert re.search(rf"{option}(?![\w-])", printed), f"{path.name}: {name}.py {option}"


@each_document
def test_lines_of_commands_continue_after_one_backslash(path):
    for block in re.findall(r"```\w*\n(.*?)```", text_of(path), re.DOTALL):
        assert "\\\\\n" not in block, f"{path.name}: {block}"


def rows_of_results(*configs):
    """Rows of runs on a CPU without options."""
    with (REPOSITORY / "docs/results.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["config"] in configs and not r["opts"]]
    return [r for r in rows if "CPU" in r["machine"]]


def test_the_front_page_says_what_runs_of_the_demo_reached():
    rows = [r for r in rows_of_results("quick/sparse_rcnn_shapes") if r["nms"] == "off"]
    text = " ".join((REPOSITORY / "README.md").read_text().split())
    least, most = map(int, re.search(r"`make demo` .*? (\d+) to (\d+) AP50", text).groups())
    assert len(rows) >= 3
    assert all(least <= round(float(row["AP50"])) <= most for row in rows)


_KINDS = ("sparse_rcnn", "sparse_rcnn_dla", "sparse_rcnn_dpg", "dynamic_sparse_rcnn")


@pytest.mark.parametrize(("name", "kinds", "runs"), [
    ("README.md", ["sparse_rcnn_dense_dla"], 3),
    ("docs/CUSTOM_DATA.md", ["sparse_rcnn_dense_dla"], 3),
    ("configs/small/best_lite0.yaml", ["sparse_rcnn_dense_dla"], 3),
    ("configs/small/sparse_rcnn_dense_lite0_100pro.yaml", ["sparse_rcnn_dense"], 3),
    ("docs/RESULTS.md", _KINDS, 12),
    ("configs/small/sparse_rcnn_lite0_100pro.yaml", _KINDS, 12),
])  # fmt: skip
def test_the_time_of_a_small_training_is_that_of_its_runs(name, kinds, runs):
    rows = rows_of_results(*(f"small/{kind}_lite0_100pro" for kind in kinds))
    minutes = [float(r["minutes"]) for r in rows if r["set"] == "bccd"]
    text = " ".join((REPOSITORY / name).read_text().replace("#", " ").split())
    least, most = re.search(r"(\d+) to (\d+) minutes[^.]* on one CPU core", text).groups()
    assert len(minutes) >= 2 * runs  # without and with NMS
    assert int(least) <= round(min(minutes)) <= round(max(minutes)) <= int(most)


def test_the_readme_fits_on_a_few_screens():
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 160


def test_the_site_shows_every_page():
    def pages(entry):
        if isinstance(entry, str):
            return {entry}
        return set().union(*map(pages, entry.values() if isinstance(entry, dict) else entry))

    nav = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    assert {p.name for p in (REPOSITORY / "docs").glob("*.md")} <= pages(nav)
