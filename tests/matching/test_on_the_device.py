"""Matchers and criterion never wait for a value of the device, and can be compiled and captured."""

import pytest
import torch
from scenes import trained_scene
from test_transport import ALL, transport
from torch._subclasses.fake_tensor import FakeTensorMode

from dsrcnn.modeling.losses import SetCriterion
from dsrcnn.structures import Predictions, Targets, TermWeights

ON_THE_DEVICE = pytest.mark.parametrize("name", ["rescale", "topk", "repaired", "simota repaired"])


def steps_of(matcher, predictions, targets, normalizer):
    """Matcher, criterion and statistics, as in a training step that logs."""
    criterion = SetCriterion(
        num_classes=20, num_stages=6, weights=TermWeights(), normalizer=normalizer
    )
    assignment = matcher(predictions, targets)
    losses = criterion(predictions, targets, assignment)
    return assignment, losses, matcher.statistics(predictions, targets, assignment)


@pytest.mark.parametrize("normalizer", ["positives", "gt"])
@ON_THE_DEVICE
def test_nothing_depends_on_a_value_of_the_device(name, normalizer):
    """Tensors without values: reading one, or a shape that depends on one, raises."""
    real = trained_scene([3, 4])
    with FakeTensorMode(), torch.no_grad():
        predictions, targets = (
            type(x)(
                *(
                    None if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")
                    for t in x
                )
            )
            for x in real
        )
        assignment, losses, statistics = steps_of(ALL[name], predictions, targets, normalizer)
    for value in (assignment, *losses.values(), *statistics.values()):
        assert value.device.type == "cuda"


@pytest.mark.parametrize(
    "read", [lambda x: x[x > 0], lambda x: x.sum().item(), torch.nonzero, lambda x: bool(x.any())]
)
def test_tensors_without_values_find_what_they_should(read):
    with FakeTensorMode(), pytest.raises(Exception, match=r"nonzero|_local_scalar_dense"):
        read(torch.empty(3, device="cuda"))


@ON_THE_DEVICE
def test_the_whole_matcher_is_one_graph_without_breaks(name):
    predictions, targets = trained_scene([3, 4])
    matcher = transport(iterations=5, decision="topk") if name == "topk" else ALL[name]
    graphs = torch.compile(matcher, backend="eager", fullgraph=True)
    assert torch.equal(graphs(predictions, targets), matcher(predictions, targets))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@ON_THE_DEVICE
def test_on_a_gpu_nothing_waits_and_a_graph_can_be_captured(name):
    predictions, targets = trained_scene([3, 4])
    predictions = Predictions(*(x.cuda() for x in predictions[:3]))
    targets = Targets(*(x.cuda() for x in targets))
    expected, _, _ = steps_of(ALL[name], predictions, targets, "positives")  # warms up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, _, _ = steps_of(ALL[name], predictions, targets, "positives")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found, _, _ = steps_of(ALL[name], predictions, targets, "positives")
    graph.replay()
    assert torch.equal(found, expected)
