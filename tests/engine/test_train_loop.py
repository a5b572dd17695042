import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_cfg
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch import nn

from dsrcnn.engine.train_loop import TrainLoop
from dsrcnn.errors import NonFiniteLossError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, batch):
        values = self.layer(torch.tensor([r["x"] for r in batch]))
        return {"loss_a": values.square().mean() * 100, "loss_b": values.abs().mean()}


def loop_over(model, batches, *opts, rate=0.1):
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    base = SimpleTrainer(model, list(batches), optimizer)
    loop = TrainLoop.take_over(base, tiny_cfg(*opts))
    loop.iter = 7
    return loop


def record(*x, name="a.jpg"):
    return {"x": list(x), "file_name": name}


def test_the_update_is_the_clipped_gradient_also_under_a_gradient_scaler():
    start = Model()
    updates = []
    for scale in (None, 2.0**10):
        model = copy.deepcopy(start)
        loop = loop_over(model, [[record(3.0, 4.0)]])
        if scale:  # the scaler of a GPU run, here on the CPU
            loop.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
        with EventStorage():
            loop.run_step()
        updates.append([b - a for a, b in zip(start.parameters(), model.parameters(), strict=True)])
    norm = torch.cat([u.flatten() for u in updates[0]]).norm()
    assert norm.item() == pytest.approx(0.1 * 1.0, rel=1e-4)  # rate x CLIP_VALUE
    for plain, scaled in zip(*updates, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-6)


def test_without_clipping_the_update_is_the_gradient():
    model = Model()
    before = copy.deepcopy(model)
    loop = loop_over(model, [[record(3.0, 4.0)]], "SOLVER.CLIP_GRADIENTS.ENABLED", False)
    with EventStorage():
        loop.run_step()
    sum(before([record(3.0, 4.0)]).values()).backward()
    expected = before.layer.weight - 0.1 * before.layer.weight.grad
    torch.testing.assert_close(model.layer.weight, expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(value):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    batch = [record(1.0, 2.0, name="good.jpg"), record(value, 1.0, name="bad.jpg")]
    with EventStorage(), pytest.raises(NonFiniteLossError) as error:
        loop_over(model, [batch]).run_step()
    message = str(error.value)
    assert all(word in message for word in ("iteration 7", "loss_a", "loss_b", "bad.jpg"))
    assert "SOLVER.BASE_LR" in message
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_mixed_precision_on_a_cpu_is_bfloat16_without_a_scaler():
    seen = []

    class Probe(Model):
        def forward(self, batch):
            losses = super().forward(batch)
            seen.append(self.layer(torch.ones(1, 2)).dtype)
            return losses

    loop = loop_over(Probe(), [[record(1.0, 1.0)]], "SOLVER.AMP.ENABLED", True)
    with EventStorage():
        loop.run_step()
    assert seen == [torch.bfloat16]
    assert not loop.scaler.is_enabled()


def test_taking_over_does_not_start_the_loader_again():
    class Loader(SimpleNamespace):
        starts = 0

        def __iter__(self):
            self.starts += 1
            return iter([])

    loader, model = Loader(), Model()
    base = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.1))
    TrainLoop.take_over(base, tiny_cfg())
    assert loader.starts <= 1
