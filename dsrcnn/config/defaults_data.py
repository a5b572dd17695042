"""Keys of data and augmentation, with their defaults."""

from detectron2.config import CfgNode

__all__ = ["add_data_keys"]


def add_data_keys(cfg: CfgNode) -> None:
    """Add what `DATASETS` and `INPUT` have here."""
    _add_custom_data(cfg)
    _add_augmentation(cfg)


def _add_custom_data(cfg: CfgNode) -> None:
    node = cfg.DATASETS.CUSTOM = CfgNode()
    node.NAME = ""  # registers NAME_train and NAME_test from the data below and uses them
    node.FOLDER = ""  # in the layout of COCO, Pascal VOC or YOLO; or the files, one by one:
    node.TRAIN_SPLIT = "train"  # of the folder; "": none
    node.TEST_SPLIT = "val"
    node.TRAIN_JSON = ""  # COCO json
    node.TRAIN_IMAGES = ""  # folder that its file names are relative to
    node.TEST_JSON = ""
    node.TEST_IMAGES = ""
    node.CLASSES = ()  # names; filled from the json, saved with the config for prediction elsewhere


def _add_augmentation(cfg: CfgNode) -> None:
    # PROB 0: never. Strengths are those of the 640-pixel recipe of liangheming/sparse_rcnnv1.
    cfg.INPUT.PAD_TO = 0  # least side of padded batches; as large as MAX_SIZE_TRAIN: squares
    cfg.INPUT.OPENCV = False  # decode and resize training images by OpenCV: faster than Pillow
    node = cfg.INPUT.AUG = CfgNode()
    node.VERTICAL_FLIP = 0.0  # probability, beside INPUT.RANDOM_FLIP
    node.MIN_VISIBLE = (
        0.0  # objects of which less remains in the image are left out; 0.2 in mosaics
    )
    node.HSV = CfgNode()
    node.HSV.PROB = 0.0
    node.HSV.STRENGTHS = (0.014, 0.68, 0.36)  # of hue (of its circle), saturation and value
    node.BLUR = CfgNode()
    node.BLUR.PROB = 0.0
    node.BLUR.MAX_SIZE = 5  # pixels
    node.NOISE = CfgNode()
    node.NOISE.PROB = 0.0
    node.NOISE.MAX_SIGMA = 15.0  # grey levels
    node.WARP = CfgNode()
    node.WARP.PROB = 0.0
    node.WARP.DEGREES = 10.0
    node.WARP.SCALE = (0.8, 1.2)
    node.WARP.TRANSLATE = 0.0  # of the sides
    node.WARP.SHEAR = 0.0  # degrees
    node.WARP.PERSPECTIVE = 0.0  # of the distance, below 0.5
    node.ALBUMENTATIONS = ()  # before all others: [{name: CLAHE, p: 0.3}, ...]
    # Of several images, after each was augmented by itself
    node.MOSAIC = CfgNode()
    node.MOSAIC.PROB = 0.0
    node.MOSAIC.SIZE = 640
    node.MOSAIC.SCALE = (0.5, 1.5)
    node.MOSAIC.TRANSLATE = 0.1  # of the size
    node.MIXUP = CfgNode()
    node.MIXUP.PROB = 0.0
    node.MIXUP.ALPHA = 8.0
    node.COPY_PASTE = CfgNode()
    node.COPY_PASTE.PROB = 0.0
    node.COPY_PASTE.OBJECTS = 3
    node.COPY_PASTE.MAX_COVERED = 0.7  # objects of which more is covered are left out
    node.PLAIN_END = 0.1  # part of the training at its end in which images are not combined
    node.SCALE_JITTER = CfgNode()  # large-scale jitter (arXiv 2012.07177), instead of multi-scale
    node.SCALE_JITTER.ENABLED = False
    node.SCALE_JITTER.SIZE = 1024
    node.SCALE_JITTER.RANGE = (0.1, 2.0)
