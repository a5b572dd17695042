"""The example of docs/EXTENDING.md runs."""

import re
import sys

import pytest
import torch
from conftest import QUICK, REPOSITORY, SMALL, TINY, batch, run_program
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from dsrcnn.modeling.matching import MATCHER_REGISTRY
from dsrcnn.modeling.proposals import PROPOSALS_REGISTRY

NAMES = {
    META_ARCH_REGISTRY: "MyRCNN",
    MATCHER_REGISTRY: "ThreeCheapest",
    PROPOSALS_REGISTRY: "GridProposals",
}


@pytest.fixture
def example():
    """Names defined by the code blocks of the page, run as one program."""
    text = (REPOSITORY / "docs/EXTENDING.md").read_text()
    *blocks, training = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict = {"training": training, "components": blocks[0]}
    exec("\n".join(blocks), namespace)
    yield namespace
    for registry, name in NAMES.items():
        registry._obj_map.pop(name)


def test_example_builds_a_detector_of_its_components_that_trains_and_detects(example):
    cfg = example["cfg"]
    cfg.merge_from_list([*TINY, "MODEL.SparseRCNN.NUM_PROPOSALS", 9])
    model = build_model(cfg)
    assert type(model) is example["MyRCNN"]
    assert type(model.matcher) is example["ThreeCheapest"]
    assert type(model.proposals) is example["GridProposals"]
    assert model.detection.nms_threshold == 0.7  # its assignment is one-to-many
    inputs = batch([(64, 96), (96, 64)], [2, 1])
    losses = model(inputs)
    sum(losses.values()).backward()
    assert model.proposals.features.weight.grad.abs().sum() > 0
    predictions, images = model.raw_predictions(inputs)
    assert torch.equal(predictions.stage, torch.tensor([0, 1]))
    boxes = model.proposals([], images.sizes).boxes
    assert boxes[0, 0].tolist() == pytest.approx([0, 0, 32, 64 / 3])  # a third of 96 x 64
    model.eval()
    assert len(model(inputs)[0]["instances"]) <= 9


def test_example_trains_in_the_same_program(example, tmp_path):
    example["words"] += [*map(str, SMALL), "OUTPUT_DIR", str(tmp_path)]
    exec(example["training"], example)
    assert "AP" in example["metrics"]["bbox"]


@pytest.mark.slow
def test_example_trains_by_a_copy_of_the_script_in_two_processes(example, tmp_path):
    (tmp_path / "my_rcnn.py").write_text(example["components"])
    script = (REPOSITORY / "train_net.py").read_text()
    script = script.replace("import sys\n", "import sys\n\nimport my_rcnn\n", 1)
    (tmp_path / "train_mine.py").write_text(script)
    words = [*example["words"], *map(str, SMALL), "OUTPUT_DIR", str(tmp_path / "out")]
    command = [sys.executable, str(tmp_path / "train_mine.py"), *QUICK, "--num-gpus", "2", *words]
    run_program(*map(str, command))
    assert (tmp_path / "out/model_final.pth").is_file()


def test_example_assigns_the_three_cheapest_proposals(example):
    matcher = example["ThreeCheapest"](costs=None)
    cost = torch.tensor([[[[4.0, 1.0, 3.0, 2.0, 5.0]]]])
    targets = type("T", (), {"mask": torch.ones(1, 1, dtype=torch.bool)})
    assignment = matcher.assign(cost, None, torch.tensor([0]), targets)
    assert assignment.tolist() == [[[-1, 0, 0, 0, -1]]]
