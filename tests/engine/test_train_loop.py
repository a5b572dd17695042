import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from conftest import tiny_cfg
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


def loop_over(model, batches, *opts, rate=0.1, kind=torch.optim.SGD):
    optimizer = kind(model.parameters(), lr=rate)
    loop = TrainLoop.from_config(tiny_cfg(*opts), model, list(batches), optimizer)
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


def test_the_loader_starts_with_the_first_step():
    starts = []

    class Loader:
        def __iter__(self):
            starts.append(len(starts))
            return iter([[record(1.0, 1.0)], [record(1.0, 1.0)]])

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loop = TrainLoop.from_config(tiny_cfg(), model, Loader(), optimizer)
    assert not starts
    with EventStorage():
        loop.run_step()
        loop.run_step()
    assert starts == [0]


def test_gradients_that_are_not_finite_stop_before_the_weights_change():
    model = Model()
    before = copy.deepcopy(model.state_dict())
    model.layer.weight.register_hook(lambda gradient: gradient * float("inf"))
    with EventStorage(), pytest.raises(NonFiniteLossError, match="gradients are not finite"):
        loop_over(model, [[record(1.0, 2.0)]]).run_step()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("kind", [torch.optim.SGD, partial(torch.optim.AdamW, fused=True)])
def test_infinite_gradients_under_a_gradient_scaler_skip_the_step_and_lower_the_scale(kind):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    loop = loop_over(model, [[record(3.0, 4.0)]] * 2, kind=kind)
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=1e38, enabled=True)
    with EventStorage():
        loop.run_step()
        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
        assert loop.scaler.get_scale() == pytest.approx(5e37)


def test_the_scale_survives_a_resume():
    fp16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp16"]
    first, second = (loop_over(Model(), [], *fp16) for _ in range(2))
    first.scaler = torch.amp.GradScaler("cpu", init_scale=123.0, enabled=True)
    first.scaler.scale(torch.ones(1))
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == 123.0


def test_gradients_that_are_infinite_at_any_scale_end_training():
    model = Model()
    model.layer.weight.register_hook(lambda gradient: gradient * float("inf"))
    loop = loop_over(model, [[record(3.0, 4.0)]])
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=1e-5, enabled=True)
    with EventStorage(), pytest.raises(NonFiniteLossError):
        loop.run_step()


def test_fused_adamw_takes_the_same_steps_under_a_gradient_scaler():
    models = [Model()]
    models.append(copy.deepcopy(models[0]))
    for model, scale in zip(models, (None, 2.0**10), strict=True):
        batches = [[record(3.0, 4.0)], [record(-1.0, 0.5)], [record(2.0, 2.0)]]
        loop = loop_over(model, batches, rate=0.01, kind=partial(torch.optim.AdamW, fused=True))
        if scale:
            loop.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
        with EventStorage():
            for _ in batches:
                loop.run_step()
    for plain, scaled in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_by_config(precision):
    opts = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision]
    loop = loop_over(Model(), [], *opts)
    assert loop.precision == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert loop.scaler.is_enabled() == (precision == "fp16")
    state = loop.state_dict()
    assert ("scale" in state["grad_scaler"]) == (precision == "fp16")


def test_the_random_numbers_of_an_iteration_do_not_depend_on_what_was_before():
    drawn = []

    class Probe(Model):
        def forward(self, batch):
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
            return super().forward(batch)

    for noise in (0, 5):
        loop = loop_over(Probe(), [[record(1.0, 1.0)]] * 2)
        torch.rand(noise), np.random.rand(noise)
        with EventStorage():
            loop.run_step()
            loop.iter = 8
            loop.run_step()
    assert drawn[0] == drawn[2]
    assert drawn[1] == drawn[3]
    assert drawn[0] != drawn[1]


def test_a_model_that_cannot_count_beforehand_has_its_losses_averaged_over_the_parts():
    batch = [record(3.0, 4.0), record(1.0, -2.0)]
    updates = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = Model()
        before = model.layer.weight.detach().clone()
        options = ["SOLVER.ACCUMULATE", parts, "SOLVER.CLIP_GRADIENTS.ENABLED", False]
        with EventStorage() as storage:
            loop_over(model, [batch], *options).run_step()
        updates.append((model.layer.weight.detach() - before, storage.latest()["total_loss"][0]))
    torch.testing.assert_close(updates[0][0], updates[1][0])
    assert updates[0][1] == pytest.approx(updates[1][1])


def test_a_pass_that_counts_draws_what_the_pass_that_trains_draws():
    drawn = {"counted": [], "trained": []}

    class Probe(Model):
        def loss_normalizers(self, parts):
            drawn["counted"] = [torch.rand(1).item() for _ in parts]

        def forward(self, batch, **_):
            drawn["trained"].append(torch.rand(1).item())
            return super().forward(batch)

    loop = loop_over(Probe(), [[record(1.0, 1.0)] * 3], "SOLVER.ACCUMULATE", 3)
    with EventStorage():
        loop.run_step()
    assert drawn["counted"] == drawn["trained"]
    assert len(set(drawn["trained"])) == 3
