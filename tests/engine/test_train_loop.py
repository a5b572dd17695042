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
from dsrcnn.utils.training import TrainableModel, iteration_ends, training_context

ADAMW = partial(torch.optim.AdamW, fused=True)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, batch):
        values = self.layer(torch.tensor([r["x"] for r in batch]))
        return {"loss_a": values.square().mean() * 100, "loss_b": values.abs().mean()}


def loop_over(model, batches, *opts, rate=0.1, kind=torch.optim.SGD, scale=None, late=None):
    optimizer = kind(model.parameters(), lr=rate)
    loop = TrainLoop.from_config(tiny_cfg(*opts), model, list(batches), optimizer)
    loop.reads_late = late  # as on a GPU, here on the CPU
    if scale:  # the scaler of a GPU run, here on the CPU
        loop.scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=True)
    loop.iter = 7
    return loop


def run(loop, steps=1):
    with EventStorage() as storage:
        for _ in range(steps):
            loop.run_step()
    return storage.latest()


def record(*x, name="a.jpg"):
    return {"x": list(x), "file_name": name}


@pytest.mark.parametrize("clips", [True, False])
def test_the_update_is_the_gradient_clipped_if_configured(clips):
    model = Model()
    before = copy.deepcopy(model)
    run(loop_over(model, [[record(3.0, 4.0)]], "SOLVER.CLIP_GRADIENTS.ENABLED", clips))
    sum(before([record(3.0, 4.0)]).values()).backward()
    gradients = [p.grad for p in before.parameters()]
    norm = torch.cat([g.flatten() for g in gradients]).norm() if clips else 1.0  # to CLIP_VALUE 1
    for old, new, gradient in zip(before.parameters(), model.parameters(), gradients, strict=True):
        torch.testing.assert_close(new, old - 0.1 * gradient / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, ADAMW])
def test_a_gradient_scaler_does_not_change_the_steps(kind):
    models = [Model()]
    models.append(copy.deepcopy(models[0]))
    batches = [[record(3.0, 4.0)], [record(-1.0, 0.5)], [record(2.0, 2.0)]]
    for model, scale in zip(models, (None, 2.0**10), strict=True):
        run(loop_over(model, batches, rate=0.01, kind=kind, scale=scale), steps=3)
    for plain, scaled in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(value):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    batch = [record(1.0, 2.0, name="good.jpg"), record(value, 1.0, name="bad.jpg")]
    with pytest.raises(NonFiniteLossError) as error:
        run(loop_over(model, [batch]))
    words = ("iteration 7", "loss_a", "loss_b", "bad.jpg", "SOLVER.BASE_LR")
    assert all(word in str(error.value) for word in words)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("scale", [None, 1e-5], ids=["float32", "float16 at any scale"])
def test_gradients_that_are_not_finite_stop_before_the_weights_change(scale):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    model.layer.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLossError, match="gradients are not finite"):
        run(loop_over(model, [[record(1.0, 2.0)]], scale=scale))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


@pytest.mark.parametrize("kind", [torch.optim.SGD, ADAMW])
def test_infinite_gradients_under_a_gradient_scaler_skip_the_step_and_lower_the_scale(kind):
    model = Model()
    before = copy.deepcopy(model.state_dict())
    loop = loop_over(model, [[record(3.0, 4.0)]], kind=kind, scale=1e38)
    run(loop)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert loop.scaler.get_scale() == pytest.approx(5e37)


def test_the_scale_survives_a_resume():
    fp16 = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "fp16"]
    first, second = loop_over(Model(), [], *fp16, scale=123.0), loop_over(Model(), [], *fp16)
    first.scaler.scale(torch.ones(1))
    second.load_state_dict(first.state_dict())
    assert second.scaler.get_scale() == 123.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_config_sets_the_precision_and_float16_has_a_scaler(precision):
    seen = []

    class Probe(Model):
        def forward(self, batch):
            seen.append(self.layer(torch.ones(1, 2)).dtype)
            return super().forward(batch)

    opts = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", precision]
    loop = loop_over(Probe(), [[record(1.0, 1.0)]], *opts)
    run(loop)
    assert seen == [{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]]
    assert loop.scaler.is_enabled() == (precision == "fp16")
    assert ("scale" in loop.state_dict()["grad_scaler"]) == (precision == "fp16")


def test_the_loader_starts_with_the_first_step():
    starts = []

    class Loader:
        def __iter__(self):
            starts.append(len(starts))
            return iter([[record(1.0, 1.0)], [record(1.0, 1.0)]])

    loop = loop_over(Model(), [])
    loop.data_loader = Loader()
    assert not starts
    run(loop, steps=2)
    assert starts == [0]


def test_random_numbers_depend_on_the_iteration_but_not_on_earlier_ones():
    drawn = []

    class Probe(Model):
        def forward(self, batch):
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
            return super().forward(batch)

    for noise in (0, 5):
        loop = loop_over(Probe(), [[record(1.0, 1.0)]] * 2)
        torch.rand(noise), np.random.rand(noise)
        run(loop)
        loop.iter = 8
        run(loop)
    assert drawn[0] == drawn[2]
    assert drawn[1] == drawn[3]
    assert drawn[0] != drawn[1]


def test_losses_of_parts_are_averaged_over_images_for_models_without_normalizers():
    batch = [record(3.0, 4.0), record(1.0, -2.0)]
    updates = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = Model()
        before = model.layer.weight.detach().clone()
        options = ["SOLVER.ACCUMULATE", parts, "SOLVER.CLIP_GRADIENTS.ENABLED", False]
        latest = run(loop_over(model, [batch], *options))
        updates.append((model.layer.weight.detach() - before, latest["total_loss"][0]))
    torch.testing.assert_close(updates[0][0], updates[1][0])
    assert updates[0][1] == pytest.approx(updates[1][1])


def test_parts_get_the_normalizers_of_the_batch_and_the_random_numbers_they_were_counted_with():
    counted, trained = [], []

    class Probe(TrainableModel):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def loss_normalizers(self, parts):
            counted.extend(torch.rand(1).item() for _ in parts)
            return "normalizers"

        def forward(self, batch):
            trained.append(torch.rand(1).item())
            contexts.append((training_context().normalizers, iteration_ends()))
            return self.model(batch)

    contexts = []
    run(loop_over(Probe(), [[record(1.0, 1.0)] * 3], "SOLVER.ACCUMULATE", 3))
    assert counted == trained
    assert len(set(trained)) == 3
    assert contexts == [("normalizers", False)] * 2 + [("normalizers", True)]
    assert training_context().normalizers is None


BATCHES = [[record(3.0, 4.0)], [record(-1.0, 0.5, name="second.jpg")], [record(2.0, 2.0)]]


def step_and_count(loop, steps):
    with EventStorage(loop.iter) as storage:
        for _ in range(steps):
            loop.run_step()
            loop.iter = storage.iter = storage.iter + 1
        loop.read_losses()
    return {name: history.values() for name, history in storage.histories().items()}


def test_losses_read_late_have_the_iteration_they_belong_to_and_change_no_weights():
    models = [Model()]
    models.append(copy.deepcopy(models[0]))
    seen = []
    for model, late in zip(models, (False, True), strict=True):
        histories = step_and_count(loop_over(model, BATCHES, kind=ADAMW, late=late), 3)
        seen.append({name: values for name, values in histories.items() if name != "data_time"})
    assert seen[0] == seen[1]
    assert [iteration for _, iteration in seen[1]["total_loss"]] == [7, 8, 9]
    assert all(map(torch.equal, *(m.state_dict().values() for m in models)))


def test_losses_are_read_late_when_the_next_gradients_are_computed():
    events = []
    model = Model()
    model.layer.weight.register_hook(lambda _: events.append("gradients"))
    loop = loop_over(model, BATCHES, kind=ADAMW, late=True)
    read = loop.read_losses
    loop.read_losses = lambda: (events.append("read" if loop._unread else "nothing"), read())
    step_and_count(loop, 3)
    assert events == ["gradients", "nothing", *["gradients", "read"] * 2, "read"]


@pytest.mark.parametrize("bad", ["loss", "gradients"])
def test_a_loss_read_late_that_is_not_finite_never_reaches_weights_or_optimizer(bad):
    model = Model()
    loop = loop_over(model, BATCHES, kind=ADAMW, late=True)
    step_and_count(loop, 1)
    before = copy.deepcopy([model.state_dict(), loop.optimizer.state_dict()["state"]])
    if bad == "gradients":
        model.layer.weight.register_hook(lambda gradient: gradient * float("inf"))
    else:
        loop._batches = iter([[record(float("nan"), 1.0, name="second.jpg")], *BATCHES])
    with EventStorage(8):
        loop.run_step()  # the host has not seen it yet
        loop.iter = 9
        with pytest.raises(NonFiniteLossError, match="at iteration 8") as error:
            loop.run_step()
    assert ("second.jpg" in str(error.value)) == (bad == "loss")
    after = [model.state_dict(), loop.optimizer.state_dict()["state"]]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_late_reading_without_an_optimizer_that_can_skip_is_refused():
    model = Model()
    options = {"device": torch.device("cpu"), "precision": torch.float32, "accumulate": 1}
    options |= {"clip_norm": 1.0, "norm_type": 2.0, "seed": 0, "reads_late": True}
    with pytest.raises(ValueError, match="fused optimizer"):
        TrainLoop(model, [], torch.optim.SGD(model.parameters()), **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_iteration_on_a_gpu_does_not_wait_for_the_device():
    class OnDevice(Model):
        def forward(self, batch):
            return {"loss": self.layer(inputs).sum()}

    inputs = torch.ones(4, 2, device="cuda")
    model = OnDevice().cuda()
    loop = loop_over(model, [[record(1.0, 1.0)]] * 5, "MODEL.DEVICE", "cuda", kind=ADAMW, late=None)
    loop.__post_init__()  # decides by device and optimizer
    assert loop.reads_late
    step_and_count(loop, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with EventStorage(loop.iter):
            loop.run_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
