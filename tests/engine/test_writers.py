import csv
import sys
from types import SimpleNamespace

import pytest
from conftest import quick_cfg
from detectron2.utils.events import EventStorage

from dsrcnn.engine.writers import CsvWriter, build_writers
from dsrcnn.errors import ConfigError


def test_the_table_has_a_line_per_number_and_goes_on_after_a_resume(tmp_path):
    path = tmp_path / "metrics.csv"
    for start in (0, 2):
        writer = CsvWriter(path)
        with EventStorage(start) as storage:
            for iteration in (start, start + 1):
                storage.iter = iteration
                storage.put_scalars(loss=float(iteration), smoothing_hint=False)
                writer.write()
                writer.write()  # nothing new
        writer.close()
    rows = list(csv.DictReader(path.open()))
    assert [(r["iteration"], r["name"], float(r["value"])) for r in rows] == [
        (str(i), "loss", float(i)) for i in range(4)
    ]


def test_without_wandb_its_key_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        build_writers(quick_cfg(tmp_path, "LOG.WANDB_PROJECT", "mine"), 10)


def test_a_resumed_training_goes_on_in_its_wandb_run(tmp_path, monkeypatch):
    started, sent = [], []

    def init(**arguments):
        started.append(arguments)
        log = lambda values, step: sent.append((step, values))  # noqa: E731
        return SimpleNamespace(id="run7", log=log, finish=lambda: sent.append("end"))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    cfg = quick_cfg(tmp_path, "LOG.WANDB_PROJECT", "mine")
    for _ in range(2):
        writer = build_writers(cfg, 10)[-1]
    with EventStorage(3) as storage:
        storage.put_scalars(loss=2.0, smoothing_hint=False)
        writer.write()
        writer.write()
    writer.close()
    assert [s["id"] for s in started] == [None, "run7"]
    assert started[0]["project"] == "mine"
    assert sent == [(3, {"loss": 2.0}), "end"]
