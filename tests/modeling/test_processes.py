"""Several processes, by gloo on the CPU."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.engine.hooks import average_norms
from dsrcnn.engine.launch import for_all_processes, leave_processes
from dsrcnn.layers.norm import ImageNorm
from dsrcnn.modeling.losses import SetCriterion
from dsrcnn.modeling.roi_heads.training_stats import DynamicTrainingStats
from dsrcnn.structures import Predictions, Targets, TermWeights
from dsrcnn.utils.distributed import mean_over_processes


def _losses(objects):
    """Class loss of one set with `objects` ground truths, all predictions at zero."""
    predictions = Predictions(
        torch.zeros(1, 1, 4, 3), torch.rand(1, 1, 4, 4), torch.zeros(1).long()
    )
    targets = Targets(
        torch.zeros(1, objects, 4),
        torch.zeros(1, objects, dtype=torch.int64),
        torch.ones(1, objects, dtype=torch.bool),
        torch.ones(1, 4),
    )
    criterion = SetCriterion(num_classes=3, num_stages=1, weights=TermWeights())
    return criterion(predictions, targets, torch.full((1, 1, 4), -1))["loss_ce"]


def _losses_by_positives(positives):
    """Class losses of two stages; `positives` proposals learn the one object, or there is none."""
    predictions = Predictions(torch.zeros(2, 1, 4, 3), torch.rand(2, 1, 4, 4), torch.arange(2))
    objects = min(positives, 1)
    targets = Targets(
        torch.zeros(1, objects, 4),
        torch.zeros(1, objects, dtype=torch.int64),
        torch.ones(1, objects, dtype=torch.bool),
        torch.ones(1, 4),
    )
    assignment = torch.full((2, 1, 4), -1)
    assignment[1, 0, :positives] = 0  # the first stage has none
    criterion = SetCriterion(
        num_classes=3, num_stages=2, weights=TermWeights(0.0, 5.0, 2.0), normalizer="positives"
    )
    normalizers = criterion.normalizers([criterion.count(targets, assignment)])
    return normalizers.learners, criterion(predictions, targets, assignment)


def _normalizers(rank):
    mean = mean_over_processes(torch.tensor([1.0, 2.0 + 4 * rank]))
    loss = _losses(objects=(6, 0)[rank])  # the second process has an image without objects
    collectives = []
    original = dist.all_reduce
    with mock.patch.object(dist, "all_reduce") as spy:
        spy.side_effect = lambda t: (collectives.append(t.shape), original(t))
        normalizer, _ = _losses_by_positives((4, 0)[rank])
    return mean, loss, normalizer, collectives


def test_losses_are_normalised_by_the_mean_over_processes(results):
    alone = _losses(objects=3)  # 6 and 0 objects: 3 on average, on both
    for mean, loss, normalizer, collectives in results["normalizers"]:
        assert mean.tolist() == [1.0, 4.0]
        assert torch.allclose(loss, alone)
        assert normalizer.tolist() == [1.0, 2.0]  # 4 and 0 positives in the second stage
        assert collectives == [(2,), (2,)]  # one for each call, whatever the number of stages


def test_one_process_is_its_own_mean():
    value = torch.tensor([3.0])
    assert mean_over_processes(value) is value


def _one_without_objects(rank):
    cfg = tiny_cfg("MODEL.SparseRCNN.DLA.ENABLED", True)
    model = torch.nn.parallel.DistributedDataParallel(build_model(cfg))
    losses = model(batch([(64, 96)], [(3, 0)[rank]]))  # the second process has nothing to learn
    sum(losses.values()).backward()
    gradients = [p.grad.sum() for p in model.parameters() if p.requires_grad]
    return {name: loss.detach() for name, loss in losses.items()}, torch.stack(gradients)


def test_a_step_with_dla_works_where_one_process_has_no_object(results):
    (first, gradients), (second, same) = results["one without objects"]
    assert torch.equal(gradients, same)
    assert torch.isfinite(gradients).all()
    assert first["loss_bbox"] > 0
    assert second["loss_bbox"] == second["loss_giou"] == 0


def _last_stage_only(rank):
    model = for_all_processes(build_model(tiny_cfg("MODEL.SparseRCNN.DEEP_SUPERVISION", False)))
    for _ in range(2):  # the second step would fail if the first had waited for a gradient
        losses = model(batch([(64, 96)], [2], seed=rank))
        sum(losses.values()).backward()
    return sum(p.grad.sum() for p in model.parameters() if p.grad is not None)


def test_without_deep_supervision_no_process_waits_for_gradients_that_do_not_come(results):
    first, second = results["last stage only"]
    assert first == second


IMAGES = torch.tensor([[3.0, 1.0, 2.0], [1.0, 9.0, -4.0], [2.0, 0.5, 7.0], [-1.0, 4.0, 1.0]])


def _standardized(part):
    """What a norm makes of some of the images, its gradient and its statistics."""
    norm = ImageNorm(3)
    x = IMAGES[part].clone().requires_grad_()
    found = norm(x)
    (found * torch.arange(12).view(4, 3)[part] ** 0.5).sum().backward()
    return found.detach(), x.grad, norm.running_mean, norm.running_var


def _norm(rank):
    return _standardized(slice(2 * rank, 2 * rank + 2))


def test_images_are_standardized_over_all_processes(results):
    found, gradient, mean, variance = _standardized(slice(0, 4))
    halves = results["norm"]
    torch.testing.assert_close(torch.cat([half[0] for half in halves]), found)
    torch.testing.assert_close(torch.cat([half[1] for half in halves]), gradient)
    for half in halves:
        torch.testing.assert_close(half[2], mean)
        torch.testing.assert_close(half[3], variance)


def _followed_proposals(rank):
    """Two windows of three iterations; the second process has no positives in one of them."""
    stats = DynamicTrainingStats(window=3)
    seen = []
    for window in WINDOWS:
        for iou, error in window[rank]:
            stats.record(torch.tensor(iou), torch.tensor(error))
        seen.append((stats.iou_thresh.item(), stats.beta.item()))
    return seen


def _resumed_in_the_middle(rank):
    """Two entries of three, a checkpoint of the first process, and the rest in a new model."""
    whole, first, second = (DynamicTrainingStats(window=3) for _ in range(3))
    entries = WINDOWS[0][rank]
    for number, (iou, error) in enumerate(entries):
        whole.record(torch.tensor(iou), torch.tensor(error))
        if number < 2:
            first.record(torch.tensor(iou), torch.tensor(error))
    average_norms(torch.nn.ModuleList([first]))  # what the hook before checkpoints does
    state = [first.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(state)
    second.load_state_dict(state[0])
    second.record(*map(torch.tensor, entries[2]))
    return [(s.iou_thresh.item(), s.beta.item()) for s in (whole, second)]


def test_statistics_go_on_after_a_checkpoint_of_one_process(results):
    for whole, second in results["resumed in the middle"]:
        assert whole == second == pytest.approx((0.64, 0.5))


def _recollecting_model(dla):
    opts = ["MODEL.SparseRCNN.SQR.ENABLED", True, "MODEL.SparseRCNN.NUM_HEADS", 4]
    torch.manual_seed(0)
    return build_model(tiny_cfg(*opts, "MODEL.SparseRCNN.DLA.ENABLED", dla)).double()


def _gradients_of(model, inputs):
    sum(model(inputs).values()).backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def _recollected(rank):
    """Gradients of one image; that of the second process has no object."""
    inputs = batch([(64, 96)] * 2, [3, 0])[rank : rank + 1]
    models = (for_all_processes(_recollecting_model(dla)) for dla in (False, True))
    return [_gradients_of(model, inputs) for model in models]


@pytest.mark.parametrize("dla", [False, True], ids=["Hungarian", "DLA"])
def test_recollection_over_processes_learns_what_one_process_learns_from_both_images(results, dla):
    expected = _gradients_of(_recollecting_model(dla), batch([(64, 96)] * 2, [3, 0]))
    for found in results["recollected"]:
        for a, b in zip(found[dla], expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * max(1.0, b.abs().max().item()))


NAN = float("nan")
WINDOWS = [
    [[(0.5, 0.9), (0.6, 0.8), (0.7, 0.3)], [(0.6, 0.5), (NAN, NAN), (0.8, 0.1)]],
    [[(0.9, 0.4), (0.7, 0.2), (0.8, 0.6)], [(NAN, NAN), (NAN, NAN), (NAN, NAN)]],
]


def test_statistics_of_proposals_are_those_of_all_processes(results):
    first, second = results["followed proposals"]
    assert first == second
    # Five entries of both in the first window: mean 0.64, median 0.5.
    assert first == [pytest.approx((0.64, 0.5)), pytest.approx((0.8, 0.4))]


def _work(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {}
    for name, part in (
        ("normalizers", _normalizers),
        ("one without objects", _one_without_objects),
        ("last stage only", _last_stage_only),
        ("norm", _norm),
        ("followed proposals", _followed_proposals),
        ("resumed in the middle", _resumed_in_the_middle),
        ("recollected", _recollected),
    ):
        torch.manual_seed(0)
        found[name] = part(rank)
    torch.save(found, f"{folder}/{rank}.pt")
    leave_processes()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What every part gave in both processes, which are started once."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_work, args=(str(folder),), nprocs=2)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    return {name: [process[name] for process in found] for name in found[0]}
