"""Every shipped config is complete."""

from pathlib import Path

import pytest

from dsrcnn import load_cfg
from dsrcnn.config import check_config, read_cfg, shipped_configs
from dsrcnn.config.validate import num_classes_key
from dsrcnn.data.datasets import class_names
from dsrcnn.modeling.postprocessing import DetectionSettings


def has_data(cfg):
    custom = cfg.DATASETS.CUSTOM
    if custom.NAME:
        files = [f for f in (custom.TRAIN_JSON, custom.TEST_JSON) if f]
        return bool(files) and all(Path(f).is_file() for f in files)
    names = (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    return bool(names) and all(class_names(name) is not None for name in names)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_passes_its_checks(name):
    cfg = read_cfg(name)
    for node in (cfg.MODEL.SparseRCNN, cfg.MODEL.ROI_HEADS):
        node.NUM_CLASSES = node.NUM_CLASSES or 7  # in place of the data's number
    check_config(cfg)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_loads_if_its_data_are_available(name):
    if not has_data(read_cfg(name)):
        pytest.skip("its data are not on this machine")
    cfg = load_cfg(name)
    count = cfg
    for part in num_classes_key(cfg).split("."):
        count = count[part]
    assert count > 0
    for split in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert len(class_names(split)) == count


def test_the_recipe_of_640_pixels_has_the_settings_of_its_readme():
    cfg = read_cfg("coco/sparse_rcnn_R50_128pro_640")
    node, solver, aug = cfg.MODEL.SparseRCNN, cfg.SOLVER, cfg.INPUT.AUG
    factors = (0.1, 0.1, 0.2, 0.2)
    assert tuple(node.BOX_WEIGHTS) == pytest.approx([1 / x for x in factors])
    assert (node.NUM_PROPOSALS, cfg.TEST.DETECTIONS_PER_IMAGE) == (128, 128)
    assert (solver.EPOCHS.MAX, tuple(solver.EPOCHS.STEPS)) == (36, (27, 33))
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.GAMMA) == (16, 2.5e-5, 0.1)
    assert solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR"
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (1000, 0.01)
    assert not solver.CLIP_GRADIENTS.ENABLED
    # One of four: no change, colors, blur and noise; the last two with a half.
    assert [aug[x].PROB for x in ("HSV", "BLUR", "NOISE")] == [1 / 4, 1 / 8, 1 / 8]
    assert (aug.MOSAIC.PROB, aug.MOSAIC.SIZE, cfg.INPUT.PAD_TO) == (0.8, 640, 640)


SMALL = ["sqr_deformable_detr", "deformable_detr", "adamixer", "sparse_rcnn_sqr1"]


@pytest.mark.parametrize("name", SMALL)
def test_small_models_that_are_compared_have_equal_data_sizes_and_schedules(name):
    cfg, yardstick = (read_cfg(f"small/{x}_lite0_100pro") for x in (name, "sparse_rcnn"))
    for node in ("INPUT", "SOLVER", "DATALOADER", "TEST"):
        assert cfg[node] == yardstick[node], node
    for key in ("NUM_PROPOSALS", "NUM_HEADS", "HIDDEN_DIM", "NHEADS", "DIM_FEEDFORWARD"):
        assert cfg.MODEL.SparseRCNN[key] == yardstick.MODEL.SparseRCNN[key], key
    assert cfg.MODEL.TIMM == yardstick.MODEL.TIMM


def test_dpg_has_norms_over_all_gpus_in_configs_for_several():
    several = [name for name in shipped_configs() if not name.startswith(("small/", "quick/"))]
    nodes = {name: read_cfg(name).MODEL.SparseRCNN.DPG for name in several}
    norms = {name: node.NORM for name, node in nodes.items() if node.ENABLED}
    assert len(norms) > 10
    assert set(norms.values()) == {"SyncBN"}


def test_no_two_shipped_configs_write_to_the_same_folder():
    folders = [read_cfg(name).OUTPUT_DIR for name in shipped_configs()]
    assert len(set(folders)) == len(folders)


PUBLISHED_SQR = [
    *("coco/adamixer_sqr1_R50_100pro_1x", "coco/adamixer_sqr1_R101_300pro_7stages_3x"),
    "coco/sqr_deformable_detr_R50_50ep",
]


@pytest.mark.parametrize("name", PUBLISHED_SQR)
def test_models_that_sqr_was_published_on_are_evaluated_without_nms(name):
    cfg = read_cfg(name)
    assert cfg.MODEL.SparseRCNN.SQR.ENABLED
    assert DetectionSettings.from_config(cfg).nms_threshold is None


def test_networks_of_timm_are_not_frozen():
    backbones = {name: read_cfg(name).MODEL.BACKBONE for name in shipped_configs()}
    frozen = {name: x.FREEZE_AT for name, x in backbones.items() if "timm" in x.NAME}
    assert len(frozen) > 10
    assert set(frozen.values()) == {0}


def test_efficientnet_b3_has_batch_norms_that_train_as_its_source():
    cfg = read_cfg("coco/dynamic_sparse_rcnn_efficientnet_b3_128pro")
    assert (cfg.MODEL.TIMM.NORM, cfg.MODEL.BACKBONE.NORM_EVAL) == ("", False)


def test_swin_starts_from_the_published_weights_and_decays_as_published():
    cfg = read_cfg("coco/adamixer_swin_small_300pro_3x")
    assert cfg.MODEL.TIMM.NAME == "swin_small_patch4_window7_224.ms_in1k"
    assert set(cfg.SOLVER.NO_DECAY) == {"norm", "position"}


# Images of COCO's train2017: all, and those with objects that are not crowds.
ALL_IMAGES, WITH_OBJECTS = 118_287, 117_266
MMDETECTION = [
    *("coco/adamixer_R50_100pro_1x", "coco/adamixer_R50_100pro_3x", "coco/adamixer_R50_300pro_3x"),
    *("coco/adamixer_swin_small_300pro_3x", *PUBLISHED_SQR),
]


@pytest.mark.parametrize(("name", "epochs"), [
    *((name, 12 if name.endswith("1x") else 36) for name in MMDETECTION[:-1]),
    *((f"coco/{name}_R50_50ep", 50) for name in (
        "sqr_deformable_detr", "deformable_detr", "deformable_detr_plain",
        "deformable_detr_two_stage",
    )),
])  # fmt: skip
def test_iterations_are_whole_epochs_of_the_images_that_are_trained_on(name, epochs):
    cfg = read_cfg(name)
    assert (name in MMDETECTION) == cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    # mmdetection fills the last batch, the code of Deformable DETR drops it.
    size = cfg.SOLVER.IMS_PER_BATCH
    length = -(-WITH_OBJECTS // size) if name in MMDETECTION else ALL_IMAGES // size
    assert epochs * length == cfg.SOLVER.MAX_ITER
    assert all(step % length == 0 for step in cfg.SOLVER.STEPS)
    assert length == cfg.TEST.EVAL_PERIOD
