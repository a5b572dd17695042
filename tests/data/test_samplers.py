"""Batches as a function of the seed, and the orders of records that a config may choose."""

import itertools
import random

import numpy as np
import pytest
import torch
from conftest import quick_cfg, tiny_cfg
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler

from dsrcnn.data.build import build_train_loader, training_records
from dsrcnn.data.samplers import TrainingBatches, derive_seed, seeded
from dsrcnn.data.transforms.mosaic import MixDataset
from dsrcnn.errors import ConfigError


def order(seed):
    return TrainingSampler(10, seed=seed)._infinite_indices()


def first(batches, count):
    return list(itertools.islice(iter(batches), count))


def test_every_epoch_has_every_record_once():
    records = [d.record for b in first(TrainingBatches(order, 5, seed=3), 4) for d in b]
    assert sorted(records[:10]) == sorted(records[10:]) == list(range(10))
    assert records[:10] != records[10:]


def test_late_start_continues_the_sequence():
    groups = [0, 1] * 5
    whole = first(TrainingBatches(order, 3, seed=1, groups=groups), 12)
    assert first(TrainingBatches(order, 3, seed=1, groups=groups, start=7), 5) == whole[7:]


def test_another_seed_gives_other_images_and_augmentations():
    one, other = (first(TrainingBatches(order, 5, seed=s), 4) for s in (1, 2))
    assert one != other
    assert not {d.seed for b in one for d in b} & {d.seed for b in other for d in b}


def test_images_of_a_batch_are_of_one_group():
    groups = [i % 2 for i in range(10)]
    for batch in first(TrainingBatches(order, 4, seed=0, groups=groups), 20):
        assert len({groups[d.record] for d in batch}) == 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_divide_the_batches_of_a_single_process(world_size):
    options = {"seed": 5, "groups": [0] * 3 + [1] * 7}
    single = first(TrainingBatches(order, 4, **options), 9)
    parts = [
        first(TrainingBatches(order, 4, **options, rank=rank, world_size=world_size), 9)
        for rank in range(world_size)
    ]
    for whole, *local in zip(single, *parts, strict=True):
        assert sorted(itertools.chain(*local)) == sorted(whole)
        assert {len(p) for p in local} == {4 // world_size}


def test_random_numbers_of_an_image_follow_from_its_draw():
    def mapper(record):
        return record, random.random(), np.random.rand(), torch.rand(1).item()

    off = {"mosaic": 0, "copy_paste": 0, "mixup": 0}
    dataset = MixDataset(list("abc"), mapper, **off, mosaic_size=0, min_visible=0, fill=())
    (draws,) = first(TrainingBatches(lambda seed: itertools.cycle([0, 1, 0]), 3, seed=0), 1)
    samples = [dataset[d] for d in draws]
    assert [dataset[d] for d in reversed(draws)] == samples[::-1]
    assert samples[0][0] == samples[2][0] == "a"
    assert samples[0] != samples[2]  # the same image with another augmentation


def test_seeded_block_restores_the_random_states():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    expected = draw()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    with seeded(3):
        draw()
    assert draw() == expected


def test_derived_seeds_differ_in_every_part():
    seeds = {derive_seed(a, b, c) for a in range(5) for b in range(20) for c in range(4)}
    assert len(seeds) == 400
    assert derive_seed(1, 2) == derive_seed(1, 2)


def batches_of(cfg, start=0, count=3):
    loader = build_train_loader(cfg)
    loader.batch_sampler.start = start
    return first(loader, count)


def same(a, b):
    return all(
        x["file_name"] == y["file_name"]
        and torch.equal(x["image"], y["image"])
        and torch.equal(x["instances"].gt_boxes.tensor, y["instances"].gt_boxes.tensor)
        for p, q in zip(a, b, strict=True)
        for x, y in zip(p, q, strict=True)
    )


def test_batches_depend_neither_on_workers_nor_on_the_start(tmp_path):
    options = ["INPUT.MIN_SIZE_TRAIN", "(48, 64, 80)", "INPUT.CROP.ENABLED", True]
    options += ["INPUT.CROP.TYPE", "relative_range", "INPUT.CROP.SIZE", "(0.5, 0.5)"]
    whole = batches_of(quick_cfg(tmp_path, *options), count=5)
    parallel = batches_of(quick_cfg(tmp_path, *options, "DATALOADER.NUM_WORKERS", 2), count=5)
    assert same(whole, parallel)
    assert same(whole[2:], batches_of(quick_cfg(tmp_path, *options), start=2))
    assert not same(whole, batches_of(quick_cfg(tmp_path, *options, "SEED", 4), count=5))


def test_repeat_factor_sampler_repeats_images_of_rare_classes(tmp_path):
    repeat = ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    cfg = quick_cfg(tmp_path, *repeat, "DATALOADER.REPEAT_THRESHOLD", 0.9)
    assert same(batches_of(cfg), batches_of(cfg))
    plain = build_train_loader(quick_cfg(tmp_path)).batch_sampler
    repeated = build_train_loader(cfg).batch_sampler
    epoch = len(training_records(cfg))
    assert len(set(first(repeated.order(0), epoch))) < epoch
    assert len(set(first(plain.order(0), epoch))) == epoch


def test_the_root_of_repeat_factors_is_the_choice_of_later_versions_of_detectron2(
    tmp_path, monkeypatch
):
    chosen = []
    name = "repeat_factors_from_category_frequency"

    def factors(records, threshold, **options):
        chosen.append(options)
        return torch.ones(len(records))

    monkeypatch.setattr(RepeatFactorTrainingSampler, name, staticmethod(factors))
    cfg = quick_cfg(tmp_path, "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler")
    batches_of(cfg)
    cfg.DATALOADER.set_new_allowed(True)
    cfg.DATALOADER.REPEAT_SQRT = False
    batches_of(cfg)
    assert {} in chosen
    assert chosen[-1] == {"sqrt": False}


def test_random_subset_sampler_uses_a_fixed_subset(tmp_path):
    cfg = quick_cfg(tmp_path)
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"  # its key is upstream's
    cfg.DATALOADER.set_new_allowed(True)
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.004
    assert same(batches_of(cfg), batches_of(cfg))
    assert len({x["file_name"] for b in batches_of(cfg, count=20) for x in b}) <= 8


def test_unknown_sampler_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="SAMPLER_TRAIN is 'Shuffle'; write one of Training"):
        build_train_loader(quick_cfg(tmp_path, "DATALOADER.SAMPLER_TRAIN", "Shuffle"))


def test_batch_that_cannot_be_divided_is_an_error():
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", 6, "SOLVER.ACCUMULATE", 4)
    with pytest.raises(ConfigError, match="must be a multiple of 4: 1 processes times"):
        build_train_loader(cfg)
