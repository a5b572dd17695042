"""Every key this package adds to Detectron2's config, with its default.

The keys of the official Sparse R-CNN keep name, default and meaning, so its YAML files load
unchanged. Detectron2's own keys are never shadowed.
"""

from detectron2.config import CfgNode

from .defaults_asag import add_asag_keys
from .defaults_data import add_data_keys
from .defaults_training import add_training_keys

__all__ = ["add_dsrcnn_config"]


def add_dsrcnn_config(cfg: CfgNode) -> CfgNode:
    """Add the keys to `cfg`, in place, and return it.

    Args:
        cfg: usually ``detectron2.config.get_cfg()``.
    """
    _add_sparse_rcnn(cfg)
    _add_dynamic_label_assignment(cfg)
    _add_dynamic_proposals(cfg)
    _add_suppression(cfg)
    _add_recollection(cfg)
    _add_adamixer(cfg)
    add_asag_keys(cfg)
    _add_dynamic_rcnn(cfg)
    _add_backbones(cfg)
    add_training_keys(cfg)
    add_data_keys(cfg)
    return cfg


def _add_sparse_rcnn(cfg: CfgNode) -> None:
    node = cfg.MODEL.SparseRCNN = CfgNode()
    node.NUM_CLASSES = 80  # 0: as many as the training data have
    node.NUM_PROPOSALS = 300
    node.PROPOSALS = CfgNode()
    node.PROPOSALS.BOXES = "image"  # where boxes start: image, center, grid or random

    # The cascade
    node.NHEADS = 8  # heads of the self-attention among proposals
    node.DROPOUT = 0.0
    node.DIM_FEEDFORWARD = 2048
    node.ACTIVATION = "relu"  # of the feed-forward network: relu or gelu
    node.HIDDEN_DIM = 256  # channels of proposal features; equals MODEL.FPN.OUT_CHANNELS
    node.NUM_CLS = 1  # layers of the classification tower
    node.NUM_REG = 3  # layers of the box tower
    node.NUM_HEADS = 6  # stages
    node.NUM_DYNAMIC = 2  # convolutions each proposal generates; only 2 is defined
    node.DIM_DYNAMIC = 64  # channels between them

    # Losses; without DLA the same weights build the matching cost
    node.CLASS_WEIGHT = 2.0
    node.GIOU_WEIGHT = 2.0
    node.L1_WEIGHT = 5.0
    # How well boxes fit, weighted by GIOU_WEIGHT and DLA.GIOU_COST: iou, giou, diou or ciou
    node.OVERLAP = CfgNode()
    node.OVERLAP.LOSS = "giou"
    node.OVERLAP.COST = "giou"
    node.DEEP_SUPERVISION = True  # losses on every stage, not only on the last
    node.NO_OBJECT_WEIGHT = 0.1  # weight of the background class without focal loss

    # Focal loss
    node.USE_FOCAL = True  # False: softmax with a background class
    node.ALPHA = 0.25
    node.GAMMA = 2.0
    node.PRIOR_PROB = 0.01  # class score of an untrained model


def _add_dynamic_label_assignment(cfg: CfgNode) -> None:
    # DLA of Dynamic Sparse R-CNN (arXiv 2205.02101, section 3.1). What the paper leaves open is an
    # option here; docs/METHODS.md says what is known and what was chosen.
    node = cfg.MODEL.SparseRCNN.DLA = CfgNode()
    node.ENABLED = False  # False: one proposal per ground truth, by Hungarian matching
    node.MATCHER = "OptimalTransportMatcher"  # or SimOTAMatcher, HungarianMatcher

    # Weights of the matching cost; with DLA these, not those of the losses
    node.CLASS_COST = 2.0
    node.L1_COST = 5.0
    node.GIOU_COST = 2.0

    # Units: how many proposals a ground truth supplies
    node.TOP_Q = 8  # dynamic units: the sum of this many largest IoUs
    node.STATIC_UNITS = 0  # above 0: this many for every ground truth instead
    node.UNIT_STEP = 0.5  # units fewer per stage before the last; 0: the same in every stage
    node.MAX_POSITIVE_FRACTION = 0.8  # of an image's proposals, at most this part is positive
    node.MIN_UNITS = 1  # the least a ground truth gets; 0: nothing where nothing fits it
    node.ROUNDING = "floor"  # floor or round, to whole units
    node.ORDER = "step_then_cap"  # or cap_then_step: which of the two limits comes first

    # Transport
    node.EPSILON = 0.1  # entropy, in units of the cost
    node.ITERATIONS = 50  # Sinkhorn sweeps
    node.DECISION = "rescale"  # plan to assignment: rescale, topk, or exact (on the host, slow)
    node.REPAIR = 0  # passes that give a proposal to ground truths that got none

    # What losses are divided by: positives of the set, or gt, the ground truths, as Sparse R-CNN
    node.NORMALIZER = "positives"
    node.LOG_PERIOD = 20  # iterations between entries on the assignment in the log; 0: none


def _add_dynamic_proposals(cfg: CfgNode) -> None:
    # DPG of Dynamic Sparse R-CNN (arXiv 2205.02101, section 3.2); open questions as above.
    node = cfg.MODEL.SparseRCNN.DPG = CfgNode()
    node.ENABLED = False  # False: the same learned proposals for all images
    node.NUM_EXPERTS = 4  # sets of proposals to mix from

    # The network that looks at the image
    node.STAIRCASE = True  # False: resize every level by itself, the paper's ablation
    node.NORM = "BN"  # of the staircase: BN, SyncBN, FrozenBN, GN or none
    node.REDUCE = "sum"  # over the channels of the map: sum or mean
    node.RESIZE = 30  # side of the map
    node.STANDARDIZE = True  # mean 0 and variance 1 for every map; False: as the paper, collapses
    node.HIDDEN = 1500  # between its two linear layers
    node.ZERO_INIT = False  # start the last layer at zero: all experts weigh the same
    # Every logit standardized over the images of a step, of all processes. Without it, as perhaps
    # in the paper, soon every image gets the same experts, and most experts are never used.
    node.LOGIT_NORM = True
    node.VALID_REGION = False  # resize the image alone, without the padding of the batch

    # Softmax over experts: temperature, linear from start to end; evaluation uses the end
    node.TAU_START = 30.0
    node.TAU_END = 4.0  # of standardized logits; 1.0, as in dynamic convolution, without LOGIT_NORM
    node.TAU_ITERS = None  # iterations; None: 10 / 36 of SOLVER.MAX_ITER

    # Experts
    node.BOX_JITTER = 0.0  # what tells their boxes apart at the start, relative to the box
    node.TILING_NOISE = 0.0  # added to features when a static model is loaded

    node.LOG_PERIOD = 20  # iterations between entries on the mixture in the log; 0: none


def _add_suppression(cfg: CfgNode) -> None:
    node = cfg.MODEL.SparseRCNN.NMS = CfgNode()
    # Suppression of duplicates at inference. None: with DLA if it assigns several
    # proposals to an object, as those learn to be duplicates, and not otherwise.
    node.ENABLED = None
    node.THRESHOLD = 0.7  # IoU above which the lower score goes
    node.CLASS_WISE = True  # only boxes of the same class are duplicates


def _add_recollection(cfg: CfgNode) -> None:
    # Selective query recollection (arXiv 2212.07593): in training, stages also refine proposals as
    # earlier stages left them. Inference and parameters stay the same.
    node = cfg.MODEL.SparseRCNN.SQR = CfgNode()
    node.ENABLED = False
    node.MODE = "selective"  # from one and two stages back, or dense: from all stages before
    node.START = 1  # stages that run plainly before recollection starts; NUM_HEADS: all of them
    node.WINDOWS = ()  # instead of both: for each stage the first and last + 1 of all groups so far
    node.REDUCTION = "sum"  # of the losses of a stage's groups, as the paper, or mean
    node.DETACH_INIT_BOXES = True  # initial boxes learn from the first stage only
    node.CHECKPOINT = False  # compute activations of recollecting stages again for the gradient
    node.CHUNK = 0  # groups a stage refines at once, saves memory with CHECKPOINT; 0: all
    node.LOG_PERIOD = 20  # iterations between entries on the plain cascade in the log; 0: none


def _add_adamixer(cfg: CfgNode) -> None:
    # The decoder of AdaMixer (arXiv 2203.16507); what all cascades share is MODEL.SparseRCNN.
    node = cfg.MODEL.AdaMixer = CfgNode()
    node.GROUPS = 4  # parts that channels are cut into
    node.IN_POINTS = 32  # sampled by each proposal and group
    node.OUT_POINTS = 128  # per group after the mixing
    node.NUM_CLS = 1  # layers of the classification tower
    node.NUM_REG = 1  # layers of the box tower


def _add_dynamic_rcnn(cfg: CfgNode) -> None:
    # Dynamic R-CNN (arXiv 2004.06002), for MODEL.ROI_HEADS.NAME DynamicROIHeads. Official names.
    node = cfg.MODEL.DYNAMIC_RCNN = CfgNode()
    node.IOU_ENABLED = True  # the threshold follows; False: MODEL.ROI_HEADS.IOU_THRESHOLDS
    node.BETA_ENABLED = True  # the box loss follows; False: MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA
    node.KI = 75  # rank of the proposal whose IoU is the statistic, per image
    node.KE = 10  # rank of the error, per image
    node.ITERATION_COUNT = 100  # iterations between updates
    node.WARMUP_IOU = 0.4  # threshold at the start, and the least one
    node.WARMUP_BETA = 1.0  # transition point at the start, and the largest one
    node.MAX_IOU = 1.0  # largest threshold; lower it for crowds of KI objects and more an image
    node.BETA_SOURCE = "sampled"  # errors of sampled foreground, or all: of all proposals
    node.IOU_RANK = "image"  # the mean over images of each one's, or batch: among all
    node.COUNT_GT = True  # ground truths among the proposals count
    node.SYNC = True  # statistics of all processes
    node.EPS = 1e-5  # a median error below it leaves the transition point as it is
    node.LOG_PERIOD = 20  # iterations between entries in the log; 0: none


def _add_backbones(cfg: CfgNode) -> None:
    # For MODEL.BACKBONE.NAME build_timm_fpn_backbone or build_timm_backbone
    node = cfg.MODEL.TIMM = CfgNode()
    node.NAME = "resnet50"  # any network of timm with strides 4, 8, 16 and 32
    node.PRETRAINED = False  # begin with timm's weights, where MODEL.WEIGHTS is empty
    node.WEIGHTS = ""  # a local file of them
    node.NORM = ""  # instead of batch norms: FrozenBN, SyncBN or GN
    node.DROP_PATH = 0.0  # stochastic depth
    node.PIXEL_STATISTICS = True  # PIXEL_MEAN, PIXEL_STD and FORMAT are those of the network
    # For build_timm_fpn_backbone and build_resnet_neck_backbone; channels and norm are MODEL.FPN's
    node = cfg.MODEL.NECK = CfgNode()
    node.NAME = "FPN"  # FPN, PAFPN, BiFPN or ChannelMapper
    node.ROUNDS = 3  # of BiFPN
    node.SHARED_NORM = False  # of ChannelMapper: one norm for all levels
