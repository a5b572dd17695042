"""Every key this package adds to Detectron2's config, with its default.

The keys of the official Sparse R-CNN keep name, default and meaning, so its YAML files load
unchanged. Detectron2's own keys are never shadowed.
"""

from detectron2.config import CfgNode

__all__ = ["add_asag_keys", "add_data_keys", "add_dsrcnn_config", "add_training_keys"]


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


def add_training_keys(cfg: CfgNode) -> None:
    """Add what `SOLVER`, `TEST` and `LOG` have here, and what training asks of `MODEL`."""
    _add_solver(cfg)
    _add_schedule_in_epochs(cfg)
    _add_averaged_weights(cfg)
    _add_memory_and_weights(cfg)
    _add_evaluation_while_training(cfg)
    _add_log(cfg)
    _add_test_time_augmentation(cfg)


def _add_solver(cfg: CfgNode) -> None:
    node = cfg.SOLVER
    node.OPTIMIZER = "ADAMW"  # ADAMW or SGD
    node.BACKBONE_MULTIPLIER = 1.0  # learning rate factor of the backbone
    node.NECK_MULTIPLIER = None  # that of its neck (FPN); None: as the backbone, as officially
    node.LAYER_DECAY = 1.0  # factor per part of the backbone (stem, res2, ...) below its last one
    node.NO_DECAY = ()  # any of norm, bias, embedding: without weight decay; officially nothing
    node.REFERENCE_BATCH = 0  # images BASE_LR is meant for; above 0 it is scaled to IMS_PER_BATCH
    node.ACCUMULATE = 1  # parts that a batch is processed in, one after the other, to save memory
    node.AMP.PRECISION = "bf16"  # with AMP.ENABLED: bf16, or fp16 with a gradient scaler
    cfg.DETERMINISTIC = False  # deterministic algorithms on GPUs too, where torch has them


def _add_schedule_in_epochs(cfg: CfgNode) -> None:
    # Above 0, MAX replaces SOLVER.MAX_ITER; each of the others then replaces its key if set.
    node = cfg.SOLVER.EPOCHS = CfgNode()
    node.MAX = 0.0
    node.STEPS = ()  # SOLVER.STEPS
    node.WARMUP = 0.0  # SOLVER.WARMUP_ITERS
    node.CHECKPOINT = 0.0  # SOLVER.CHECKPOINT_PERIOD
    node.EVAL = 0.0  # TEST.EVAL_PERIOD


def _add_averaged_weights(cfg: CfgNode) -> None:
    node = cfg.MODEL.EMA = CfgNode()
    node.ENABLED = False  # evaluate, and store besides, an exponential average of the weights
    node.DECAY = 0.9998  # per iteration
    node.WARMUP = True  # at most (1 + n) / (10 + n) after n iterations: forget the start sooner


def _add_memory_and_weights(cfg: CfgNode) -> None:
    # Activation checkpointing: forget activations and compute them again for the gradient.
    node = cfg.MODEL.CHECKPOINT = CfgNode()
    node.BACKBONE = False  # its blocks
    node.STAGES = False  # of the cascade, with their RoI features
    cfg.MODEL.COMPILE = False  # torch.compile for the stages of the cascade; needs a C++ compiler
    cfg.MODEL.FREEZE = ()  # modules that stay as loaded: ("backbone", "head.head_series.0")
    cfg.MODEL.TRUST_WEIGHTS = False  # run code that a pickled weight file may hold


def _add_evaluation_while_training(cfg: CfgNode) -> None:
    cfg.TEST.LOSS = False  # also the losses on DATASETS.TEST, as validation/* in the log
    node = cfg.TEST.BEST = CfgNode()
    node.METRIC = "bbox/AP"  # the model that is best by it is kept as model_best.pth; "": none
    node.MODE = "max"  # max or min
    node.PATIENCE = 0  # evaluations without a better model after which training ends; 0: never


def _add_log(cfg: CfgNode) -> None:
    node = cfg.LOG = CfgNode()
    node.IMAGES = 4  # images of the first test set drawn for TensorBoard at each evaluation
    node.CSV = False  # metrics.csv beside metrics.json: iteration, name, value
    node.WANDB_PROJECT = ""  # Weights & Biases, where wandb is installed


def _add_test_time_augmentation(cfg: CfgNode) -> None:
    node = cfg.TEST.AUG
    # 800 comes last on purpose: the plain scale is listed after all others.
    node.MIN_SIZES = (400, 500, 600, 640, 700, 900, 1000, 1100, 1200, 1300, 1400, 1800, 800)
    node.CVPODS_TTA = True  # merge by soft box voting; False: by plain suppression
    node.SCALE_FILTER = True  # keep a detection only where its size suits the scale
    # Smallest and largest side (square root of the area) to keep, one pair per entry of MIN_SIZES.
    node.SCALE_RANGES = (
        [96, 10000],
        [96, 10000],
        [64, 10000],
        [64, 10000],
        [64, 10000],
        [0, 10000],
        [0, 10000],
        [0, 256],
        [0, 256],
        [0, 192],
        [0, 192],
        [0, 96],
        [0, 10000],
    )
