"""Every shipped config is complete."""

from pathlib import Path

import pytest

from dsrcnn import load_cfg
from dsrcnn.config import check_config, read_cfg, shipped_configs
from dsrcnn.config.validate import num_classes_key
from dsrcnn.data.datasets import class_names


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


def test_no_two_shipped_configs_write_to_the_same_folder():
    folders = [read_cfg(name).OUTPUT_DIR for name in shipped_configs()]
    assert len(set(folders)) == len(folders)
