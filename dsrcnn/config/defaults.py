"""Every key this package adds to Detectron2's config, with its default.

Keys of the official Sparse R-CNN keep their name, default and meaning, so that its YAML files load
unchanged; keys of Detectron2 are never redefined. ``docs/CONFIG.md`` is generated from the comments
in this file: a comment beside a key describes it, the comment above a node introduces the node.
"""

from detectron2.config import CfgNode


def add_dsrcnn_config(cfg: CfgNode) -> CfgNode:
    """Add the keys to `cfg`, in place, and return it.

    Args:
        cfg: usually ``detectron2.config.get_cfg()``.
    """
    _add_sparse_rcnn(cfg)
    _add_dla(cfg)
    _add_dpg(cfg)
    _add_nms(cfg)
    _add_sqr(cfg)
    _add_adamixer(cfg)
    _add_deformable_detr(cfg)
    _add_asag(cfg)
    _add_dynamic_rcnn(cfg)
    _add_backbones(cfg)
    _add_model_training(cfg)
    _add_custom_data(cfg)
    _add_augmentation(cfg)
    _add_solver(cfg)
    _add_evaluation(cfg)
    _add_log(cfg)
    return cfg


def _add_sparse_rcnn(cfg: CfgNode) -> None:
    # Sparse R-CNN (arXiv 2011.12450), and what all cascades share.
    node = cfg.MODEL.SparseRCNN = CfgNode()
    node.NUM_CLASSES = 80  # 0: taken from the classes of the first training set
    node.NUM_PROPOSALS = 300  # per image
    node.PROPOSALS = CfgNode()
    # Name in PROPOSALS_REGISTRY, such as DenseDistinct; "": the architecture's own, or
    # DynamicProposals with DPG.ENABLED
    node.PROPOSALS.NAME = ""
    node.PROPOSALS.BOXES = "image"  # initial boxes: image, center, grid or random
    node.NHEADS = 8  # heads of the self-attention among proposals
    node.DROPOUT = 0.0  # of attention, dynamic interaction and feed-forward network
    node.DIM_FEEDFORWARD = 2048  # inner width of the feed-forward network
    node.ACTIVATION = "relu"  # of the feed-forward network: relu or gelu
    node.HIDDEN_DIM = 256  # channels of proposal features; equals MODEL.FPN.OUT_CHANNELS
    node.NUM_CLS = 1  # layers of the classification tower
    node.NUM_REG = 3  # layers of the box tower
    node.NUM_HEADS = 6  # stages of the cascade
    node.SHARE_STAGES = False  # one stage for all, told apart by a learned embedding
    node.INFERENCE_STAGES = 0  # stages that inference runs, an early exit; 0: all
    node.NUM_DYNAMIC = 2  # dynamic convolutions; only 2 is defined
    node.DIM_DYNAMIC = 64  # channels between them
    # Divisors of predicted dx, dy, dw, dh, in stages of Sparse R-CNN; sizes stay clamped
    node.BOX_WEIGHTS = (2.0, 2.0, 1.0, 1.0)
    node.CLASS_WEIGHT = 2.0  # weight of the class loss and, without DLA, of the class cost
    node.GIOU_WEIGHT = 2.0  # likewise of the overlap
    node.L1_WEIGHT = 5.0  # likewise of the L1 distance
    node.OVERLAP = "giou"  # overlap in loss and matching cost: iou, giou, diou or ciou
    node.DEEP_SUPERVISION = True  # losses on every stage, not only on the last one
    node.NO_OBJECT_WEIGHT = 0.1  # weight of the background class without focal loss
    node.USE_FOCAL = True  # sigmoid focal loss; False: softmax with a background class
    node.ALPHA = 0.25  # focal balance
    node.GAMMA = 2.0  # focal exponent
    node.PRIOR_PROB = 0.01  # class score of an untrained model


def _add_dla(cfg: CfgNode) -> None:
    # Dynamic label assignment (Dynamic Sparse R-CNN, arXiv 2205.02101, section 3.1).
    node = cfg.MODEL.SparseRCNN.DLA = CfgNode()
    node.ENABLED = False  # use MATCHER; False: one proposal per ground truth, by Hungarian matching
    node.MATCHER = "OptimalTransportMatcher"  # name in MATCHER_REGISTRY, such as SimOTAMatcher
    node.CLASS_COST = 2.0  # weight of the class in the matching cost with DLA
    node.L1_COST = 5.0  # of the L1 distance
    node.GIOU_COST = 2.0  # of the overlap
    node.TOP_Q = 8  # dynamic units: the sum of this many largest IoUs of a ground truth
    node.STATIC_UNITS = 0  # above 0: replaces the estimate; UNIT_STEP still applies
    node.UNIT_STEP = 0.5  # units-increasing strategy: units subtracted for each stage that follows
    node.MAX_POSITIVE_FRACTION = 0.8  # largest positive fraction, unless there are more objects
    node.EPSILON = 0.1  # entropic regularization, in units of the cost
    node.ITERATIONS = 50  # Sinkhorn iterations
    node.NORMALIZER = "positives"  # divisor of the losses: positives, or gt (ground truths)


def _add_dpg(cfg: CfgNode) -> None:
    # Dynamic proposal generation (Dynamic Sparse R-CNN, arXiv 2205.02101, section 3.2).
    node = cfg.MODEL.SparseRCNN.DPG = CfgNode()
    node.ENABLED = False  # False: the same learned proposals for all images
    node.NUM_EXPERTS = 4  # sets of proposals to mix
    node.STAIRCASE = True  # False: resize every level separately, the paper's ablation
    node.NORM = "BN"  # norm of the staircase: BN, SyncBN, FrozenBN, GN or none
    node.RESIZE = 30  # side of the map the linear layers see
    node.HIDDEN = 1500  # width between the two linear layers
    node.TAU_START = 1.0  # softmax temperature at the start
    node.TAU_END = 1.0  # temperature after annealing and in evaluation
    node.TAU_ITERS = None  # iterations of linear annealing; None: 10 / 36 of SOLVER.MAX_ITER
    node.BOX_JITTER = 0.2  # relative noise on the initial boxes of the experts
    node.TILING_NOISE = 0.0  # noise on the features of the experts when a static model is loaded


def _add_nms(cfg: CfgNode) -> None:
    # Class-wise NMS at inference.
    node = cfg.MODEL.SparseRCNN.NMS = CfgNode()
    node.ENABLED = None  # None: on where duplicates are learned: one to many, early recollection
    node.THRESHOLD = 0.7  # IoU above which the lower score is removed


def _add_sqr(cfg: CfgNode) -> None:
    # Selective query recollection (arXiv 2212.07593), in training only.
    node = cfg.MODEL.SparseRCNN.SQR = CfgNode()
    node.ENABLED = False  # later stages also refine the outputs of earlier stages
    node.MODE = "selective"  # outputs of the last two stages; dense: initial and all earlier ones
    node.START = 1  # number of plain stages at the start, 1 to NUM_HEADS; for MODE selective
    node.ACTIVATION_CHECKPOINT = False  # recompute activations of recollecting stages
    node.CHUNK = 0  # groups a stage refines at once; 0: all


def _add_adamixer(cfg: CfgNode) -> None:
    # The decoder of AdaMixer (arXiv 2203.16507); all else is MODEL.SparseRCNN.
    node = cfg.MODEL.AdaMixer = CfgNode()
    node.IN_POINTS = 32  # sampling points per proposal and group
    node.OUT_POINTS = 128  # points per group after mixing


def _add_deformable_detr(cfg: CfgNode) -> None:
    # Deformable DETR (arXiv 2010.04159); all else is MODEL.SparseRCNN.
    node = cfg.MODEL.DeformableDETR = CfgNode()
    node.ENCODER_LAYERS = 6  # layers of the encoder; NUM_HEADS are those of the decoder
    node.BOX_REFINEMENT = True  # stages refine boxes; False: all start from the same points


def _add_asag(cfg: CfgNode) -> None:
    # ASAG (arXiv 2308.09242); layers, classes and loss weights are those of MODEL.SparseRCNN.
    node = cfg.MODEL.ASAG = CfgNode()
    node.DECODER = "AdaMixer"  # decoder layer: AdaMixer (ASAG-A) or SparseRCNN (ASAG-S)
    node.NUM_DECODERS = 4  # parallel decoders, all of them trained; 1: less time and memory
    # Index of the decoder for inference, -1: the last; NUM_DECODERS 1: in files with several
    node.USED_HEAD = -1
    node.GUIDED_PART = 1 / 12  # fraction of the training with patches around ground truths

    # The anchor generator.
    node.ANCHORS = anchors = CfgNode()
    anchors.FIXED = 50  # anchors per patch of P6 and P5
    anchors.PROBED = 20  # anchors per patch of P4 and P3
    anchors.HIDDEN = 1000  # width of the predictors
    anchors.LOW = 0.1  # anchors with a location score between LOW and HIGH are probed further
    anchors.HIGH = 0.7  # upper end of that range
    anchors.MAX_PATCHES = 0  # probed patches per image and level; 0: no limit
    anchors.INFERENCE_LEVEL = "P3P6"  # levels in use, in training too: P3P6, P4P6 or P5P6
    anchors.OUTPUT = 0.1  # least location score of an output anchor
    anchors.MIN = 5  # least number of anchors of an image
    anchors.MAX = 200  # largest number of anchors of an image

    # Denoising queries, in training only (ASAG-A-dn).
    node.DN = CfgNode()
    node.DN.ENABLED = False  # add noised ground-truth boxes to reconstruct
    node.DN.NUM = 200  # per image


def _add_dynamic_rcnn(cfg: CfgNode) -> None:
    # Dynamic R-CNN (arXiv 2004.06002), for MODEL.ROI_HEADS.NAME DynamicROIHeads; official names.
    node = cfg.MODEL.DYNAMIC_RCNN = CfgNode()
    node.IOU_ENABLED = True  # dynamic foreground threshold; False: ROI_HEADS.IOU_THRESHOLDS
    node.BETA_ENABLED = True  # dynamic box loss; False: ROI_BOX_HEAD.SMOOTH_L1_BETA
    node.KI = 75  # rank of the proposal whose IoU is the statistic, per image
    node.KE = 10  # rank of the regression error in a batch, for each of its images
    node.ITERATION_COUNT = 100  # iterations between updates
    node.WARMUP_IOU = 0.4  # initial and smallest threshold
    node.WARMUP_BETA = 1.0  # initial and largest transition point
    node.MAX_IOU = 1.0  # largest threshold; lower it for crowds of KI objects and more
    node.COUNT_GT = True  # count ground truths among the proposals


def _add_backbones(cfg: CfgNode) -> None:
    # For MODEL.BACKBONE.NAME build_timm_fpn_backbone, build_timm_backbone and
    # build_timm_vit_fpn_backbone (vit_*_patch16_*).
    node = cfg.MODEL.TIMM = CfgNode()
    node.NAME = "resnet50"  # a timm network with strides 4, 8, 16 and 32
    node.PRETRAINED = False  # start from timm's weights if MODEL.WEIGHTS is empty
    node.WEIGHTS = ""  # local file with such weights, or package:efficientnet-lite0 (lite1, lite2)
    node.NORM = ""  # replace batch norms: FrozenBN, SyncBN or GN
    node.DROP_PATH = 0.0  # rate of stochastic depth
    node.WINDOW = 0  # build_timm_vit_fpn_backbone: side of windows in 16 pixels; 0: none
    # For build_timm_fpn_backbone and build_resnet_neck_backbone; MODEL.FPN has channels and norm.
    node = cfg.MODEL.NECK = CfgNode()
    node.NAME = "FPN"  # FPN, PAFPN, BiFPN, ChannelMapper or InputProjection
    node.SHARED_NORM = False  # ChannelMapper: one norm for all levels


def _add_model_training(cfg: CfgNode) -> None:
    # Exponential moving average of the weights.
    node = cfg.MODEL.EMA = CfgNode()
    node.ENABLED = False  # evaluate the average, and store it beside the weights
    node.DECAY = 0.9998  # per iteration
    # Recompute activations in the backward pass: any of "backbone" and "stages"
    cfg.MODEL.ACTIVATION_CHECKPOINT = ()
    cfg.MODEL.COMPILE = False  # torch.compile: stages, pooling, costs, losses; needs a C++ compiler
    cfg.MODEL.COMPILE_MODE = "default"  # or max-autotune-no-cudagraphs
    cfg.MODEL.BACKBONE.NORM_EVAL = False  # its batch norms, not the neck's, use stored statistics
    cfg.MODEL.FREEZE = ()  # modules that stay as loaded, such as ("backbone",)
    cfg.MODEL.TRUST_WEIGHTS = False  # run code that a pickled weight file may contain


def _add_custom_data(cfg: CfgNode) -> None:
    # Your data without Python; see datasets/README.md.
    node = cfg.DATASETS.CUSTOM = CfgNode()
    node.NAME = ""  # registers NAME_train and NAME_test
    node.FOLDER = ""  # a folder in COCO, Pascal VOC or YOLO layout; or the files below
    node.TRAIN_SPLIT = "train"  # split of the folder; "": none
    node.TEST_SPLIT = "val"  # split of the folder; "": none
    node.TRAIN_JSON = ""  # COCO json
    node.TRAIN_IMAGES = ""  # folder its file names are relative to
    node.TEST_JSON = ""  # COCO json
    node.TEST_IMAGES = ""  # folder its file names are relative to
    node.CLASSES = ()  # class names; read from the data and saved with the config


def _add_augmentation(cfg: CfgNode) -> None:
    cfg.INPUT.PAD_TO = 0  # least side of padded batches; MAX_SIZE_TRAIN gives squares
    # Padded sizes of batches; GPUs are faster with few.
    cfg.INPUT.NUM_BUCKETS = 0  # sizes that a run chooses from its training images; 0: any size
    cfg.INPUT.BUCKETS = ()  # the sizes ((height, width), ...), chosen or written
    cfg.INPUT.OPENCV = False  # decode and resize training images with OpenCV, faster than Pillow
    # Augmentation of training images; PROB 0 is off.
    node = cfg.INPUT.AUG = CfgNode()
    node.ALBUMENTATIONS = ()  # applied first: [{name: CLAHE, p: 0.3}, ...]
    node.VERTICAL_FLIP = 0.0  # probability, beside INPUT.RANDOM_FLIP
    node.MIN_VISIBLE = 0.0  # drop objects of which less remains visible; 0.2 in mosaics
    for name in ("HSV", "BLUR", "NOISE"):
        node[name] = CfgNode({"PROB": 0.0})  # probability
    node.WARP = CfgNode()
    node.WARP.PROB = 0.0  # probability of an affine or perspective warp
    node.WARP.DEGREES = 10.0  # largest rotation
    node.WARP.SCALE = (0.8, 1.2)  # smallest and largest factor
    node.WARP.TRANSLATE = 0.0  # fraction of the sides
    node.WARP.SHEAR = 0.0  # degrees
    node.WARP.PERSPECTIVE = 0.0  # fraction of the distance, below 0.5
    node.MOSAIC = CfgNode()
    node.MOSAIC.PROB = 0.0  # probability
    node.MOSAIC.SIZE = 640  # side in pixels
    for name in ("MIXUP", "COPY_PASTE"):
        node[name] = CfgNode({"PROB": 0.0})  # probability
    node.PLAIN_END = 0.1  # last fraction of the training without mosaic, mixup and copy-paste
    node.SCALE_JITTER = CfgNode()
    node.SCALE_JITTER.SIZE = 0  # large-scale jitter (arXiv 2012.07177) to this size; 0: off


def _add_solver(cfg: CfgNode) -> None:
    node = cfg.SOLVER
    node.OPTIMIZER = "ADAMW"  # ADAMW or SGD
    node.BACKBONE_MULTIPLIER = 1.0  # learning rate factor of the backbone
    node.NECK_MULTIPLIER = None  # factor of its neck (FPN); None: that of the backbone
    node.LAYER_DECAY = 1.0  # factor per part of the backbone (stem, res2, ...) before the last
    node.NO_DECAY = ()  # no weight decay for: norm, bias, embedding, position
    node.REFERENCE_BATCH = 0  # scale BASE_LR linearly from this batch size; 0: no scaling
    node.ACCUMULATE = 1  # parts a batch is processed in, to save memory
    node.AMP.PRECISION = "bf16"  # with AMP.ENABLED: bf16, or fp16 with a gradient scaler
    # A schedule in epochs: MAX replaces SOLVER.MAX_ITER, the others their counterparts if set.
    node = cfg.SOLVER.EPOCHS = CfgNode()
    node.MAX = 0.0  # SOLVER.MAX_ITER; 0: the schedule is in iterations
    node.STEPS = ()  # SOLVER.STEPS
    node.WARMUP = 0.0  # SOLVER.WARMUP_ITERS
    node.CHECKPOINT = 0.0  # SOLVER.CHECKPOINT_PERIOD
    node.EVAL = 0.0  # TEST.EVAL_PERIOD
    cfg.SOLVER.CHECKPOINTS_KEPT = 3  # newest model_<iteration>.pth that stay; 0: all
    cfg.DETERMINISTIC = False  # deterministic algorithms on GPUs too
    cfg.FLOAT32_PRECISION = ""  # of products on GPUs: highest, high (TF32) or medium; "": torch's
    cfg.DISTRIBUTED_TIMEOUT = 1800.0  # seconds that processes wait for one that hangs


def _add_evaluation(cfg: CfgNode) -> None:
    cfg.TEST.MAX_DETECTIONS = 100  # of an image, that COCO metrics count; more for crowds
    cfg.TEST.CUDA_GRAPH = False  # on GPUs: a graph for every padded size
    cfg.TEST.LOSS = False  # log the losses on DATASETS.TEST as validation/*
    # The best model of a training run.
    node = cfg.TEST.BEST = CfgNode()
    node.METRIC = "bbox/AP"  # the best model by it is kept as model_best.pth; "": none
    node.PATIENCE = 0  # stop after this many evaluations without improvement; 0: never
    # Test-time augmentation; official keys.
    node = cfg.TEST.AUG
    # Short sides of the images to detect on; the plain scale, 800, is last, as officially.
    node.MIN_SIZES = (400, 500, 600, 640, 700, 900, 1000, 1100, 1200, 1300, 1400, 1800, 800)
    node.CVPODS_TTA = True  # merge by soft box voting; False: by NMS
    node.SCALE_FILTER = True  # keep a detection only if its size fits the scale
    # Smallest and largest square root of the area to keep, one pair for every entry of MIN_SIZES
    node.SCALE_RANGES = (
        *([96, 10000], [96, 10000], [64, 10000], [64, 10000], [64, 10000], [0, 10000], [0, 10000]),
        *([0, 256], [0, 256], [0, 192], [0, 192], [0, 96], [0, 10000]),
    )


def _add_log(cfg: CfgNode) -> None:
    # Logging.
    node = cfg.LOG = CfgNode()
    node.LEVEL = "normal"  # console output: normal, or verbose for all of Detectron2's messages
    node.PERIOD = 20  # iterations between entries of metrics.json; 0: 20, without dla/*, dpg/*, ...
    node.IMAGES = 4  # images of the first test set drawn for TensorBoard at each evaluation
    node.WANDB_PROJECT = ""  # Weights & Biases project, if wandb is installed
    node.MLFLOW_EXPERIMENT = ""  # MLflow experiment, if mlflow is installed
    # Programs of yours. A config inside a weight file never runs any.
    node = cfg.HOOKS = CfgNode()
    node.AFTER_EVAL = ()  # command after each evaluation: words, with {iteration} and {output}
