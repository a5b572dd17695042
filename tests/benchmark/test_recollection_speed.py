import pytest

from dsrcnn.cli.main import main

COMMAND = [
    *("benchmark-recollection", "--config-file", "quick/sparse_rcnn_shapes", "--repeats", "1"),
    *("--images", "1", "--size", "64", "64", "--objects", "2"),
]


def test_variants_are_measured_beside_the_plain_cascade(capsys):
    chosen = ["--variants", "start-1", "loop-1", "checkpoint-1", "dense"]
    options = ["--set", "MODEL.SparseRCNN.NUM_HEADS", "3"]
    assert main([*COMMAND, *chosen, *options]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| ")][1:]
    rows = {
        c[0]: [float(x) for x in c[1:]]
        for c in ([x.strip() for x in r.split("|")[1:-1]] for r in lines)
    }
    assert list(rows) == ["plain", "start-1", "loop-1", "checkpoint-1", "dense"]
    assert [rows[n][0] for n in rows] == [3, 6, 6, 6, 7]
    assert rows["plain"][2] == rows["plain"][3] == 1.0
    for name, (groups, _, ratio, share, _) in rows.items():
        assert share == pytest.approx(ratio * 3 / groups, abs=0.02), name
    stored = {name: row[-1] for name, row in rows.items()}
    assert stored["plain"] < stored["start-1"] < stored["dense"]
    assert stored["checkpoint-1"] < stored["start-1"]


def test_an_unknown_variant_is_one_message(capsys):
    assert main([*COMMAND, "--variants", "start-0"]) == 2
    assert "'start-0'; write dense, start-<stage>" in capsys.readouterr().err
