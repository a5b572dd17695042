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
    assert len(rows) <= 167  # 165 new keys, and two of Detectron2 with another default
    assert not [row for row in rows if row.endswith("|  |")]
