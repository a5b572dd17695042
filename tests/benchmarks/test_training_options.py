import re

import pytest
from conftest import TINY

from benchmarks.__main__ import main
from benchmarks.speed import Measurement, Variant
from benchmarks.training import OPTIONS, table_of_options
from dsrcnn.config import read_cfg

SMALL = [*map(str, TINY), "MODEL.SparseRCNN.NUM_CLASSES", "0"]
SHAPE = [
    *("--images", "2", "--size", "64", "64", "--objects", "2"),
    *("--repeats", "2", "--threads", "1"),
]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_a_valid_config(name):
    read_cfg("quick/sparse_rcnn_shapes", OPTIONS[name])


def test_options_are_measured_beside_each_other_and_the_loader_too(capsys):
    command = ["training", "--config-file", "quick/sparse_rcnn_shapes", *SHAPE]
    chosen = ["--options", "float32", "checkpoint"]
    assert main([*command, *chosen, "--loader", "--set", *SMALL]) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == ["float32", "checkpoint"]
    assert [float(rows[0][i]) for i in (2, 4)] == [1.0, 1.0]
    assert all(float(cell) > 0 for row in rows for cell in row[1:])
    assert float(re.search(r"loader: ([\d.]+) images/s", printed)[1]) > 0


def test_ratios_pair_rounds_that_were_neighbours_in_time():
    first = [{"iteration": t, "peak memory (MiB)": 100.0} for t in (1.0, 2.0, 4.0)]
    other = [{"iteration": 1.5 * r["iteration"], "peak memory (MiB)": 50.0} for r in first]
    measured = [Measurement(Variant(n, "c"), r) for n, r in (("a", first), ("b", other))]
    row = table_of_options(measured).splitlines()[-1].split("|")
    assert [cell.strip() for cell in row[1:-1]] == ["b", "3.000", "1.50", "50", "0.50"]


def test_an_unknown_option_is_one_message(capsys):
    command = ["training", "--config-file", "quick/sparse_rcnn_shapes"]
    assert main([*command, "--options", "float8"]) == 2
    assert "'float8'; write some of float32, bf16" in capsys.readouterr().err
