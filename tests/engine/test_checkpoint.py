import logging
import pickle

import pytest
import torch
from conftest import tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.engine.checkpoint import ReportingCheckpointer
from dsrcnn.errors import WeightsError


@pytest.fixture
def saved(tmp_path):
    model = build_model(tiny_cfg())
    ReportingCheckpointer(model, str(tmp_path)).save("weights")
    return tmp_path / "weights.pth"


def load(path, *opts, strict=False):
    model = build_model(tiny_cfg(*opts))
    checkpointer = ReportingCheckpointer(model, strict=strict)
    checkpointer.load(str(path))
    return model


def test_saved_files_hold_the_official_keys_under_model(saved):
    content = torch.load(saved)
    assert "init_proposal_features.weight" in content["model"]
    assert "head.head_series.1.inst_interact.dynamic_layer.weight" in content["model"]


def test_a_complete_file_is_loaded_whole_and_reported(saved, caplog):
    torch.manual_seed(1)
    with caplog.at_level(logging.INFO):
        model = load(saved, strict=True)
    total = len(model.state_dict())
    assert f"{total} of {total} tensors loaded" in caplog.text
    for key, value in torch.load(saved)["model"].items():
        assert torch.equal(model.state_dict()[key], value)


def test_other_classes_start_anew_and_are_reported(saved, caplog):
    with caplog.at_level(logging.INFO):
        load(saved, "MODEL.SparseRCNN.NUM_CLASSES", 3)
    assert "head.head_series.0.class_logits.weight (5, 32) in the file, (3, 32)" in caplog.text
    assert "The file has 5 classes, the model 3" in caplog.text


def test_evaluating_weights_of_another_class_count_is_an_error(saved):
    with pytest.raises(WeightsError, match="The file has 5 classes, the model 3"):
        load(saved, "MODEL.SparseRCNN.NUM_CLASSES", 3, strict=True)


def test_what_is_missing_and_what_is_not_used_is_reported(saved, caplog):
    content = torch.load(saved)
    del content["model"]["init_proposal_boxes.weight"]
    content["model"]["ema.decay"] = torch.ones(1)
    torch.save(content, saved)
    with caplog.at_level(logging.INFO):
        load(saved)
    assert "Not in the file, start anew: init_proposal_boxes.weight (1)" in caplog.text
    assert "In the file, not used: ema.decay (1)" in caplog.text
    with pytest.raises(WeightsError, match="init_proposal_boxes"):
        load(saved, strict=True)


def test_a_file_that_is_no_checkpoint_is_an_error(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(WeightsError, match="cannot be read"):
        load(path)


def test_a_truncated_file_is_an_error(saved):
    saved.write_bytes(saved.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="cannot be read"):
        load(saved)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(WeightsError, match="do not exist"):
        load(tmp_path / "nothing.pth")


def test_evaluating_without_weights_is_an_error():
    with pytest.raises(WeightsError, match="random weights"):
        load("", strict=True)


def test_backbone_weights_in_detectron2_format_fill_the_backbone(tmp_path, caplog):
    bottom_up = build_model(tiny_cfg()).backbone.bottom_up.state_dict()
    state = {k: v.numpy() for k, v in bottom_up.items()} | {"fc.weight": torch.ones(2).numpy()}
    path = tmp_path / "R-18.pkl"
    content = {"model": state, "__author__": "test", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    torch.manual_seed(1)
    with caplog.at_level(logging.INFO):
        model = load(path)
    for key, value in bottom_up.items():
        assert torch.equal(model.backbone.bottom_up.state_dict()[key], value)
    assert "Not in the file, start anew: backbone.fpn_lateral2" in caplog.text
    assert "In the file, not used: fc.weight" in caplog.text


def test_a_last_checkpoint_that_is_gone_is_passed_over(saved):
    (saved.parent / "last_checkpoint").write_text("model_0000009.pth")
    saved.rename(saved.parent / "model_0000004.pth")
    checkpointer = ReportingCheckpointer(build_model(tiny_cfg()), str(saved.parent))
    checkpointer.resume_or_load("", resume=True)
    assert checkpointer.get_checkpoint_file().endswith("model_0000009.pth")  # that is what it says
    with pytest.raises(WeightsError, match="model_0000009"):
        ReportingCheckpointer(build_model(tiny_cfg())).load(checkpointer.get_checkpoint_file())


def test_weights_of_pycls_load_as_in_detectron2(saved, tmp_path):
    weights = torch.load(saved)["model"]
    path = tmp_path / "weights.pyth"
    torch.save({"model_state": weights, "epoch": 3}, path)
    model = load(path)
    assert torch.equal(
        model.state_dict()["backbone.fpn_lateral2.weight"], weights["backbone.fpn_lateral2.weight"]
    )
