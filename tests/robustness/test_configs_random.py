"""Valid configs, changed at random: either a config, or one message on one line."""

import logging
import math

import pytest
import yaml
from conftest import SMALL
from detectron2.config import CfgNode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsrcnn.config import load_cfg, read_cfg, shipped_configs
from dsrcnn.errors import DsrcnnError

NAMES = [name for name in shipped_configs() if name.startswith("quick/")]
TEXTS = {name: read_cfg(name, SMALL).dump() for name in NAMES}
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
# Values of every kind, as they come from YAML or a command line.
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([-1, 0, 1, 10**30, -0.0, math.nan, math.inf, "", "cpu", "None", "(", "1e3"]),
)  # fmt: skip
LISTS = st.lists(SCALARS, max_size=3)
VALUES = st.one_of(SCALARS, LISTS, LISTS.map(tuple), st.dictionaries(st.text(max_size=4), LISTS))


def leaves(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, (dict, CfgNode)):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name


KEYS = sorted(leaves(read_cfg(NAMES[0])))


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def config_or_message(load, *arguments):
    """Return a config, or None if it is refused as it should be."""
    try:
        return load(*arguments)
    except DsrcnnError as error:
        message = str(error)
        assert message.strip()
        assert "\n" not in message.rstrip("\n")
        assert "Traceback" not in message
        assert len(message) < 1500
        return None


@settings(max_examples=300, **SETTINGS)
@given(st.sampled_from(NAMES), st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=3))
def test_random_overrides(name, pairs):
    opts = [word for pair in pairs for word in pair]
    cfg = config_or_message(load_cfg, name, [*SMALL, *opts])
    if cfg is not None:
        assert math.isfinite(cfg.SOLVER.BASE_LR)
        assert cfg.SOLVER.BASE_LR > 0
        assert cfg.SOLVER.MAX_ITER >= 1


@settings(max_examples=150, **SETTINGS)
@given(st.lists(st.text(max_size=12), max_size=5), st.sampled_from(KEYS))
def test_random_words(words, key):
    config_or_message(load_cfg, NAMES[0], [*words, key])
    config_or_message(load_cfg, NAMES[0], [key, *words])


def edited(text, edits):
    """Delete, double, exchange or insert pieces of a text."""
    for kind, place, size, piece in edits:
        start = place % (len(text) + 1)
        end = start + size
        inserted = {"delete": "", "double": text[start:end] * 2, "insert": piece}[kind]
        text = text[:start] + inserted + text[end if kind != "insert" else start :]
    return text


PIECES = st.one_of(
    st.sampled_from([*":[]{}'\"-\n \t\0\ufeff", "&a", "*a", "<<: ", "|\n", "!!int ",
                     "!!python/name:os.system ", "_BASE_: x.yaml\n"]),
    st.text(max_size=4),
)  # fmt: skip
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["delete", "double", "insert"]),
        st.integers(0, 10**6),
        st.integers(1, 40),
        PIECES,
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=60, **SETTINGS)
@given(st.sampled_from(NAMES), EDITS)
def test_random_edits_of_a_file(tmp_path, name, edits):
    path = tmp_path / "mine.yaml"
    # The part of a file that users write; a whole dump takes ten times as long to parse.
    content = yaml.safe_load(TEXTS[name])
    kept = {key: content[key] for key in ("SOLVER", "INPUT", "DATASETS", "SEED")}
    path.write_text(edited(yaml.safe_dump(kept), edits), encoding="utf-8", errors="replace")
    config_or_message(load_cfg, path, [*SMALL, "MODEL.SparseRCNN.NUM_CLASSES", "5"])


@settings(max_examples=150, **SETTINGS)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda t: t.encode("utf-8"))))
def test_random_files(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    config_or_message(read_cfg, path)


NODES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["MODEL", "SOLVER", "FPN", "NORM", "STEPS", "_BASE_", "VERSION", "X"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=200, **SETTINGS)
@given(NODES)
def test_random_trees(tmp_path, tree):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="replace")
    config_or_message(read_cfg, path)
