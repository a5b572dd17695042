"""Evaluation by CUDA graphs.

On CPUs a stand-in records the operators of a pass and runs them again on the same tensors, as a
graph does: it sees changed values at the old addresses, and no changed settings.
"""

import copy
import logging

import pytest
import torch
from conftest import batch
from detectors import DLA, model_of
from torch.fx.experimental.proxy_tensor import make_fx

from dsrcnn.modeling import SparseRCNN, cuda_graphs
from dsrcnn.modeling.postprocessing import Detections

GRAPH = ("TEST.CUDA_GRAPH", True)
SIZES = [(64, 96), (60, 90)]


@pytest.fixture
def captures(monkeypatch):
    """Capture on CPUs; returns the number of captures and of replays."""
    counts = {"captured": 0, "replayed": 0}

    def capture(function, pool, device):
        counts["captured"] += 1
        recorded = make_fx(lambda: tuple(function()))()
        outputs = Detections(*recorded())

        def replay():
            counts["replayed"] += 1
            for place, value in zip(outputs, recorded(), strict=True):
                place.copy_(value)

        return replay, outputs

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    monkeypatch.setattr(cuda_graphs, "can_capture", lambda _: True)
    monkeypatch.setattr(cuda_graphs, "new_pool", lambda _: None)
    return counts


def detect(model, seed=0, sizes=SIZES):
    with torch.inference_mode():
        return [x["instances"] for x in model(batch(sizes, [1] * len(sizes), seed=seed))]


def check_equal(results, expected):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a.scores, b.scores)
        torch.testing.assert_close(a.pred_boxes.tensor, b.pred_boxes.tensor, rtol=1e-4, atol=1e-2)
        assert torch.equal(a.pred_classes, b.pred_classes)


@pytest.mark.parametrize("opts", [(), DLA], ids=["no NMS", "NMS"])
def test_graphs_detect_the_same_and_results_survive_the_next_replay(captures, opts):
    plain, model = model_of(*opts).eval(), model_of(*opts, *GRAPH).eval()
    results = [detect(model, seed) for seed in range(4)]
    for seed, result in enumerate(results):
        check_equal(result, detect(plain, seed))
    # The first pass of a size runs as it is.
    assert captures == {"captured": 1, "replayed": 3}


def test_every_padded_size_has_its_graph_up_to_a_limit(captures, caplog):
    model = model_of(*GRAPH).eval()
    model.graphs.most = 2
    caplog.set_level(logging.INFO, "dsrcnn")
    for size in ((64, 64), (64, 96), (96, 64), (96, 96)):
        for _ in range(3):
            detect(model, sizes=[size])
    assert captures["captured"] == 2
    messages = [r.getMessage() for r in caplog.records if "CUDA_GRAPH: images" in r.getMessage()]
    assert len(messages) == 2
    assert "96 x 64" in messages[0]
    assert "INPUT.NUM_BUCKETS" in messages[0]


def test_images_of_one_padded_size_share_a_graph(captures):
    model, plain = model_of(*GRAPH).eval(), model_of().eval()
    for size in ((64, 96), (40, 96), (64, 70), (33, 65)):
        check_equal(detect(model, sizes=[size]), detect(plain, sizes=[size]))
    assert captures == {"captured": 1, "replayed": 3}


def test_changed_weights_discard_the_graphs(captures):
    model = model_of(*GRAPH).eval()
    for _ in range(2):
        detect(model)
    with torch.no_grad():
        model.head.head_series[0].class_logits.bias.add_(1.0)
    check_equal(detect(model), detect(copy.deepcopy(model)))
    assert captures["replayed"] == 1  # anew: the first pass of a size runs as it is
    detect(model)
    model.load_state_dict(model_of(seed=1).state_dict())
    check_equal(detect(model), detect(model_of(seed=1).eval()))
    assert captures == {"captured": 2, "replayed": 2}


def test_settings_are_part_of_a_graph(captures):
    model, plain = model_of(*GRAPH).eval(), model_of().eval()
    for _ in range(2):
        detect(model)
    model.head.inference_stages = plain.head.inference_stages = 1
    for _ in range(2):
        check_equal(detect(model), detect(plain))
    assert captures == {"captured": 2, "replayed": 2}


def test_a_module_that_is_replaced_is_seen(captures):
    model = model_of(*GRAPH).eval()
    for _ in range(2):
        detect(model)
    layer = model.head.head_series[1].class_logits
    layer.bias = torch.nn.Parameter(torch.ones_like(layer.bias))
    check_equal(detect(model), detect(copy.deepcopy(model)))
    assert captures["replayed"] == 1


def test_training_discards_the_graphs_and_their_memory(captures):
    model = model_of(*GRAPH).eval()
    for _ in range(2):
        detect(model)
    assert len(model.graphs._graphs) == 1
    model.eval()
    assert len(model.graphs._graphs) == 1
    model.train()
    assert not model.graphs._graphs


def test_passes_with_gradients_and_copies_run_without_graphs(captures):
    model = model_of(*GRAPH).eval()
    for _ in range(3):
        model(batch(SIZES, [1, 1]))
    assert captures["captured"] == 0
    for _ in range(2):
        detect(model)
    assert not copy.deepcopy(model).graphs._graphs


def test_a_pass_that_cannot_be_captured_runs_as_it_is(captures, monkeypatch, caplog):
    def capture(function, pool, device):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "capture", capture)
    model = model_of(*GRAPH).eval()
    for _ in range(4):
        check_equal(detect(model), detect(model_of().eval()))
    warnings = [r.getMessage() for r in caplog.records if "cannot be captured" in r.getMessage()]
    assert len(warnings) == 1
    assert "not permitted" in warnings[0]


def test_a_graph_keeps_the_constants_that_it_reads_alive(captures):
    model = model_of(*GRAPH).eval()
    for _ in range(2):
        detect(model)
    (graph,) = model.graphs._graphs.values()
    kept = {id(x) for constant in graph.constants for x in constant if torch.is_tensor(x)}
    layer = next(m for m in model.backbone.modules() if hasattr(m, "_product"))
    assert {id(x) for x in layer._product._entry[1]} <= kept
    assert len(graph.constants) > 6  # pooling has some, too


def test_a_cpu_is_no_place_for_graphs(caplog):
    caplog.set_level(logging.INFO, "dsrcnn")
    model = model_of(*GRAPH).eval()
    for _ in range(3):
        detect(model)
    assert "TEST.CUDA_GRAPH has no effect on cpu" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("opts", [(), DLA], ids=["no NMS", "NMS"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_graphs_detect_the_same(opts, dtype):
    device = ("MODEL.DEVICE", f"cuda:{torch.cuda.device_count() - 1}")
    plain, model = model_of(*opts, *device).eval(), model_of(*opts, *device, *GRAPH).eval()
    for seed in range(4):
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            check_equal(detect(model, seed), detect(plain, seed))
    assert len(model.graphs._graphs) == 1


@pytest.mark.parametrize("method", ["raw_predictions", "postprocess"])
def test_a_subclass_that_replaces_a_half_of_the_pass_is_evaluated_with_it(method, captures):
    def replaced(self, *args, **options):
        calls.append(method)
        return getattr(SparseRCNN, method)(self, *args, **options)

    calls = []
    model, plain = model_of(*GRAPH).eval(), model_of().eval()
    model.__class__ = type("Other", (SparseRCNN,), {method: replaced})
    for _ in range(3):
        check_equal(detect(model), detect(plain))
    assert calls == [method] * 3
    assert captures["captured"] == 0
