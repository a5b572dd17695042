import pytest
import torch
from conftest import REPOSITORY, TINY, batch, tiny_cfg
from detectron2.modeling import build_model

from benchmarks import Variant, compare
from benchmarks.plain import OPTIMISATIONS, undo
from benchmarks.speed import Measurement, format_table
from dsrcnn.errors import ConfigError

OPTS = [*map(str, TINY), "DATASETS.TRAIN", "()", "DATASETS.TEST", "()"]
SHAPE = {"images": 1, "height": 64, "width": 64, "objects": 2, "repeats": 2}


@pytest.mark.parametrize("names", [*[[n] for n in OPTIMISATIONS], list(OPTIMISATIONS)])
def test_undoing_an_optimisation_changes_no_number(names):
    model, inputs = build_model(tiny_cfg()), batch([(64, 96), (96, 64)], [3, 2])
    expected = model(inputs)
    undo(model, names)
    found = model(inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_two_variants_are_measured_in_turn_by_part():
    # The second runs from a checkout, here this one.
    config = "coco/sparse_rcnn_R50_100pro_3x"
    variants = [
        Variant("A", config, OPTS),
        Variant("B", config, OPTS, str(REPOSITORY), without=("norms", "optimizer")),
    ]
    measured = compare(variants, mode="train", **SHAPE)
    assert [len(m.rounds) for m in measured] == [2, 2]
    for m in measured:
        parts = m.rounds[0]
        assert parts["backbone"] + parts["head"] < parts["forward"]
        total = parts["forward"] + parts["backward"] + parts["optimizer"]
        assert total == pytest.approx(parts["step"])
        assert parts["peak memory (MiB)"] > 0
    assert "B / A" in format_table(measured)


def test_the_factor_pairs_neighbouring_rounds():
    # B is always twice as slow although the machine slows down in between.
    a = Measurement(Variant("A", ""), [{"step": 1.0}, {"step": 10.0}, {"step": 2.0}])
    b = Measurement(Variant("B", ""), [{"step": 2.0}, {"step": 20.0}, {"step": 4.0}])
    row = format_table([a, b]).splitlines()[-1].split("|")
    assert [cell.strip() for cell in row[1:-1]] == ["step", "2000.0", "4000.0", "2.00"]


def test_a_variant_that_cannot_start_is_named():
    with pytest.raises(ConfigError, match="'A' could not be measured"):
        compare([Variant("A", "no/such_config")], mode="inference", **SHAPE)
