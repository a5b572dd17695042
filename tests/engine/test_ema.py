import pytest
import torch
from conftest import batch, coco_options, quick_cfg, tiny_cfg, train
from detectron2.modeling import build_model
from torch import nn

from dsrcnn.engine.ema import AveragedWeights
from dsrcnn.engine.hooks import PreciseNorms
from dsrcnn.engine.main import evaluate
from dsrcnn.layers.norm import RunningNorm


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def set(self, value):
        with torch.no_grad():
            self.layer.weight.fill_(value)
            self.count.fill_(int(value))


def averaged(model, decay, values):
    """The average after the model had each of the values."""
    average = AveragedWeights(model, decay=decay)
    for index, value in enumerate(values):
        model.set(value)
        average.update() if index else average.start()
    return average


def test_the_average_is_exponential_and_integers_are_copied():
    weights = averaged(Model(), 0.05, (1.0, 2.0, 4.0)).weights()  # below the limits of the start
    assert weights["layer.weight"].item() == pytest.approx(0.05 * (0.05 + 0.95 * 2) + 0.95 * 4)
    assert weights["count"] == 4


def test_at_the_start_the_average_follows_faster():
    average = averaged(Model(), 0.9, (0.0, 1.0))  # one update: (1 + 1) / (10 + 1) is kept
    assert average.weights()["layer.weight"].item() == pytest.approx(1 - 2 / 11)
    for _ in range(200):
        average.update()
    assert average.current_decay() == 0.9


def test_an_error_while_the_average_is_swapped_in_restores_the_weights():
    model = Model()
    average = averaged(model, 0.1, (1.0, 3.0))
    weight = model.layer.weight

    def fail():
        with average.swapped_in():
            assert model.layer.weight.item() == pytest.approx(2.8)
            raise RuntimeError("evaluation failed")

    with pytest.raises(RuntimeError, match="evaluation failed"):
        fail()
    assert model.layer.weight is weight
    assert model.layer.weight.item() == 3.0
    assert average.weights()["layer.weight"].item() == pytest.approx(2.8)


def test_the_average_of_a_detector_has_its_keys_and_predicts_like_it():
    model = build_model(tiny_cfg("MODEL.SparseRCNN.DPG.ENABLED", True))
    average = AveragedWeights(model, decay=0.9998)
    average.start()
    assert list(average.weights()) == list(model.state_dict())
    model.eval()
    inputs = batch([(64, 64)], [1])
    boxes = model(inputs)[0]["instances"].pred_boxes.tensor
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    with average.swapped_in():
        assert torch.equal(model(inputs)[0]["instances"].pred_boxes.tensor, boxes)


def test_training_and_the_command_line_evaluate_the_average(tmp_path):
    options = ["MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.5, "SOLVER.MAX_ITER", 4]
    cfg = quick_cfg(tmp_path, *coco_options(tmp_path / "data"), *options, "LOG.IMAGES", 0)
    train(cfg)
    results = tmp_path / "inference/coco_instances_results.json"
    in_training = results.read_text()
    for name, is_average in (("final", True), ("0000003", True), ("0000003", False)):
        cfg.MODEL.WEIGHTS, cfg.MODEL.EMA.ENABLED = str(tmp_path / f"model_{name}.pth"), is_average
        results.unlink()
        evaluate(cfg)
        assert (results.read_text() == in_training) == is_average
    content = torch.load(cfg.MODEL.WEIGHTS)
    key = "head.head_series.0.linear1.weight"
    assert not torch.equal(content["model"][key], content["ema"]["model"][key])
    best, final = (torch.load(tmp_path / f"model_{n}.pth")["model"] for n in ("best", "final"))
    for key, value in content["ema"]["model"].items():
        assert torch.equal(best[key], value), key
        assert torch.equal(final[key], value), key


def test_precise_norms_are_computed_for_the_average_too(tmp_path):
    """Four images are one batch: their statistics under the weights are the precise ones."""
    options = [*coco_options(tmp_path), "MODEL.RESNETS.NORM", "BN", "MODEL.EMA.ENABLED", True]
    options += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 3, "SOLVER.BASE_LR", 1e-30]
    options += ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1]
    options += ["MODEL.SparseRCNN.DPG.ENABLED", True, "LOG.IMAGES", 0]
    trainer = train(quick_cfg(tmp_path / "out", *options))
    weights, average = trainer.model.state_dict(), trainer.average.weights()
    # DPG's running norms are the same in training and evaluation: nothing to be precise about.
    running = ("map_norm", "hidden_norm")
    names = [k for k in weights if k.endswith("running_var") and not any(n in k for n in running)]
    assert any("stair" in k for k in names)
    for name in names:  # running averages would still be near their start, 1
        torch.testing.assert_close(average[name], weights[name], rtol=1e-3, atol=1e-4)
        assert not torch.allclose(weights[name], torch.ones_like(weights[name]), atol=0.01), name


@pytest.mark.parametrize("images", [1, 2])
def test_precise_norms_leave_running_norms_alone(images):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.running = nn.BatchNorm1d(3), RunningNorm(3)

        def forward(self, x):
            return self.running(self.plain(x.repeat(2, 1)))[:images]

    model = Model().train()
    model.running.running_var.fill_(4.0)
    data = [torch.arange(3.0 * images).view(images, 3)] * 4
    PreciseNorms(0, model, data, 2).update_stats()
    assert model.running.running_var.tolist() == [4.0] * 3
    assert model.running.training
    assert model.plain.running_mean.tolist() == pytest.approx(data[0].mean(0).tolist())
