import itertools
import random

import numpy as np
import pytest
import torch
from conftest import quick_cfg, tiny_cfg
from detectron2.data.samplers import TrainingSampler

from dsrcnn.data.build import build_train_loader, training_records
from dsrcnn.data.samplers import SeededDataset, TrainingBatches, mixed_seed, seeded
from dsrcnn.errors import ConfigError


def order(seed):
    return TrainingSampler(10, seed=seed)._infinite_indices()


def first(batches, count):
    return list(itertools.islice(iter(batches), count))


def test_every_epoch_has_every_record_once():
    drawn = [d.record for b in first(TrainingBatches(order, 5, seed=3), 4) for d in b]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]


def test_a_stream_that_starts_later_goes_on_as_the_whole_one():
    groups = [0, 1] * 5
    whole = first(TrainingBatches(order, 3, seed=1, groups=groups), 12)
    assert first(TrainingBatches(order, 3, seed=1, groups=groups, start=7), 5) == whole[7:]


def test_another_seed_gives_other_images_and_augmentations():
    one, other = (first(TrainingBatches(order, 5, seed=s), 4) for s in (1, 2))
    assert one != other
    assert not {d.seed for b in one for d in b} & {d.seed for b in other for d in b}


def test_a_batch_holds_images_of_one_group():
    groups = [i % 2 for i in range(10)]
    for batch in first(TrainingBatches(order, 4, seed=0, groups=groups), 20):
        assert len({groups[d.record] for d in batch}) == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_share_the_batches_of_one_process(world_size):
    groups = [0] * 3 + [1] * 7
    alone = first(TrainingBatches(order, 4, seed=5, groups=groups), 9)
    parts = [
        first(TrainingBatches(order, 4, seed=5, groups=groups, rank=r, world_size=world_size), 9)
        for r in range(world_size)
    ]
    for whole, *shared in zip(alone, *parts, strict=True):
        assert sorted(itertools.chain(*shared)) == sorted(whole)
        assert {len(s) for s in shared} == {4 // world_size}


def test_a_draw_determines_the_random_numbers_of_its_augmentation():
    def mapper(record):
        return (record, random.random(), np.random.rand(), torch.rand(1).item())

    dataset = SeededDataset(list("abc"), mapper)
    draws = first(TrainingBatches(lambda seed: itertools.cycle([0, 1, 0]), 3, seed=0), 1)[0]
    once = [dataset[d] for d in draws]
    assert [dataset[d] for d in reversed(draws)] == once[::-1]
    assert once[0][0] == once[2][0] == "a"
    assert once[0] != once[2]  # another draw of the same image is augmented anew


def test_seeding_leaves_the_random_numbers_outside_alone():
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    with seeded(3):
        torch.rand(5), np.random.rand(5), random.random()
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected


def test_mixed_seeds_differ_in_every_part():
    seeds = {mixed_seed(a, b, c) for a in range(5) for b in range(20) for c in range(4)}
    assert len(seeds) == 400
    assert mixed_seed(1, 2) == mixed_seed(1, 2)


def images_of(cfg, start=0, count=3):
    loader = build_train_loader(cfg)
    loader.batch_sampler.start = start
    return list(itertools.islice(iter(loader), count))


def same(a, b):
    return all(
        x["file_name"] == y["file_name"]
        and torch.equal(x["image"], y["image"])
        and torch.equal(x["instances"].gt_boxes.tensor, y["instances"].gt_boxes.tensor)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p, q, strict=True)
    )


def test_batches_depend_neither_on_workers_nor_on_where_the_run_starts(tmp_path):
    options = ["INPUT.MIN_SIZE_TRAIN", "(48, 64, 80)", "INPUT.CROP.ENABLED", True]
    options += ["INPUT.CROP.TYPE", "relative_range", "INPUT.CROP.SIZE", "(0.5, 0.5)"]
    whole = images_of(quick_cfg(tmp_path, *options), count=5)
    parallel = images_of(quick_cfg(tmp_path, *options, "DATALOADER.NUM_WORKERS", 2), count=5)
    assert same(whole, parallel)
    assert same(whole[2:], images_of(quick_cfg(tmp_path, *options), start=2))
    assert not same(whole, images_of(quick_cfg(tmp_path, *options, "SEED", 4), count=5))


def test_images_of_rare_classes_come_more_often_by_choice(tmp_path):
    repeat = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    cfg = quick_cfg(tmp_path, *repeat, "DATALOADER.REPEAT_THRESHOLD", 0.9)
    assert same(images_of(cfg), images_of(cfg))
    plain = build_train_loader(quick_cfg(tmp_path)).batch_sampler
    repeated = build_train_loader(cfg).batch_sampler
    epoch = len(training_records(cfg))
    drawn = list(itertools.islice(repeated.order(0), epoch))
    assert len(set(drawn)) < len(set(itertools.islice(plain.order(0), epoch))) == epoch


def test_a_random_subset_is_all_there_is(tmp_path):
    cfg = quick_cfg(tmp_path, "DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler")
    cfg.DATALOADER.set_new_allowed(True)
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.004
    assert same(images_of(cfg), images_of(cfg))
    names = {x["file_name"] for b in images_of(cfg, count=20) for x in b}
    assert len(names) <= 8


def test_an_unknown_order_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="SAMPLER_TRAIN is 'Shuffle'; write one of Training"):
        build_train_loader(quick_cfg(tmp_path, "DATALOADER.SAMPLER_TRAIN", "Shuffle"))


def test_a_batch_that_cannot_be_shared_out_is_an_error():
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", 6, "SOLVER.ACCUMULATE", 4)
    with pytest.raises(ConfigError, match="must be a multiple of 4: 1 processes times"):
        build_train_loader(cfg)
