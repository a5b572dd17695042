"""Several processes, by gloo on the CPU."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import batch, tiny_cfg
from detectron2.modeling import build_model

from dsrcnn.modeling.losses import SetCriterion
from dsrcnn.structures import Predictions, Targets, TermWeights, mean_over_processes


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


def _losses_by_positives(positives, collectives=None):
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
    if collectives is not None:
        original = dist.all_reduce
        dist.all_reduce = lambda t: (collectives.append(t.shape), original(t))
    normalizers = criterion.normalizers([criterion.count(targets, assignment)])
    return normalizers.learners, criterion(predictions, targets, assignment)


def _work(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    mean = mean_over_processes(torch.tensor([1.0, 2.0 + 4 * rank]))
    loss = _losses(objects=(6, 0)[rank])  # the second process has an image without objects
    collectives = []
    normalizer, _ = _losses_by_positives((4, 0)[rank], collectives)
    torch.save((mean, loss, normalizer, collectives), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_losses_are_normalised_by_the_mean_over_processes(tmp_path):
    mp.spawn(_work, args=(str(tmp_path),), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = _losses(objects=3)  # 6 and 0 objects: 3 on average, on both
    for mean, loss, normalizer, collectives in results:
        assert mean.tolist() == [1.0, 4.0]
        assert torch.allclose(loss, alone)
        assert normalizer.tolist() == [1.0, 2.0]  # 4 and 0 positives in the second stage
        assert collectives == [(2,), (2,)]  # one for each call, whatever the number of stages


def test_one_process_is_its_own_mean():
    value = torch.tensor([3.0])
    assert mean_over_processes(value) is value


def _train_step(rank, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    cfg = tiny_cfg("MODEL.SparseRCNN.DLA.ENABLED", True)
    model = torch.nn.parallel.DistributedDataParallel(build_model(cfg))
    losses = model(batch([(64, 96)], [(3, 0)[rank]]))  # the second process has nothing to learn
    sum(losses.values()).backward()
    gradients = [p.grad.sum() for p in model.parameters() if p.requires_grad]
    torch.save((losses, torch.stack(gradients)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_a_step_with_dla_works_where_one_process_has_no_object(tmp_path):
    mp.spawn(_train_step, args=(str(tmp_path),), nprocs=2)
    (first, gradients), (second, same) = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert torch.equal(gradients, same)
    assert torch.isfinite(gradients).all()
    assert first["loss_bbox"] > 0
    assert second["loss_bbox"] == second["loss_giou"] == 0


def _last_stage_only(rank, folder):
    from dsrcnn.engine.processes import for_all_processes

    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = for_all_processes(build_model(tiny_cfg("MODEL.SparseRCNN.DEEP_SUPERVISION", False)))
    for _ in range(2):  # the second step would fail if the first had waited for a gradient
        losses = model(batch([(64, 96)], [2], seed=rank))
        sum(losses.values()).backward()
    torch.save(
        sum(p.grad.sum() for p in model.parameters() if p.grad is not None), f"{folder}/{rank}"
    )
    dist.destroy_process_group()


def test_without_deep_supervision_no_process_waits_for_gradients_that_do_not_come(tmp_path):
    mp.spawn(_last_stage_only, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert first == second
