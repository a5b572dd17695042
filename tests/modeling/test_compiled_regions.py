"""``MODEL.COMPILE``: traced as always, but without minutes of generating and compiling C++."""

import copy

import pytest
import torch
from conftest import batch
from detectors import DLA, SQR, deformable_detr_of, model_of, options
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch._dynamo.utils import counters

from dsrcnn.config import read_cfg
from dsrcnn.modeling.losses import SetCriterion
from dsrcnn.utils import compilation

COMPILE = ("MODEL.COMPILE", True)
ADAMIXER = [
    *("MODEL.SparseRCNN.NUM_PROPOSALS", 6, "MODEL.SparseRCNN.HIDDEN_DIM", 32),
    *("MODEL.SparseRCNN.NUM_HEADS", 2, "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"),
    *("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.SparseRCNN.DIM_FEEDFORWARD", 32),
    *("MODEL.SparseRCNN.NUM_CLASSES", 5),
]
TWO_STAGES = options("PROPOSALS.NAME", "EncoderQueries")
# Ground truths in the two images of a batch.
COUNTS = [(2, 1), (5, 1), (0, 0)]


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """Compile to one graph for each region, or fail; returns the modes in use."""
    modes, compile_ = [], torch.compile

    def to_one_graph(function, *, mode, dynamic=None):
        modes.append(mode)
        return compile_(function, backend="eager", fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", to_one_graph)
    compilation._compiled.cache_clear()
    torch._dynamo.reset()
    counters.clear()
    yield modes
    compilation._compiled.cache_clear()


def losses_and_gradients(model, sizes, counts):
    torch.manual_seed(0)
    model.zero_grad()
    losses = model(batch(sizes, counts))
    sum(losses.values()).backward()
    parts = [part for part in ("head", "proposals", "encoder") if hasattr(model, part)]
    parameters = [x for part in parts for x in getattr(model, part).named_parameters(part)]
    return losses, {name: p.grad for name, p in parameters}


def adamixer_of(*opts):
    torch.manual_seed(0)
    return build_model(read_cfg("quick/adamixer_shapes", [*ADAMIXER, *opts]))


MODELS = {
    "Sparse R-CNN": (model_of, ()),
    "softmax": (model_of, options("USE_FOCAL", False)),
    "DLA": (model_of, DLA),
    "shared stages": (model_of, options("SHARE_STAGES", True)),
    "SQR": (model_of, SQR),
    "dense": (model_of, options("PROPOSALS.NAME", "DenseDistinct")),
    "checkpointed": (model_of, ("MODEL.ACTIVATION_CHECKPOINT", "('stages',)")),
    "AdaMixer": (adamixer_of, ()),
    "Deformable DETR": (deformable_detr_of, ()),
    "two stages": (deformable_detr_of, TWO_STAGES),
    "two stages with DLA": (deformable_detr_of, (*TWO_STAGES, *DLA)),
    "two stages with SQR": (deformable_detr_of, (*TWO_STAGES, *SQR)),
}


_SLOW = ("Deformable DETR", "two stages", "two stages with DLA", "two stages with SQR")


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in _SLOW)) for x in MODELS]
)
def test_compiled_regions_give_the_same_losses_and_gradients_for_any_batch(name):
    build, opts = MODELS[name]
    plain, compiled = build(*opts), build(*opts, *COMPILE)
    for height, counts in zip((64, 70, 128), COUNTS, strict=True):
        sizes = [(height, 96), (60, 90)]
        expected = losses_and_gradients(plain, sizes, counts)
        torch.testing.assert_close(
            losses_and_gradients(compiled, sizes, counts), expected, rtol=1e-4, atol=1e-4
        )
    # Sizes of images bring no new graphs, and the stages share theirs. The candidates of an encoder
    # have costs and losses of their own.
    most = 18 if name.startswith("two stages") else 14
    assert 4 <= counters["stats"]["unique_graphs"] <= most
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", [
    "DLA", *(pytest.param(x, marks=pytest.mark.slow) for x in ("Deformable DETR", "two stages"))
])  # fmt: skip
def test_compiled_evaluation_detects_the_same_without_a_graph_for_every_size(name):
    build, opts = MODELS[name]
    plain, compiled = build(*opts).eval(), build(*opts, *COMPILE).eval()
    for size in ((128, 192), (140, 192), (192, 192), (128, 250), (256, 130)):
        inputs = batch([size], [1])
        with torch.inference_mode():
            (expected,), (result,) = plain(inputs), compiled(inputs)
        for field, value in expected["instances"].get_fields().items():
            other = result["instances"].get(field)
            tensors = [getattr(x, "tensor", x) for x in (other, value)]
            torch.testing.assert_close(*tensors, rtol=1e-4, atol=1e-2)
    assert counters["stats"]["unique_graphs"] <= 4


def test_statistics_are_logged_with_compiled_matchers_too():
    logs = []
    for opts in ((), COMPILE):
        model = model_of(*DLA, "LOG.PERIOD", 1, *opts)
        with EventStorage() as storage:
            model(batch([(64, 96), (60, 90)], [2, 1]))
            logs.append({k: v[0] for k, v in storage.latest().items() if k.startswith("dla/")})
    assert "dla/units_mean" in logs[0]
    assert logs[1] == pytest.approx(logs[0], rel=1e-4, abs=1e-6)


def test_keys_are_those_of_the_plain_model_and_copies_run_with_their_own_weights():
    plain, compiled = model_of(), model_of(*COMPILE)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    sizes = [(64, 96), (60, 90)]
    losses_and_gradients(compiled, sizes, (2, 1))
    copied = copy.deepcopy(compiled)
    for model in (plain, copied):
        model.load_state_dict(model_of(seed=1).state_dict())
    expected = losses_and_gradients(plain, sizes, (2, 1))
    torch.testing.assert_close(
        losses_and_gradients(copied, sizes, (2, 1)), expected, rtol=1e-4, atol=1e-4
    )


def test_the_mode_is_a_key(traced):
    model_of(*COMPILE, "MODEL.COMPILE_MODE", "max-autotune-no-cudagraphs")
    assert set(traced) == {"max-autotune-no-cudagraphs"}
    traced.clear()
    model_of("MODEL.COMPILE_MODE", "max-autotune-no-cudagraphs")
    assert not traced


def test_a_subclass_replaces_the_losses_of_sets():
    class Doubled(SetCriterion):
        def set_losses(self, *args):
            return {name: 2 * value for name, value in super().set_losses(*args).items()}

    for opts in ((), COMPILE):
        model = model_of(*opts)
        expected = model(batch([(64, 96)], [2]))
        model.criterion.__class__ = Doubled
        losses = model(batch([(64, 96)], [2]))
        for name, value in expected.items():
            torch.testing.assert_close(losses[name], 2 * value)
