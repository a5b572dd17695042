"""Size buckets: chosen from the data, used by loader and model, stable over a run."""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from conftest import SMALL, batch, coco_options, quick_cfg, tiny_cfg, train
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from PIL import Image

from dsrcnn.config import load_cfg
from dsrcnn.data import build_train_loader
from dsrcnn.data.buckets import (
    bucket_groups,
    choose_buckets,
    merge_sizes,
    merge_small_groups,
    orientation_groups,
)
from dsrcnn.data.samplers import seeded
from dsrcnn.data.transforms.build import build_resizing
from dsrcnn.engine.setup import restore_drawn, setup_run
from dsrcnn.errors import ConfigError
from dsrcnn.structures.buckets import smallest_bucket


def test_sizes_whose_union_adds_the_fewest_pixels_are_merged():
    # (32, 64) and (32, 96) cost 32 * 32 pixels an image, any union with (128, 64) more.
    sizes = Counter({(32, 64): 1, (32, 96): 1, (128, 64): 1})
    assert merge_sizes(sizes, 3) == [(32, 64), (32, 96), (128, 64)]
    assert merge_sizes(sizes, 2) == [(32, 96), (128, 64)]
    assert merge_sizes(sizes, 1) == [(128, 96)]
    # A size of many images is not enlarged for one of few: here (32, 64) is left alone.
    sizes = Counter({(32, 64): 100, (32, 96): 1, (64, 96): 1})
    assert merge_sizes(sizes, 2) == [(32, 64), (64, 96)]


def test_an_image_gets_the_smallest_bucket_that_contains_it():
    buckets = [(64, 64), (64, 96), (96, 64), (128, 128)]
    table = {(60, 64): (64, 64), (65, 64): (96, 64), (64, 65): (64, 96), (97, 97): (128, 128)}
    assert {size: smallest_bucket(size, buckets) for size in table} == table
    assert smallest_bucket((129, 10), buckets) is None


def records(*shapes):
    return [{"height": h, "width": w} for h, w in shapes]


def test_all_images_fit_at_every_size_and_share_batches_with_like_ones():
    cfg = tiny_cfg(
        *("INPUT.MIN_SIZE_TRAIN", (64, 96), "INPUT.MAX_SIZE_TRAIN", 160),
        *("INPUT.MIN_SIZE_TEST", 96, "INPUT.MAX_SIZE_TEST", 160, "INPUT.NUM_BUCKETS", 5),
    )
    data = records((480, 640), (640, 480), (500, 500), (480, 640), (100, 900))
    buckets = choose_buckets(cfg, [*data, {}])
    # 64 x 85, 96 x 128; turned; 64 x 64, 96 x 96; 18 x 160: each rounded up to 32.
    assert len(buckets) == 5
    for size in ((64, 96), (96, 128), (96, 64), (128, 96), (64, 64), (96, 96), (32, 160)):
        assert smallest_bucket(size, buckets) is not None
    cfg.INPUT.BUCKETS = buckets
    cfg.SOLVER.IMS_PER_BATCH = 2
    many = [*data[:4], *data[:3], {}] * 9  # enough of each shape
    groups = bucket_groups(cfg, many)
    assert groups[0] == groups[3]
    assert len({groups[0], groups[1], groups[2]}) == 3
    assert groups[7] == 5  # of unknown size


def test_sizes_of_large_scale_jitter_count_if_it_is_on():
    jitter = ("INPUT.AUG.SCALE_JITTER.SIZE", 256, "INPUT.NUM_BUCKETS", 4)
    test = ("INPUT.MIN_SIZE_TEST", 128, "INPUT.MAX_SIZE_TEST", 256, "INPUT.MIN_SIZE_TRAIN", (800,))
    cfg = tiny_cfg(*jitter, *test)
    buckets = choose_buckets(cfg, records((480, 640)))
    assert buckets[-1] == (256, 256)  # the crop; 800 pixels are for training without jitter
    small = [bucket for bucket in buckets if bucket[0] * bucket[1] <= 128 * 128]
    assert small  # for images of a tenth to half of the crop
    augmentations = T.AugmentationList(build_resizing(cfg))
    for seed in range(50):
        with seeded(seed):
            augmented = T.AugInput(np.zeros((480, 640, 3), np.uint8))
            augmentations(augmented)
        assert smallest_bucket(augmented.image.shape[:2], buckets) is not None


def test_images_of_rare_shapes_join_a_larger_group():
    """Batches of their own would come late, full of the same images."""
    buckets = [(32, 64), (64, 32), (64, 64), (64, 96)]
    groups = [0] * 9 + [1] * 2 + [2] * 8 + [3] + [4]
    # (64, 32) fits in (64, 64); what fits in no large group, or has no size, joins the largest.
    expected = [0] * 9 + [2] * 2 + [2] * 8 + [0] + [0]
    assert merge_small_groups(groups, 2, buckets) == expected
    assert merge_small_groups([0, 1, 1], 2, buckets) == [1, 1, 1]
    assert merge_small_groups([], 2, buckets) == []


@pytest.mark.parametrize(("portraits", "count"), [(7, 1), (8, 2)])
def test_few_images_of_one_orientation_share_batches_with_the_others(portraits, count):
    cfg = tiny_cfg("SOLVER.IMS_PER_BATCH", 2)
    data = records(*[(480, 640)] * 20, *[(640, 480)] * portraits)
    assert len(set(orientation_groups(cfg, data))) == count


def test_a_batch_has_no_copies_of_a_rare_orientation(tmp_path):
    options = coco_options(tmp_path / "data", count=12)
    file = tmp_path / "data/annotations.json"
    content = json.loads(file.read_text())
    content["images"][0] |= {"height": 96, "width": 64}
    file.write_text(json.dumps(content))
    Image.new("RGB", (64, 96)).save(tmp_path / "data/images/1.jpg")
    loader = build_train_loader(quick_cfg(tmp_path, *options, "SOLVER.IMS_PER_BATCH", 4))
    for draws in islice(loader.batch_sampler, 36):
        assert len({draw.record for draw in draws}) == 4


def test_one_bucket_contains_all_others():
    opts = ("INPUT.NUM_BUCKETS", 3, "INPUT.MIN_SIZE_TRAIN", (64,), "INPUT.MIN_SIZE_TEST", 64)
    cfg = tiny_cfg(*opts, "INPUT.MAX_SIZE_TRAIN", 160)
    data = records((480, 640), (640, 480), (480, 900))
    assert set(choose_buckets(cfg, data)) == {(64, 128), (96, 64), (96, 128)}


def test_batches_are_padded_to_a_bucket_or_to_their_own_size():
    cfg = tiny_cfg("INPUT.BUCKETS", [[96, 128], [128, 96], [96, 160]])
    model = build_model(cfg).eval()
    for sizes, expected in (
        ([(64, 90), (90, 70)], (96, 128)), ([(100, 60)], (128, 96)), ([(64, 129)], (96, 160)),
        ([(100, 100)], (128, 128)), ([(200, 90)], (224, 96)),
    ):  # fmt: skip
        inputs = batch(sizes, [1] * len(sizes))
        assert tuple(model.preprocess_image(inputs).tensor.shape[-2:]) == expected


def test_an_image_has_the_same_detections_alone_and_beside_others_of_its_bucket():
    model = build_model(tiny_cfg("INPUT.BUCKETS", [[96, 128]])).eval()
    one, other = batch([(64, 90), (96, 128)], [1, 1])
    with torch.no_grad():
        alone = model([one])[0]["instances"]
        together = model([one, other])[0]["instances"]
    torch.testing.assert_close(
        alone.pred_boxes.tensor, together.pred_boxes.tensor, atol=1e-3, rtol=0
    )
    torch.testing.assert_close(alone.scores, together.scores)


def test_a_run_chooses_its_buckets_once_and_keeps_them(tmp_path):
    opts = ("INPUT.NUM_BUCKETS", 2, "INPUT.MIN_SIZE_TRAIN", (48, 64), "SOLVER.IMS_PER_BATCH", 2)
    cfg = quick_cfg(tmp_path, *opts)
    trainer = train(cfg)
    buckets = trainer.cfg.INPUT.BUCKETS
    assert 1 <= len(buckets) <= 2
    sizes = set()
    model = trainer.model
    for images in islice(iter(build_train_loader(trainer.cfg)), 8):
        sizes.add(tuple(model.preprocess_image(images).tensor.shape[-2:]))
    assert sizes <= {tuple(b) for b in buckets}
    saved = torch.load(tmp_path / "model_final.pth")["config"]
    assert "BUCKETS: []" not in saved


def test_another_run_chooses_again_and_a_resumed_one_keeps_its_buckets(tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path / "out"), "INPUT.NUM_BUCKETS", "2"]
    words = [*SMALL, *opts, "INPUT.BUCKETS", "[[640, 640]]"]
    chosen = setup_run("quick/sparse_rcnn_shapes", words).INPUT.BUCKETS
    assert chosen
    assert [640, 640] not in [list(b) for b in chosen]
    saved = load_cfg("quick/sparse_rcnn_shapes", [*words, "INPUT.BUCKETS", "[[96, 96]]"])
    (tmp_path / "out/config.yaml").write_text(saved.dump())
    (tmp_path / "out/last_checkpoint").write_text("model_0000001.pth")
    cfg = load_cfg("quick/sparse_rcnn_shapes", words)
    restore_drawn(cfg)
    assert [list(b) for b in cfg.INPUT.BUCKETS] == [[96, 96]]


@pytest.mark.parametrize("value", [[64], [[64, 0]], [[64, 64, 64]], [["a", 64]], [[64.5, 64]]])
def test_values_that_are_no_sizes_are_refused(value):
    with pytest.raises(ConfigError, match=r"INPUT.BUCKETS.*pairs \(height, width\)"):
        load_cfg("quick/sparse_rcnn_shapes", ["INPUT.BUCKETS", value])
