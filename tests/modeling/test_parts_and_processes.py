"""A batch in parts or over two processes, by gloo on the CPU, trains as the batch in one piece."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import batch
from detectors import DLA, SQR, enable, model_of, options

from dsrcnn.engine.hooks import average_norms
from dsrcnn.engine.processes import shutdown_distributed, wrap_ddp
from dsrcnn.layers.norm import RunningNorm
from dsrcnn.modeling.losses import LossNormalizers, SetCriterion
from dsrcnn.modeling.roi_heads.training_stats import DynamicTrainingStats
from dsrcnn.structures import TermWeights
from dsrcnn.utils.distributed import all_gather, local_reductions, reduce_mean
from dsrcnn.utils.training import training_context, use_training_context

SIZE = (64, 96)
IN_PROCESSES = {
    "Hungarian": [],
    "DLA": DLA,
    "SQR": [*SQR, *options("NUM_HEADS", 4)],
    "DLA and SQR": [*DLA, *SQR, *options("NUM_HEADS", 4)],
    "dense": options("PROPOSALS.NAME", "DenseDistinct"),
}
IN_PARTS = {
    **IN_PROCESSES,
    "DLA, ground truths": enable("DLA", "NORMALIZER", "gt"),
    "softmax": options("USE_FOCAL", False),
    "dense, DLA": [*options("PROPOSALS.NAME", "DenseDistinct"), *DLA],
    "shared stages": options("SHARE_STAGES", True),
    # Without norms over the images of a batch: parts have fewer images.
    "DLA and DPG": [*DLA, *enable("DPG", "NORM", "none")],
}


def gradients(model, parts):
    model.zero_grad()
    normalizers = model.loss_normalizers(parts) if len(parts) > 1 else None
    total = 0.0
    for part in parts:
        # The temperature of DPG must not advance between the two ways.
        with use_training_context(normalizers=normalizers, ends_iteration=False):
            loss = sum(model(part).values())
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_close(results, expected):
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("opts", IN_PARTS.values(), ids=IN_PARTS)
@pytest.mark.parametrize("counts", [[3, 1, 0, 5], [0, 0, 0, 0]])
def test_gradients_of_four_parts_sum_to_those_of_the_batch(opts, counts):
    model, inputs = model_of(*opts).double(), batch([SIZE] * 4, counts)
    loss, expected = gradients(model, [inputs])
    loss_of_parts, results = gradients(model, [[x] for x in inputs])
    assert loss_of_parts == pytest.approx(loss, rel=1e-6)
    assert_close(results, expected)


def test_computing_normalizers_changes_nothing_in_the_model():
    model = model_of(*DLA, "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.loss_normalizers([batch([SIZE] * 2, counts) for counts in ([2, 1], [0, 3])])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_nested_training_contexts_keep_the_fields_they_do_not_set():
    with use_training_context(recollect=False), use_training_context(ends_iteration=False):
        assert (training_context().recollect, training_context().ends_iteration) == (False, False)
    assert training_context().recollect


# The functions `_...(rank)` run in both processes, which are started once; `results` has what they
# return, by the name of the function.


def _collectives(rank):
    value = torch.tensor([1.0, 2.0 + 4 * rank])
    with local_reductions():
        local = reduce_mean(value), all_gather(value)
    return reduce_mean(value), all_gather(value), local


def test_reductions_are_over_all_processes_unless_local(results):
    for rank, (mean, gathered, local) in enumerate(results["_collectives"]):
        assert mean.tolist() == [1.0, 4.0]
        assert gathered.tolist() == [[1.0, 2.0], [1.0, 6.0]]
        assert [x.tolist() for x in local] == [[1.0, 2.0 + 4 * rank], [[1.0, 2.0 + 4 * rank]]]


def test_reductions_of_a_single_process_are_trivial():
    value = torch.tensor([3.0])
    assert reduce_mean(value) is value
    assert all_gather(value).tolist() == [[3.0]]


def _normalizers(rank):
    criterion = SetCriterion(num_classes=3, num_stages=2, weights=TermWeights())
    counts = LossNormalizers(torch.tensor([0.0, 3.0 - 2 * rank]), torch.tensor([5.0 + rank] * 2))
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        return criterion.normalizers([counts, counts]), all_reduce.call_count


def test_positives_of_all_parts_and_processes_are_averaged_by_one_collective(results):
    for rank, (normalizers, collectives) in enumerate(results["_normalizers"]):
        assert normalizers.num_boxes.tolist() == [1.0, 4.0]  # 6 and 2; at least 1
        assert normalizers.class_weight_sum.tolist() == [10.0 + 2 * rank] * 2  # of the process
        assert collectives == 1


def _gradients(rank):
    """Gradients of one image; that of the second process has no object."""
    inputs = batch([SIZE] * 2, [3, 0])[rank : rank + 1]
    models = {name: wrap_ddp(model_of(*opts).double()) for name, opts in IN_PROCESSES.items()}
    for model in models.values():
        sum(model(inputs).values()).backward()
    return {k: [p.grad for p in m.parameters() if p.requires_grad] for k, m in models.items()}


@pytest.mark.parametrize("name", IN_PROCESSES)
def test_gradients_of_two_processes_are_those_of_both_images_in_one(results, name):
    _, expected = gradients(model_of(*IN_PROCESSES[name]).double(), [batch([SIZE] * 2, [3, 0])])
    for by_name in results["_gradients"]:
        assert_close(by_name[name], expected)


def _last_stage_only(rank):
    model = wrap_ddp(model_of(*options("DEEP_SUPERVISION", False)))
    for _ in range(2):  # the second step would fail if the first had waited for a gradient
        sum(model(batch([SIZE], [2], seed=rank)).values()).backward()
    return sum(p.grad.sum() for p in model.parameters() if p.grad is not None)


def test_without_deep_supervision_no_process_waits_for_missing_gradients(results):
    first, second = results["_last_stage_only"]
    assert first == second


IMAGES = torch.tensor([[3.0, 1.0, 2.0], [1.0, 9.0, -4.0], [2.0, 0.5, 7.0], [-1.0, 4.0, 1.0]])


def _standardize(part):
    """Some of the images standardized, their gradient, and the statistics of the norm."""
    norm, x = RunningNorm(3), IMAGES[part].clone().requires_grad_()
    norm(x)  # the statistics of this step
    normalized = norm(x)
    (normalized * torch.arange(12).view(4, 3)[part] ** 0.5).sum().backward()
    return normalized.detach(), x.grad, norm.running_mean, norm.running_var


def _norm(rank):
    return _standardize(slice(2 * rank, 2 * rank + 2))


def test_images_are_standardized_over_all_processes(results):
    normalized, gradient, *statistics = _standardize(slice(0, 4))
    halves = results["_norm"]
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), normalized)
    torch.testing.assert_close(torch.cat([half[1] for half in halves]), gradient)
    for half in halves:
        torch.testing.assert_close(list(half[2:]), statistics)


NAN = float("nan")
# IoU and error of three iterations, by window and process.
WINDOWS = [
    [[(0.5, 0.9), (0.6, 0.8), (0.7, 0.3)], [(0.6, 0.5), (NAN, NAN), (0.8, 0.1)]],
    [[(0.9, 0.4), (0.7, 0.2), (0.8, 0.6)], [(NAN, NAN), (NAN, NAN), (NAN, NAN)]],
]


def _record(stats, entries):
    for entry in entries:
        stats.record(*map(torch.tensor, entry))
    return stats.iou_thresh.item(), stats.beta.item()


def _training_stats(rank):
    """Two windows, and the first one again, with a checkpoint of one process in between."""
    whole, first, second = (
        DynamicTrainingStats(window=3, warmup_iou=0.4, warmup_beta=1.0, max_iou=1.0)
        for _ in range(3)
    )
    history = [_record(whole, window[rank]) for window in WINDOWS]
    _record(first, WINDOWS[0][rank][:2])
    average_norms(torch.nn.ModuleList([first]))  # as the hook before checkpoints does
    state = [first.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(state)
    second.load_state_dict(state[0])
    return [*history, _record(second, WINDOWS[0][rank][2:])]


def test_statistics_of_proposals_are_over_all_processes_also_from_the_checkpoint_of_one(results):
    first, second = results["_training_stats"]
    assert first == second
    # Five entries of both in the first window: mean 0.64, median 0.5.
    expected = [(0.64, 0.5), (0.8, 0.4), (0.64, 0.5)]
    assert first == [pytest.approx(x) for x in expected]


def _work(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    parts = (_collectives, _normalizers, _gradients, _last_stage_only, _norm, _training_stats)
    torch.save({part.__name__: part(rank) for part in parts}, f"{folder}/{rank}.pt")
    shutdown_distributed()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every part returned in both processes."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    by_process = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]
    return {name: [results[name] for results in by_process] for name in by_process[0]}
