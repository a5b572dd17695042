"""docs/CONFIG.md is generated from the comments on the keys."""

import sys

import pytest
from conftest import REPOSITORY


@pytest.fixture
def config_docs(monkeypatch):
    """The script that writes the page."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import config_docs

    yield config_docs
    del sys.modules["config_docs"]


def test_page_is_up_to_date(config_docs):
    assert config_docs.PAGE.read_text() == config_docs.page()


def test_every_key_has_a_comment(config_docs):
    rows = [row for row in config_docs.page().splitlines() if row.startswith("| `")]
    assert len(rows) <= 166  # 164 new keys, and two of Detectron2 with another default
    assert not [row for row in rows if row.endswith("|  |")]


def test_readers_of_a_node_are_told_from_those_of_another_with_the_same_last_name(config_docs):
    readers = config_docs.readers_by_node()
    assert "dsrcnn/modeling/tta.py" in readers["TEST.AUG"]
    assert "dsrcnn/modeling/tta.py" not in readers["INPUT.AUG"]
    assert "dsrcnn/data/transforms/mosaic.py" in readers["INPUT.AUG"]
    assert "dsrcnn/data/transforms/mosaic.py" not in readers["TEST.AUG"]


def test_variables_that_stand_for_nodes_are_followed_within_their_function(config_docs):
    text = """
def first(cfg):
    node, top = cfg.INPUT, cfg.TEST
    aug = node.AUG
    return aug.WARP, top.LOSS, other.AUG

class Second:
    def third(self):
        node = self.cfg.TEST
        return node.AUG
"""
    names = {"INPUT", "INPUT.AUG", "INPUT.AUG.WARP", "TEST", "TEST.LOSS", "TEST.AUG"}
    assert config_docs.nodes_read(text) == names


def test_every_node_of_the_page_with_a_comment_has_readers(config_docs):
    assert "Read by ." not in config_docs.page()
