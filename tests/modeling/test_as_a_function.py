"""Evaluation as one function of tensors: compiled as a whole, exported, captured in a graph."""

import pytest
import torch
from conftest import batch
from detectors import DLA, deformable_detr_of, enable, model_of, options

MODELS = {
    "Sparse R-CNN": (model_of, ()),
    "DLA with NMS, DPG": (model_of, (*DLA, *enable("DPG"))),
    "dense": (model_of, options("PROPOSALS.NAME", "DenseDistinct")),
    "Deformable DETR": (deformable_detr_of, ()),
    "two stages": (deformable_detr_of, options("PROPOSALS.NAME", "EncoderQueries")),
    "three stages": (model_of, options("NUM_HEADS", 3)),
}


class Detect(torch.nn.Module):
    """From padded images to detections in pixels of the originals."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tensor, sizes, originals):
        return tuple(self.model.detect(tensor, sizes, originals, self.model.detection))


def function_and_inputs(name, device="cpu"):
    build, opts = MODELS[name]
    model = build(*opts).eval().to(device)
    scenes = []
    for seed in (0, 1):
        inputs = batch([(64, 96), (60, 90)], [2, 1], seed=seed)
        inputs[1] |= {"height": 120, "width": 180}
        scenes.append(tuple(model.preprocess_image(inputs)[:3]))
    return Detect(model), scenes


def check(function, detect, scenes):
    for inputs in scenes:
        with torch.no_grad():
            expected = detect(*inputs)
            values = function(*inputs)
        scores, classes, boxes, kept = values
        assert scores.max() > 0
        torch.testing.assert_close(scores, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(boxes, expected[2], rtol=1e-4, atol=1e-2)
        assert torch.equal(classes, expected[1])
        assert torch.equal(kept, expected[3])


@pytest.mark.parametrize("name", list(MODELS)[:4])
def test_evaluation_compiles_without_a_graph_break(name):
    detect, scenes = function_and_inputs(name)
    compiled = torch.compile(detect, fullgraph=True, backend="eager")
    check(compiled, detect, scenes)


@pytest.mark.parametrize("name", list(MODELS)[:5])
def test_evaluation_can_be_exported(name):
    detect, scenes = function_and_inputs(name)
    exported = torch.export.export(detect, scenes[0]).module()
    check(exported, detect, scenes)


@pytest.mark.parametrize("name", ["three stages", "dense", "Deformable DETR", "two stages"])
def test_evaluation_can_be_traced(name):
    detect, scenes = function_and_inputs(name)
    traced = torch.jit.trace(detect, scenes[0], check_trace=False)
    check(traced, detect, scenes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["Sparse R-CNN", "dense"])
def test_evaluation_waits_for_nothing_and_is_captured_in_a_cuda_graph(name):
    detect, scenes = function_and_inputs(name, "cuda")  # NMS of DLA waits for its count
    places = tuple(x.clone() for x in scenes[0])
    with torch.no_grad():
        for _ in range(2):
            detect(*places)
        torch.cuda.set_sync_debug_mode("error")
        try:
            detect(*places)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = detect(*places)

    def replay(*inputs):
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return tuple(x.clone() for x in results)

    check(replay, detect, scenes)
