"""What the documents tell to type works."""

import re
import shlex
import subprocess
import sys

import pytest
from conftest import REPOSITORY, SMALL, write_coco

from dsrcnn.config.defaults import add_dsrcnn_config
from dsrcnn.config.load import find_config

DOCUMENTS = [REPOSITORY / "README.md", REPOSITORY / "datasets/README.md"]
DOCUMENTS += sorted((REPOSITORY / "docs").glob("*.md"))
# Few iterations of a tiny model, so that the test takes seconds.
SHORT = [*SMALL, "LOG.IMAGES", "0", "SOLVER.WARMUP_ITERS", "0"]


def blocks(path):
    """Commands of the first code block, one a line."""
    return re.search(r"```\n(.*?)```", path.read_text(), re.DOTALL)[1].strip().splitlines()


def test_the_guide_to_ones_own_data_works_line_by_line(tmp_path):
    for split in ("train", "val"):
        folder = tmp_path / "cells"
        write_coco(folder / f"annotations/instances_{split}.json", folder / f"images/{split}", 4)
    shifted = tmp_path / "cells/images/val"
    for path in shifted.glob("*.jpg"):  # other contents than those of the training images
        path.write_bytes(path.read_bytes() + b"\0")
    for line in blocks(REPOSITORY / "docs/CUSTOM_DATA.md"):
        words = shlex.split(line)
        if words[0] == "python":
            words = [sys.executable, str(REPOSITORY / words[1]), *words[2:]]
        else:
            words = [sys.executable, "-m", "dsrcnn.cli.main", *words[1:]]
        if "check-data" not in words:
            own = [] if "output/cells/config.yaml" in line else SHORT
            words += own
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr[-2000:]}"
    for name in ("pictures/cells.png", "pictures/augmented.png", "output/cells/model_best.pth"):
        assert (tmp_path / name).is_file(), name
    assert len(list((tmp_path / "pictures").glob("0*.png"))) == 4


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_keys_that_documents_name_exist(path):
    from detectron2.config import get_cfg

    known = {key for key, _ in walk(add_dsrcnn_config(get_cfg()))}
    # Nodes as well, and endings: `MODEL.EMA.DECAY`, `.WARMUP`.
    pattern = r"`((?:MODEL|SOLVER|INPUT|DATASETS|DATALOADER|TEST|LOG)\.[A-Za-z_.]*[A-Za-z_])[^`]*`"
    text = path.read_text()
    if path.name == "MIGRATION.md":  # keys of others are in the first column
        text = re.sub(r"^\|[^|]*\|", "|", text, flags=re.MULTILINE)
    for key in re.findall(pattern, text):
        assert any(k == key or k.startswith(f"{key}.") for k in known), f"{path.name}: {key}"


def walk(node, prefix=""):
    for name, value in node.items():
        yield f"{prefix}{name}", value
        if hasattr(value, "items"):
            yield from walk(value, f"{prefix}{name}.")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_configs_and_files_that_documents_name_exist(path):
    text = path.read_text()
    names = r"\b((?:coco|small|quick|voc|lvis|ablation)/[a-zA-Z]\w+)\b(?![/.*])"
    for name in re.findall(names, text):
        find_config(name)
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
