"""The body of ``train_net.py``: arguments, set-up, training or evaluation, processes."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from ..config import read_cfg
from ..config.load import find_config, load_cfg
from ..errors import ConfigError, DsrcnnError, message_from_traceback
from .checkpoint import ReportingCheckpointer
from .launch import Processes, run_processes, started_by_torchrun
from .setup import final_recipe, keep_drawn_seed, make_deterministic, record_environment
from .trainer import Trainer

__all__ = ["evaluate", "main", "run", "setup"]


def setup(args: argparse.Namespace) -> CfgNode:
    """Config, output folder, loggers and seed of a run."""
    cfg = load_cfg(args.config_file, args.opts)
    # Before Detectron2 does it: what the recipe decides belongs into the log.
    for name in ({"name": "fvcore"}, {}, {"name": "dsrcnn"}):  # its arguments: it asks a cache
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), **name)
    if not args.eval_only:
        if args.resume:
            keep_drawn_seed(cfg)
        cfg = final_recipe(cfg)
    cfg.freeze()
    args.config_file = str(find_config(args.config_file))
    default_setup(cfg, args)
    if cfg.DETERMINISTIC:
        make_deterministic()
    if comm.is_main_process():
        record_environment(cfg)
    return cfg


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
    checkpointer = ReportingCheckpointer(
        model,
        save_dir=cfg.OUTPUT_DIR,
        strict=True,
        prefer_average=cfg.MODEL.EMA.ENABLED,
        trust=cfg.MODEL.TRUST_WEIGHTS,
    )
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _processes(args: argparse.Namespace, cfg: CfgNode) -> Processes:
    """Which processes the command line asks for; ``--num-gpus`` counts CPU processes as well."""
    found = torch.cuda.device_count()
    wants_cuda = cfg.MODEL.DEVICE.startswith("cuda")
    several = args.num_gpus * args.num_machines > 1
    if started_by_torchrun() and several:
        raise ConfigError(
            f"--num-gpus is {args.num_gpus} and --num-machines {args.num_machines}, but torchrun "
            "has started the processes already. Leave both out."
        )
    if (wants_cuda and args.num_gpus > max(found, 1)) or (wants_cuda and several and not found):
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but torch finds {found} CUDA devices on this machine. "
            f"Write --num-gpus {found}, or MODEL.DEVICE cpu for as many processes on the CPU."
        )
    if several and wants_cuda and ":" in cfg.MODEL.DEVICE:
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but every process takes a GPU of its own. Write "
            "MODEL.DEVICE cuda; CUDA_VISIBLE_DEVICES chooses among GPUs."
        )
    if args.num_machines > 1 and "127.0.0.1" in args.dist_url:
        raise ConfigError(
            f"--num-machines is {args.num_machines}, but --dist-url is {args.dist_url}, where no "
            "other machine finds this one. Write --dist-url tcp://<first machine>:<port>."
        )
    # Detectron2's default for one machine is a fixed port, which two trainings would share.
    url = args.dist_url if args.num_machines > 1 else None
    device = "cuda" if wants_cuda and found else "cpu"
    return Processes(device, max(args.num_gpus, 1), args.num_machines, args.machine_rank, url)


def run(argv: Sequence[str] | None = None) -> int:
    """Command line of ``train_net.py``.

    Returns:
        Exit status: 0, 2 after bad input, 1 if a process died; explained on stderr.
    """
    parser = default_argument_parser()
    args = parser.parse_args(argv)
    if not args.config_file:
        parser.error("write --config-file, for example --config-file quick/sparse_rcnn_shapes")
    try:
        processes = _processes(args, read_cfg(args.config_file, args.opts))
        run_processes(processes, main, args)
    except DsrcnnError as error:
        return _fail(str(error))
    except ProcessRaisedException as error:
        message = message_from_traceback(str(error))
        if message is None:
            raise
        return _fail(message)
    except ProcessExitedException as error:
        what = f"was killed by {error.signal_name}" if error.signal_name else "has died"
        return _fail(
            f"Process {error.error_index} {what} (exit code {error.exit_code}); the others were "
            "stopped. SIGKILL often means that main memory ran out: lower SOLVER.IMS_PER_BATCH or "
            "DATALOADER.NUM_WORKERS. --resume goes on from the last checkpoint.",
            status=1,
        )
    return 0


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return status
