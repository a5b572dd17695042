import logging
import pickle

import pytest
import torch
from conftest import tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.engine.checkpoint import Checkpointer
from dsrcnn.errors import WeightsError


@pytest.fixture
def saved(tmp_path):
    Checkpointer(build_model(tiny_cfg()), str(tmp_path)).save("weights")
    return tmp_path / "weights.pth"


def load(path, *opts, strict=False):
    torch.manual_seed(1)
    model = build_model(tiny_cfg(*opts))
    Checkpointer(model, strict=strict).load(str(path))
    return model


def test_files_have_the_official_keys_and_load_completely(saved, caplog):
    weights = torch.load(saved)["model"]
    assert "init_proposal_features.weight" in weights
    assert "head.head_series.1.inst_interact.dynamic_layer.weight" in weights
    with caplog.at_level(logging.INFO):
        model = load(saved, strict=True)
    assert f"{len(weights)} of {len(weights)} tensors loaded" in caplog.text
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value)


def test_other_classes_are_reported_in_training_and_an_error_in_evaluation(saved, caplog):
    load(saved, "MODEL.SparseRCNN.NUM_CLASSES", 3)
    assert "head.head_series.0.class_logits.weight (5, 32) in the file, (3, 32)" in caplog.text
    assert "The classifier of the file has 5 outputs, the model's 3" in caplog.text
    with pytest.raises(WeightsError, match="The classifier of the file has 5 outputs, the model's"):
        load(saved, "MODEL.SparseRCNN.NUM_CLASSES", 3, strict=True)


def test_missing_and_unused_tensors_are_reported(saved, caplog):
    content = torch.load(saved)
    del content["model"]["init_proposal_boxes.weight"]
    content["model"]["ema.decay"] = torch.ones(1)
    torch.save(content, saved)
    load(saved)
    assert "Not in the file: init_proposal_boxes.weight (1)" in caplog.text
    assert "In the file but not in the model: ema.decay (1)" in caplog.text
    with pytest.raises(WeightsError, match="init_proposal_boxes"):
        load(saved, strict=True)


@pytest.mark.parametrize(("path", "words"), [("gone.pth", "do not exist"), ("", "random weights")])
def test_evaluating_without_weights_is_an_error(path, words):
    with pytest.raises(WeightsError, match=words):
        load(path, strict=True)


def test_backbone_weights_in_detectron2_format_fill_the_backbone(tmp_path, caplog):
    bottom_up = build_model(tiny_cfg()).backbone.bottom_up.state_dict()
    state = {k: v.numpy() for k, v in bottom_up.items()} | {"fc.weight": torch.ones(2).numpy()}
    path = tmp_path / "R-18.pkl"
    content = {"model": state, "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    model = load(path)
    for key, value in bottom_up.items():
        assert torch.equal(model.backbone.bottom_up.state_dict()[key], value)
    assert "Not in the file: backbone.fpn_lateral2" in caplog.text
    assert "In the file but not in the model: fc.weight" in caplog.text


def test_a_last_checkpoint_that_is_gone_is_skipped(saved):
    (saved.parent / "last_checkpoint").write_text("model_0000009.pth")
    saved.rename(saved.parent / "model_0000004.pth")
    checkpointer = Checkpointer(build_model(tiny_cfg()), str(saved.parent))
    checkpointer.resume_or_load("", resume=True)
    assert checkpointer.get_checkpoint_file().endswith("model_0000009.pth")
    with pytest.raises(WeightsError, match="model_0000009"):
        load(checkpointer.get_checkpoint_file())


def test_weights_of_pycls_load_as_in_detectron2(saved, tmp_path):
    weights = torch.load(saved)["model"]
    path = tmp_path / "weights.pyth"
    torch.save({"model_state": weights, "epoch": 3}, path)
    key = "backbone.fpn_lateral2.weight"
    assert torch.equal(load(path).state_dict()[key], weights[key])
