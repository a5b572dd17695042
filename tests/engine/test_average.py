import pytest
import torch
from conftest import batch, coco_options, quick_cfg, tiny_cfg
from detectron2.modeling import build_model
from torch import nn

from dsrcnn.engine.ema import AveragedWeights
from dsrcnn.engine.main import evaluate
from dsrcnn.engine.trainer import Trainer


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def set_to(model, value):
    with torch.no_grad():
        model.layer.weight.fill_(value)
        model.count.fill_(int(value))


def test_the_average_is_an_exponential_one():
    model = Model()
    set_to(model, 1.0)
    average = AveragedWeights(model, decay=0.9, warmup=False)
    average.start()
    for value in (2.0, 4.0):
        set_to(model, value)
        average.update()
    assert average.weights()["layer.weight"].item() == pytest.approx(0.9 * (0.9 + 0.2) + 0.4)
    assert average.weights()["count"] == 4  # whole numbers have no average


def test_with_a_warmup_the_start_is_forgotten_sooner():
    model = Model()
    set_to(model, 0.0)
    average = AveragedWeights(model, decay=0.9, warmup=True)
    average.start()
    set_to(model, 1.0)
    average.update()  # after one update of eleven: (1 + 1) / (10 + 1)
    assert average.weights()["layer.weight"].item() == pytest.approx(1 - 2 / 11)
    for _ in range(200):
        average.update()
    assert average.current_decay() == 0.9


def test_the_model_has_its_own_weights_again_whatever_happens_in_between():
    model = Model()
    set_to(model, 1.0)
    average = AveragedWeights(model, decay=0.5, warmup=False)
    average.start()
    set_to(model, 3.0)
    average.update()
    weight = model.layer.weight

    def fail():
        with average.in_place_of_the_weights():
            assert model.layer.weight.item() == 2.0
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        fail()
    assert model.layer.weight is weight
    assert model.layer.weight.item() == 3.0
    assert average.weights()["layer.weight"].item() == 2.0


def test_the_average_of_a_detector_has_its_keys_and_predicts_like_it():
    model = build_model(tiny_cfg("MODEL.SparseRCNN.DPG.ENABLED", True))
    average = AveragedWeights(model)
    average.start()
    assert list(average.weights()) == list(model.state_dict())
    model.eval()
    inputs = batch([(64, 64)], [1])
    own = model(inputs)[0]["instances"].pred_boxes.tensor
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    with average.in_place_of_the_weights():
        assert torch.equal(model(inputs)[0]["instances"].pred_boxes.tensor, own)


def test_training_evaluates_the_average_and_so_does_the_command_line(tmp_path):
    options = ["MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.5, "SOLVER.MAX_ITER", 4]
    cfg = quick_cfg(tmp_path, *coco_options(tmp_path / "data"), *options, "LOG.IMAGES", 0)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    found = evaluate(cfg)["bbox"]
    assert found["AP50"] == pytest.approx(trainer._last_eval_results["bbox"]["AP50"], nan_ok=True)
    content = torch.load(cfg.MODEL.WEIGHTS)
    own, averaged = content["model"], content["ema"]["model"]
    assert not torch.equal(own["head.head_series.0.linear1.weight"],
                           averaged["head.head_series.0.linear1.weight"])  # fmt: skip
    best = torch.load(tmp_path / "model_best.pth")["model"]
    for key, value in averaged.items():
        assert torch.equal(best[key], value), key


def test_precise_norms_are_those_of_the_average_too(tmp_path):
    """Four images are one batch: their statistics under the weights are the precise ones."""
    options = [*coco_options(tmp_path), "MODEL.RESNETS.NORM", "BN", "MODEL.EMA.ENABLED", True]
    options += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "SOLVER.BASE_LR", 0.0]
    options += ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1]
    options += ["MODEL.SparseRCNN.DPG.ENABLED", True, "LOG.IMAGES", 0]
    trainer = Trainer(quick_cfg(tmp_path / "out", *options))
    trainer.train()
    own, averaged = trainer.model.state_dict(), trainer.average.weights()
    names = [k for k in own if k.endswith("running_var")]
    assert any("logit_norm" in k for k in names)
    for name in names:  # running averages would still be near their start, 1
        torch.testing.assert_close(averaged[name], own[name], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(own[name], torch.ones_like(own[name]), atol=0.01), name
