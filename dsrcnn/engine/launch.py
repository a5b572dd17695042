"""The body of ``train_net.py``: arguments, set-up, training or evaluation, processes."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

from ..config.read import find_config
from ..errors import ConfigError, DsrcnnError, message_from_traceback
from .checkpoint import ReportingCheckpointer
from .config import load_cfg
from .trainer import Trainer

__all__ = ["evaluate", "main", "run", "setup"]


def setup(args: argparse.Namespace) -> CfgNode:
    """Config, output folder, loggers and seed of a run."""
    cfg = load_cfg(args.config_file, args.opts)
    cfg.freeze()
    args.config_file = str(find_config(args.config_file))
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="dsrcnn")
    # Detectron2 logs a traceback for every exception; for bad input the message says it all.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_own_error)
    return cfg


def _is_no_own_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], DsrcnnError))


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Train, or with ``--eval-only`` evaluate; runs in every process."""
    cfg = setup(args)
    if args.eval_only:
        return evaluate(cfg, resume=args.resume)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS`` on ``DATASETS.TEST``, with ``TEST.AUG.ENABLED`` once more with it.

    Args:
        cfg: from `load_cfg`.
        resume: take the last checkpoint of ``OUTPUT_DIR`` instead, if there is one.

    Returns:
        The metrics by task, as Detectron2's ``DefaultTrainer.test``.

    Raises:
        WeightsError: if the weights are missing or do not fill the whole model.
    """
    model = Trainer.build_model(cfg)
    checkpointer = ReportingCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.strict = True
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _check_machine(args: argparse.Namespace) -> None:
    """One process per GPU is asked for by ``--num-gpus``; 0 or 1 also run without one."""
    found = torch.cuda.device_count()
    if args.num_machines > 1 and found == 0:
        raise ConfigError(
            f"--num-machines is {args.num_machines}, but torch finds no CUDA device on this "
            "machine; several machines train on GPUs only. Write --num-machines 1."
        )
    if args.num_gpus > max(found, 1):
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but torch finds {found} CUDA devices on this machine. "
            f"Write --num-gpus {found}."
        )


def run(argv: Sequence[str] | None = None) -> int:
    """Command line of ``train_net.py``.

    Returns:
        Exit status: 0, or 2 after bad input, which is explained on stderr.
    """
    parser = default_argument_parser()
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("write --config-file, for example --config-file quick/sparse_rcnn_shapes")
    try:
        _check_machine(args)
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except DsrcnnError as error:
        return _fail(str(error))
    except ProcessRaisedException as error:
        message = message_from_traceback(str(error))
        if message is None:
            raise
        return _fail(message)
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
