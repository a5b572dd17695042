import pytest

from benchmarks.__main__ import main
from benchmarks.asag import compare_patches

COMMAND = [
    *("asag", "--baseline", "quick/sparse_rcnn_shapes", "--repeats", "1"),
    *("--size", "64", "96", "--queries", "10", "--patches", "2"),
]


def rows_of(text):
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_levels_are_measured_beside_the_cascade(capsys):
    configs = ["--configs", "quick/asag_a_shapes", "quick/asag_s_shapes"]
    assert main([*COMMAND, *configs, "--set", "MODEL.DEVICE", "cpu"]) == 0
    rows = [row for row in rows_of(capsys.readouterr().out) if "shapes" in row[0]]
    names = [f"quick/asag_{kind}_shapes, {k}P6" for kind in "as" for k in ("P5", "P4", "P3")]
    assert [row[0] for row in rows] == ["quick/sparse_rcnn_shapes", *names]
    assert rows[0][1] == "10"
    assert all(0 < int(row[1]) <= 10 for row in rows)
    assert rows[0][5:] == ["1.00", "1.00"]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


def test_patches_are_measured_in_all_ways():
    rows = rows_of(compare_patches((1, 3), height=200, width=300, repeats=1))
    assert [row[0] for row in rows] == ["1", "3"]
    for row in rows:
        loop, together, ratio = map(float, row[1:4])
        assert ratio == pytest.approx(loop / together, rel=0.2)


def test_a_config_of_another_architecture_is_refused(capsys):
    assert main([*COMMAND, "--configs", "quick/sparse_rcnn_shapes"]) == 2
    assert "quick/sparse_rcnn_shapes is no config of ASAG" in capsys.readouterr().err
