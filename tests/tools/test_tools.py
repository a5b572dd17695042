"""The scripts under tools/, run as a user runs them."""

import csv
import importlib.util
import subprocess
import sys

import torch
import torchvision
from conftest import REPOSITORY, tiny_cfg
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
        values = dict.fromkeys(experiments.METRICS, f"{10.0 * seed:.2f}")
        row = {"set": name, "config": config, "seed": seed, "opts": " ".join(opts), **values}
        return {**row, "iterations": 5, "minutes": "1.0", "machine": "m", "torch": "t"}

    monkeypatch.setattr(experiments, "run", fake_run)
    results = tmp_path / "results.csv"
    arguments = ["experiments.py", "--data", str(tmp_path), "--sets", "a", "--configs", "c"]
    arguments += ["--results", str(results), "--seeds"]
    for seeds in (["1"], ["1", "3"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *seeds])
        experiments.main()
    assert ran == [("a", "c", 1), ("a", "c", 3)]  # seed 1 was there already
    with results.open() as file:
        assert [row["AP"] for row in csv.DictReader(file)] == ["10.00", "30.00"]
    assert "| a | c  | 1, 3 | 20.0 ± 14.1 |" in capsys.readouterr().out
