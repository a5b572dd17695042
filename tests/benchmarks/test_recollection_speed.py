import re

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.matrix_products import operations_of, operations_per_second
from benchmarks.memory import peak_memory_of
from benchmarks.recollection import _Step, _Variant, _variant
from dsrcnn.config.load import load_cfg
from dsrcnn.modeling.decoder.sqr import plain_windows

COMMAND = [
    *("recollection", "--config-file", "quick/sparse_rcnn_shapes", "--repeats", "1"),
    *("--images", "1", "--size", "64", "64", "--objects", "2"),
]


def test_variants_are_measured_beside_the_plain_cascade(capsys):
    chosen = ["--variants", "start-1", "loop-1", "official-1"]
    chosen += ["checkpoint-1", "checkpoint-1-chunk-1", "dense"]
    options = ["--set", "MODEL.SparseRCNN.NUM_HEADS", "5"]
    assert main([*COMMAND, *chosen, *options]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"would take at [1-9]\d* GFLOP/s", printed)
    lines = [x for x in printed.splitlines() if x.startswith("| ")][1:]
    rows = {
        c[0]: [float(x) for x in c[1:]]
        for c in ([x.strip() for x in r.split("|")[1:-1]] for r in lines)
    }
    assert list(rows) == ["plain", *chosen[1:]]
    assert [rows[n][0] for n in rows] == [5, 19, 19, 19, 19, 19, 31]
    assert rows["plain"][3] == rows["plain"][4] == 1.0
    for name, (groups, seconds, bound, ratio, share, _) in rows.items():
        assert 0 < bound < seconds, name
        assert share == pytest.approx(ratio * 5 / groups, abs=0.02), name
    bound = {name: row[2] for name, row in rows.items()}
    assert bound["start-1"] == bound["loop-1"] == bound["official-1"] < bound["checkpoint-1"]
    assert bound["start-1"] == pytest.approx(bound["plain"] * 19 / 5, rel=0.03)
    peak = {name: row[-1] for name, row in rows.items()}
    assert peak["plain"] < peak["start-1"] < peak["dense"]
    assert peak["checkpoint-1-chunk-1"] < peak["checkpoint-1"] < peak["start-1"]


def test_operations_are_two_for_every_product_of_two_numbers():
    first, second = torch.ones(3, 4, requires_grad=True), torch.ones(4, 5, requires_grad=True)
    assert operations_of(lambda: first @ second) == 2 * 3 * 4 * 5
    assert operations_of(lambda: (first @ second).sum().backward()) == 3 * 2 * 3 * 4 * 5
    assert 1e7 < operations_per_second(torch.device("cpu"), size=64) < 1e14


def test_groups_multiply_as_much_in_a_batch_as_one_by_one():
    cfg = load_cfg("quick/sparse_rcnn_shapes", ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    step = _Step(cfg, images=2, height=64, width=64, objects=2)
    plain, batch, loop, again = (
        step.operations(v)
        for v in (
            _Variant(plain_windows(3)),
            *(_variant(n, 3) for n in ("start-1", "loop-1", "checkpoint-1")),
        )
    )
    assert batch == loop
    assert batch == pytest.approx(plain * 6 / 3, rel=0.02)  # 1, 2 and 3 groups
    assert batch < again < 4 / 3 * batch


def test_peak_memory_is_that_of_the_tensors_that_are_there_at_once():
    block = 1 << 18  # float32 numbers: 1 MiB

    def run():
        first = torch.ones(4 * block)
        second = torch.ones(2 * block)  # 6 MiB
        del first
        return torch.ones(3 * block) + second[: 3 * block].sum()  # 2 + 3 + 3

    assert peak_memory_of(run) == pytest.approx(8 * 2**20, rel=0.01)


def test_a_loop_that_pools_as_the_official_head_computes_the_same():
    cfg = load_cfg("quick/sparse_rcnn_shapes", ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"])
    step = _Step(cfg, images=2, height=64, width=64, objects=2)
    losses = [step._losses(_variant(n, 3)) for n in ("official-1", "start-1", "loop-1")]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-5, atol=0)


def test_adamixer_has_nothing_to_pool_officially(capsys):
    command = ["recollection", "--config-file", "quick/adamixer_shapes"]
    assert main([*command, "--variants", "official-1"]) == 2
    assert "AdaMixer pools no RoIs; write loop-<stage>" in capsys.readouterr().err


def test_an_unknown_variant_is_one_message(capsys):
    assert main([*COMMAND, "--variants", "start-0"]) == 2
    assert "'start-0'; write dense, start-<stage>" in capsys.readouterr().err
