"""Keys of training and evaluation, with their defaults."""

from detectron2.config import CfgNode

__all__ = ["add_training_keys"]


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
