"""An experiment, charts of experiments, and the conversion of DPG to static proposals."""

import importlib
import json
import shutil
import sys

import pytest
import torch
from conftest import REPOSITORY, SMALL, TINY, batch, tiny_cfg, write_coco
from detectron2.modeling import build_model
from matplotlib.figure import Figure


@pytest.fixture
def load(monkeypatch):
    """Imports a script as Python does when running it: from the folder of the scripts."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    return importlib.import_module


def test_an_experiment_trains_and_is_evaluated_without_and_with_nms(tmp_path, monkeypatch, load):
    experiment_run = load("experiment_run")
    data = tmp_path / "data" / "tiny"
    for split in ("train", "val"):
        write_coco(data / f"annotations/instances_{split}.json", data / f"images/{split}")
    monkeypatch.setattr(experiment_run, "ROOT", tmp_path)
    shutil.copy(REPOSITORY / "train_net.py", tmp_path)
    names = ("tiny", "small/sparse_rcnn_dla_R18_50pro", 3, (*SMALL, "SOLVER.MAX_ITER", "6"))
    rows = experiment_run.run(experiment_run.Experiment(*names), tmp_path / "data")
    assert [r["nms"] for r in rows] == ["off", "on"]
    for r in rows:
        assert set(r) <= set(load("experiments").FIELDS)
        assert 0 <= float(r["AP"]) <= 100
        assert float(r["duplicates"]) >= 0
        assert r["iterations"] == 6


def entry(x, *, image=1, category=1, score=0.9, **more):
    ids = {"image_id": image, "category_id": category}
    return {**ids, "bbox": [x, 0, 10, 10], "score": score, **more}


ANNOTATIONS = [entry(0), entry(50), entry(0, category=2), entry(80, iscrowd=1)]


@pytest.mark.parametrize(("detections", "expected"), [
    ([entry(0), entry(51), entry(1, category=2)], 0),
    ([entry(0), entry(1), entry(2)], 2 / 3),  # IoU 0.82 and 0.67
    ([entry(0), entry(4)], 0),  # IoU 0.43: of no object
    ([entry(0), entry(1, score=0.2)], 0),
    ([entry(0), entry(0, image=2), entry(0, category=2)], 0),
    ([entry(80), entry(80)], 0),
])  # fmt: skip
def test_detections_of_an_object_beyond_the_first_are_duplicates(load, detections, expected):
    duplicates_per_object = load("experiment_run").duplicates_per_object
    assert duplicates_per_object(detections, ANNOTATIONS) == pytest.approx(expected)
    assert duplicates_per_object(detections, []) == 0


def row(config, seed, nms, ap, opts=""):
    names = {"set": "cells", "config": f"small/{config}", "opts": opts}
    return {**names, "seed": str(seed), "nms": nms, "AP": str(ap)}


@pytest.mark.parametrize(("rows", "labels", "bars", "dots"), [
    # A bar is the mean over seeds.
    ([row("one", 1, "off", 10), row("one", 2, "off", 20)], ["one"], [(0, 15)], [[10, 20]]),
    # Variants of a config stand together, in whatever order they were run.
    (
        [row("one", 1, "on", 10), row("two", 1, "on", 20), row("one", 1, "on", 30, "A.B 3")],
        ["one", "one\nB 3", "two"],
        [(0, 10), (1, 30), (2, 20)],
        [[10], [30], [20]],
    ),
    # Two bars lie around their label, a single one on it.
    (
        [row("one", 1, "off", 10), row("one", 1, "on", 20), row("two", 1, "on", 30, "A.B 3")],
        ["one", "two\nB 3"],
        [(-0.18, 10), (0.18, 20), (1, 30)],
        [[10], [20], [30]],
    ),
    # Values may be empty or have quotes.
    (
        [row("one", 1, "on", 10, "A.B  C.D 3"), row("one", 1, "on", 20, "A.B ['x','y']")],
        ["one\nB , D 3", "one\nB ['x','y']"],
        [(0, 10), (1, 20)],
        [[10], [20]],
    ),
])  # fmt: skip
def test_results_are_drawn_as_bars_and_dots(monkeypatch, tmp_path, load, rows, labels, bars, dots):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))
    load("draw_results").draw_results(rows, tmp_path / "results.png", metrics=["AP"])
    panel = saved[0].axes[0]
    assert [t.get_text() for t in panel.get_yticklabels()] == labels
    drawn = [(p.get_y() + p.get_height() / 2, p.get_width()) for p in panel.patches]
    assert drawn == [pytest.approx(bar) for bar in bars]
    assert [list(line.get_xdata()) for line in panel.lines] == dots


def test_lengths_of_a_variant_are_a_line_of_means_over_images_and_minutes(
    monkeypatch, tmp_path, load
):
    saved = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: saved.append(figure))

    def trained(iterations, minutes, seed, ap, opts=""):
        found = row("one", seed, "on", ap, f"{opts}SOLVER.MAX_ITER {iterations}")
        return {**found, "iterations": iterations, "minutes": minutes, "machine": "CPU"}

    rows = [trained("200", "5", 1, 40), trained("100", "2", 1, 20), trained("200", "7", 2, 50)]
    rows += [trained("100", "3", 1, 30, "A.B 3 "), {**trained("300", "9", 1, 60), "nms": "off"}]
    load("draw_lengths").draw_lengths(rows, tmp_path / "x.png", images=lambda *_: 4)
    over_images, over_minutes = saved[0].axes
    assert [t.get_text() for t in over_minutes.get_legend().get_texts()] == ["one"]
    for axes, expected in ((over_images, [400, 800]), (over_minutes, [2, 6])):
        assert list(axes.lines[0].get_xdata()) == expected
        assert list(axes.lines[0].get_ydata()) == [20, 45]


def test_the_options_of_lengths_keep_their_quotes(monkeypatch, tmp_path, load):
    seen = []

    def images(config, opts):
        seen.append(list(opts))
        return 4

    opts = ["MODEL.FPN.IN_FEATURES", "['res3','res4']", "MODEL.WEIGHTS", "", "SOLVER.MAX_ITER"]
    rows = [
        {
            **row("one", 1, "on", 10, " ".join([*opts, n])),
            "iterations": n,
            "minutes": n,
            "machine": "m",
        }
        for n in ("100", "200")
    ]
    load("draw_lengths").draw_lengths(rows, tmp_path / "x.png", images=images)
    assert seen == [[*opts, "100"], [*opts, "200"]]
    with pytest.raises(SystemExit, match=r"SOLVER\.MAX_ITER"):
        load("draw_lengths").draw_lengths(rows[:1], tmp_path / "x.png", images=lambda *_: 4)


def test_a_mixture_that_is_the_same_for_all_images_can_be_frozen_without_loss(
    tmp_path, monkeypatch, capsys, load
):
    freeze = load("freeze_proposals")
    dpg = ["MODEL.SparseRCNN.DPG.ENABLED", "True"]
    dpg += ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "()"]
    dynamic = build_model(tiny_cfg(*dpg)).eval()
    # Unequal weights, the same for all images: the weights of the last layer begin with zero.
    torch.nn.init.normal_(dynamic.proposals.fc2.bias)
    source, target = tmp_path / "dynamic.pth", tmp_path / "static.pth"
    torch.save({"model": dynamic.state_dict()}, source)
    arguments = ["freeze_proposals.py", "--config-file", "coco/sparse_rcnn_R50_100pro_3x"]
    arguments += ["--target", str(target), "--images", "3", *map(str, TINY), *dpg]
    monkeypatch.setattr(sys, "argv", [*arguments, "MODEL.WEIGHTS", str(source)])
    freeze.main()
    assert "evaluate it with MODEL.SparseRCNN.DPG.ENABLED False\n" in capsys.readouterr().out
    static = build_model(tiny_cfg()).eval()
    static.load_state_dict(torch.load(target)["model"], strict=True)
    inputs = batch([(64, 96)], [0])
    with torch.no_grad():
        expected, _ = dynamic.raw_predictions(inputs)
        frozen, _ = static.raw_predictions(inputs)
    torch.testing.assert_close(frozen.logits, expected.logits, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(frozen.boxes, expected.boxes, rtol=1e-4, atol=1e-3)


def test_the_time_to_a_target_ap_is_that_of_the_iterations_before_the_first_evaluation_with_it(
    tmp_path, capsys, load
):
    times = [{"iteration": i, "time": 2.0 if i % 40 else 9.0, "total_loss": 1.0} for i in (19, 299)]
    results = {99: 12.0, 149: 45.3, 199: 44.0, 249: 50.0}
    entries = [*times, *({"iteration": i, "bbox/AP": ap} for i, ap in results.items())]
    (tmp_path / "metrics.json").write_text("\n".join(map(json.dumps, entries)))
    script, file = load("time_to_ap"), tmp_path / "rows.csv"
    for _ in range(2):
        script.main([str(tmp_path), "--config", "small/mine", "--results", str(file)])
    assert "AP 45.30, iterations 150, s_per_it 2.000, minutes 5.0" in capsys.readouterr().out
    first, *rows = file.read_text().splitlines()
    assert first.startswith("version,revision,config,target,AP,iterations")
    assert len(rows) == 2
    assert all(",small/mine,45,45.30,150," in row for row in rows)
    # The evaluation at the end has the number of all iterations.
    entries = [{"iteration": 99, "time": 2.0}, {"iteration": 100, "bbox/AP": 46.0}]
    assert script.time_to_ap(entries, 45).iterations == 100
    with pytest.raises(SystemExit, match=r"AP of 60; the best of 4 has 50.0. Train longer"):
        script.main([str(tmp_path), "--config", "small/mine", "--target", "60"])
