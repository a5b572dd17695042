"""The scripts under tools/, run as a user runs them."""

import csv
import importlib.util
import shutil
import subprocess
import sys

import cv2
import torch
import torchvision
from conftest import REPOSITORY, TINY, batch, tiny_cfg, write_coco
from detectron2.modeling import build_model

from dsrcnn.engine.checkpoint import ReportingCheckpointer

TOOLS = REPOSITORY / "tools"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_converted_torchvision_weights_give_torchvisions_features(tmp_path):
    theirs = torchvision.models.resnet18().eval()
    torch.nn.init.normal_(theirs.bn1.running_mean)
    source, target = tmp_path / "resnet18.pth", tmp_path / "R-18.pkl"
    torch.save(theirs.state_dict(), source)
    command = [sys.executable, TOOLS / "convert_torchvision.py", source, target]
    subprocess.run(command, check=True)
    model = build_model(tiny_cfg()).eval()
    ReportingCheckpointer(model).load(str(target))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours = model.backbone.bottom_up(image)["res5"]
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_experiments_run_once_each_and_are_summed_up_over_seeds(tmp_path, monkeypatch, capsys):
    experiments = load("experiments")
    ran = []

    def fake_run(data, name, config, seed, opts):
        ran.append((name, config, seed))
        values = dict.fromkeys(experiments.MEASURED, f"{10.0 * seed:.2f}")
        row = {"set": name, "config": config, "seed": seed, "opts": " ".join(opts), **values}
        row |= {"iterations": 5, "minutes": "1.0", "machine": "m", "torch": "t"}
        return [{**row, "nms": nms} for nms in ("off", "on")]

    monkeypatch.setattr(experiments, "run", fake_run)
    results = tmp_path / "results.csv"
    arguments = ["experiments.py", "--data", str(tmp_path), "--sets", "a", "--configs", "c"]
    arguments += ["--results", str(results), "--seeds"]
    for seeds in (["1"], ["1", "3"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *seeds])
        experiments.main()
    assert ran == [("a", "c", 1), ("a", "c", 3)]  # seed 1 was there already
    with results.open() as file:
        assert [row["AP"] for row in csv.DictReader(file)] == ["10.00", "10.00", "30.00", "30.00"]
    assert "| a | c | on | 1, 3 | 20.0 ± 14.1 |" in capsys.readouterr().out
    picture = tmp_path / "results.png"
    monkeypatch.setattr(sys, "argv", [*arguments, "1", "--plot", str(picture)])
    experiments.main()
    assert cv2.imread(str(picture)).std() > 5


def test_an_experiment_trains_and_is_evaluated_without_and_with_suppression(tmp_path, monkeypatch):
    experiments = load("experiments")
    data = tmp_path / "data" / "tiny"
    for split in ("train", "val"):
        write_coco(data / f"annotations/instances_{split}.json", data / f"images/{split}")
    monkeypatch.setattr(experiments, "ROOT", tmp_path)
    shutil.copy(REPOSITORY / "train_net.py", tmp_path)
    opts = [*map(str, TINY), "MODEL.SparseRCNN.NUM_CLASSES", "0", "MODEL.BACKBONE.FREEZE_AT", "0"]
    opts += ["SOLVER.MAX_ITER", "6", "SOLVER.IMS_PER_BATCH", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    rows = experiments.run(tmp_path / "data", "tiny", "small/sparse_rcnn_dla_R18_50pro", 3, opts)
    assert [row["nms"] for row in rows] == ["off", "on"]
    for row in rows:
        assert set(row) <= set(experiments.FIELDS)
        assert 0 <= float(row["AP"]) <= 100
        assert float(row["duplicates"]) >= 0
        assert row["iterations"] == 6


def test_a_model_whose_mixture_is_the_same_for_all_images_loses_nothing_when_frozen(
    tmp_path, monkeypatch, capsys
):
    freeze = load("freeze_proposals")
    dpg = ["MODEL.SparseRCNN.DPG.ENABLED", "True", "MODEL.SparseRCNN.DPG.ZERO_INIT", "True"]
    dpg += ["DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "()"]
    dynamic = build_model(tiny_cfg(*dpg)).eval()
    dynamic.proposals.fc2.bias.data.normal_()  # unequal weights, but no look at the image
    source, target = tmp_path / "dynamic.pth", tmp_path / "static.pth"
    torch.save({"model": dynamic.state_dict()}, source)
    arguments = ["freeze_proposals.py", "--config-file", "coco/sparse_rcnn_R50_100pro_3x"]
    arguments += ["--target", str(target), "--images", "3", *map(str, TINY), *dpg]
    monkeypatch.setattr(sys, "argv", [*arguments, "MODEL.WEIGHTS", str(source)])
    freeze.main()
    assert str(target) in capsys.readouterr().out
    static = build_model(tiny_cfg()).eval()
    static.load_state_dict(torch.load(target)["model"], strict=True)
    inputs = batch([(64, 96)], [0])
    with torch.no_grad():
        for a, b in zip(static.predict(inputs)[0], dynamic.predict(inputs)[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
