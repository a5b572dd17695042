"""Keys of ASAG (arXiv 2308.09242)."""

from detectron2.config import CfgNode

__all__ = ["add_asag_keys"]


def add_asag_keys(cfg: CfgNode) -> None:
    """Add ``MODEL.ASAG``; layers, classes and loss weights are ``MODEL.SparseRCNN``'s."""
    node = cfg.MODEL.ASAG = CfgNode()
    node.DECODER = "AdaMixer"  # whose layer: AdaMixer (ASAG-A) or SparseRCNN (ASAG-S)
    node.NUM_DECODERS = 4  # side by side, all are trained
    node.USED_HEAD = -1  # which of them inference uses, from 0; -1: the last
    node.QUERY_WEIGHTING = True  # matched queries teach by how sure they are and how well they fit
    node.SMALL_OBJECT_WEIGHT = 4.0  # the most an object weighs; 1: all the same
    # Two mistakes of the published code, in training: flipped patches learn boxes flipped in a
    # wrong way, and norms of patches start at random. False: without them.
    node.OFFICIAL_QUIRKS = False
    node.TRAIN_PATCHES = 4  # of every image and probed level, at least
    # Of the training, at its start, patches are around objects: one epoch of 12.
    node.GUIDED_PART = 1 / 12
    node.LOG_PERIOD = 20  # iterations between entries on anchors and patches in the log; 0: none

    # The anchor generator
    node.ANCHORS = anchors = CfgNode()
    anchors.FIXED = 50  # anchors of each of the 5 patches of P6 and P5
    anchors.PROBED = 20  # of each patch of P4 and P3
    anchors.CELLS = 15  # per side of a patch
    anchors.COMPRESSED = 8  # channels that patches are cut from
    anchors.HIDDEN = 1000  # width of the predictors
    # Anchors with a location score between these are looked at on a finer level
    anchors.LOW = 0.1
    anchors.HIGH = 0.7
    anchors.OVERLAP = 0.25  # IoU of patches above which the better one is enough
    anchors.MAX_PATCHES = 0  # of an image and level; 0: no limit; 15: the paper's fast setting
    anchors.MIN_CHOSEN = 1  # anchors that are worth a level, in inference; 3: as above
    anchors.INFERENCE_LEVEL = "P3P6"  # or P4P6, P5P6: levels that are used, in training too
    # What is given out
    anchors.OUTPUT = 0.1  # least location score
    anchors.MIN = 5  # of an image
    anchors.MAX = 200
    anchors.MIN_SIDE = 3.0  # in pixels
    # Losses
    anchors.CLASS_WEIGHT = 8.0
    anchors.L1_WEIGHT = 4.0
    anchors.GIOU_WEIGHT = 2.0

    # Denoising queries, in training only (ASAG-A-dn)
    node.DN = CfgNode()
    node.DN.ENABLED = False
    node.DN.NUM = 200
    node.DN.NOISE = 0.4  # of the boxes
