"""Rows of docs/MIGRATION.md hold: keys, configs, commands and tests that they name exist."""

import re

import pytest
from conftest import REPOSITORY

import dsrcnn
from dsrcnn.config.load import find_config

PAGE = (REPOSITORY / "docs/MIGRATION.md").read_text()
HEADER = "| theirs | here | checked by |\n|---|---|---|\n"
# These look at all keys without naming each.
GENERAL = {"tests/config/test_config.py", "tests/config/test_validate.py"}
COMMON = {"always", "published", "there", "default", "without", "which", "their"}


def rows():
    """All rows of the page, as three cells each."""
    for table in PAGE.split(HEADER)[1:]:
        for line in table.split("\n\n")[0].splitlines():
            cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            yield pytest.param(cells, id=cells[0][:60])


each_row = pytest.mark.parametrize("cells", list(rows()))


def is_left_out(cells):
    return cells[1].startswith("left out")


def test_every_table_of_the_page_has_these_columns():
    assert PAGE.count("|---|---|---|\n") == PAGE.count("|---|---|") == PAGE.count(HEADER) == 8


@each_row
def test_a_row_says_what_became_of_an_option_and_which_test_checks_it(cells):
    theirs, here, test = cells
    assert theirs
    if is_left_out(cells):
        assert re.match(r"left out: .+ .+", here), "the reason"
        assert test == "-"
    else:
        assert here
        assert (REPOSITORY / test.strip("`")).is_file(), test


@each_row
def test_values_that_a_row_gives_to_keys_are_accepted(cells):
    tops = "MODEL|SOLVER|INPUT|DATASETS|DATALOADER|TEST|LOG|DETERMINISTIC"
    found = re.findall(rf"`((?:{tops})[\w.]*) ([^`]+)`", cells[1])
    options = [word for pair in found for word in pair]
    dsrcnn.load_cfg("coco/sparse_rcnn_R50_100pro_3x", options)


@each_row
def test_the_test_of_a_row_is_about_what_the_row_names(cells):
    test = cells[2].strip("`")
    if is_left_out(cells):
        return
    if test == "tests/config/test_shipped_configs.py":
        found = re.findall(r"[`\[]([\w-]+/[\w-]+)[`\]]", cells[1])
        assert found or "DATASETS" in cells[1] or cells[1] == "none", cells
        for name in found:
            find_config(name)
    elif test not in GENERAL:
        text = (REPOSITORY / test).read_text()
        words = {w for span in re.findall(r"`([^`]+)`", " ".join(cells[:2])) for w in names(span)}
        words |= set(re.findall(r"[a-z]{5,}", re.sub(r"`[^`]+`", "", " ".join(cells[:2])))) - COMMON
        assert any(word in text for word in words), f"{test} has none of {sorted(words)}"


def names(span):
    """Words of a code span that a test may have: last parts of keys, commands, options."""
    for word in span.split():
        found = {word.rsplit(".", 1)[-1], word.strip("-"), word.split("/")[-1].split(".")[0]}
        yield from (w for w in found if len(w) > 2)
