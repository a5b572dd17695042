"""Shared entry of ``train_net.py`` and ``dsrcnn train | eval | demo``.

`run` or a command parses arguments, `launch` starts the processes, and `_main` runs in each of
them: `setup_run`, then `Trainer` or `evaluate`.
"""

import argparse
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from dsrcnn_command import drop_output, end_output, escape_unprintable

from ..config import add_dsrcnn_config, read_cfg
from ..config.load import config_keys
from ..errors import (
    ConfigError,
    DsrcnnError,
    TrainingInterrupted,
    message_from_traceback,
    plain_system_errors,
    system_message,
)
from .checkpoint import Checkpointer
from .checkpoint_series import evaluate_checkpoints
from .memory import explain_memory, is_out_of_memory, memory_message
from .processes import Processes, run_processes, started_by_torchrun
from .resume import clear_folder
from .setup import set_numerics, setup_run, write_config
from .trainer import Trainer

_ADDRESS = re.compile(r"tcp://(?:[^\s/:]+|\[[^\s/]+\]):(\d{1,5})")


class CommandParser(argparse.ArgumentParser):
    """Parser for command lines with config overrides, and with errors of this package."""

    def error(self, message: str) -> NoReturn:
        """Raise a `ConfigError`, which the command line prints as one line."""
        raise ConfigError(f"{message}. See {self.prog} --help.")

    def parse_overrides(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse options and ``KEY VALUE`` pairs, which may come in any order.

        A word is a key if a config has it, or if it begins with a section and is no file
        (``MODEL.DEVISE``); but never right after an option that takes a value, or without a value
        of its own.

        Returns:
            The options, and the pairs as a flat list in ``opts``.

        Raises:
            ConfigError: for an unknown option.
        """
        cfg = add_dsrcnn_config(get_cfg())
        words, opts, rest = deque(argv), [], []
        while words:
            word = words.popleft()
            if words and _is_key(cfg, word) and not words[0].startswith("--"):
                opts += [word, words.popleft()]
                continue
            rest.append(word)
            if words and self._takes_value(word) and not words[0].startswith("--"):
                rest.append(words.popleft())
        args, unknown = self.parse_known_args(rest)
        for word in unknown:
            if word.startswith("-") and not word.lstrip("-").replace(".", "", 1).isdigit():
                self.error(f"unknown option {word}")
        args.unknown = unknown
        args.opts = opts + unknown  # `read_cfg` reports unknown keys
        return args

    def _takes_value(self, word: str) -> bool:
        """Whether `word` is an option, or the beginning of one, with the value as the next word."""
        return word.startswith("--") and any(
            option.startswith(word) and action.nargs != 0
            for option, action in self._option_string_actions.items()
        )


def _is_key(cfg: CfgNode, word: str) -> bool:
    section, dot, _ = word.partition(".")
    if section not in cfg or bool(dot) != isinstance(cfg[section], CfgNode):
        return False
    return word in config_keys(cfg) or not os.path.lexists(word)


def whole_number(least: int) -> Callable[[str], int]:
    """Return an argument type: numbers from `least` on."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least {least}")
        return int(text)

    return parse


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a training run."""
    text = "YAML file or shipped name, such as quick/sparse_rcnn_shapes"
    parser.add_argument("--config-file", metavar="FILE", help=text)
    text = "continue from the last checkpoint in OUTPUT_DIR, if there is one"
    parser.add_argument("--resume", action="store_true", help=text)
    text = "delete the weights and metrics of another run in OUTPUT_DIR"
    parser.add_argument("--overwrite", action="store_true", help=text)
    add_process_arguments(parser)
    parser.usage = f"{parser.prog} --config-file FILE [options] [KEY VALUE ...]"


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare Detectron2's options about processes."""
    text = "processes on this machine, one per GPU"
    kinds: dict[str, Any] = {"type": whole_number(0), "default": 1, "metavar": "N"}
    parser.add_argument("--num-gpus", **kinds, help=text)
    kinds["type"] = whole_number(1)
    parser.add_argument("--num-machines", **kinds, help="machines")
    text = "number of this machine, from 0"
    kinds = {"type": whole_number(0), "default": 0, "metavar": "I"}
    parser.add_argument("--machine-rank", **kinds, help=text)
    text = "address of the first machine, tcp://HOST:PORT"
    parser.add_argument("--dist-url", default="", metavar="URL", help=text)
    parser.set_defaults(checkpoints=None)


def run(argv: Sequence[str] | None = None) -> int:
    """Run ``train_net.py``.

    Returns:
        Exit status: 0, 2 after invalid input, 1 if a process died, or that of `exit_status`;
        explained on stderr.
    """
    parser = CommandParser(prog="train_net.py", description="Train or evaluate a detector.")
    add_train_arguments(parser)
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    words = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: launch(parser.parse_overrides(words)))


def exit_status(work: Callable[[], int]) -> int:
    """Return the exit status of `work`, and print errors of this package without a traceback.

    It is 2 after invalid input, and 128 plus the signal's number if one ended `work`, as in shells;
    see also `end_output`.
    """
    escape_unprintable()
    return end_output(_status(work))


def _status(work: Callable[[], int]) -> int:
    try:
        return work()
    except TrainingInterrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal
    except DsrcnnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError as error:
        return drop_output(error)
    except OSError as error:
        if status := end_output(0):  # it is stdout that failed
            return status
        message = system_message(error, "A file cannot be read or written")
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {memory_message(error)}. Use fewer or smaller images.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT


def launch(args: argparse.Namespace) -> int:
    """Train or evaluate in the processes that the options of ``train_net.py`` and ``opts`` ask for.

    Returns:
        Exit status: 0, or 1 if a process died, which is explained on stderr.

    Raises:
        DsrcnnError: if a process raises it.
    """
    if not args.config_file:
        raise ConfigError(
            "write --config-file, for example --config-file quick/sparse_rcnn_shapes."
        )
    cfg = read_cfg(args.config_file, args.opts)
    try:
        run_processes(_processes(args, cfg), _main, args)
    except ProcessRaisedException as error:
        message = message_from_traceback(str(error))
        if message is None:
            raise
        raise DsrcnnError(message) from None
    except ProcessExitedException as error:
        reason = f"was killed by {error.signal_name}" if error.signal_name else "has died"
        print(
            f"error: Process {error.error_index} {reason} (exit code {error.exit_code}); the rest "
            "were stopped. SIGKILL often means that main memory ran out: lower "
            "SOLVER.IMS_PER_BATCH or DATALOADER.NUM_WORKERS. --resume continues from the last "
            "checkpoint.",
            file=sys.stderr,
        )
        return 1
    return 0


def _main(args: argparse.Namespace) -> None:
    """Train or evaluate; runs in every process."""
    advice = "outside of training and evaluation. Use another MODEL.DEVICE or a smaller model."
    with plain_system_errors("A file cannot be read or written"), explain_memory(lambda: advice):
        if args.eval_only:
            cfg = setup_run(args.config_file, args.opts, resume=args.resume, eval_only=True)
            if args.checkpoints:
                table = Path(cfg.OUTPUT_DIR) / "checkpoints.csv"
                evaluate_checkpoints(cfg, args.checkpoints, table)
            else:
                evaluate(cfg, resume=args.resume)
        else:
            train(args.config_file, args.opts, resume=args.resume, overwrite=args.overwrite)


def train(
    config_file: str, opts: list[str], *, resume: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Train in this process; see `setup_run` for the arguments.

    Returns:
        The metrics of the last evaluation.
    """
    cfg = setup_run(config_file, opts, resume=resume, overwrite=overwrite)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    if comm.is_main_process():
        if trainer.start_iter == 0:
            clear_folder(cfg.OUTPUT_DIR)
        write_config(cfg)
    return trainer.train()


def evaluate(cfg: CfgNode, *, resume: bool = False) -> dict[str, Any]:
    """Evaluate ``MODEL.WEIGHTS`` on ``DATASETS.TEST``; with ``TEST.AUG.ENABLED`` in both ways.

    With `resume`, the last checkpoint of ``OUTPUT_DIR`` is evaluated instead, if there is one.

    Returns:
        The metrics by task; see `Trainer.test`.

    Raises:
        WeightsError: if the weights are missing or do not fill the whole model.
    """
    set_numerics(cfg)
    model, node = Trainer.build_model(cfg), cfg.MODEL
    options = {"prefer_average": node.EMA.ENABLED, "trust": node.TRUST_WEIGHTS}
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, strict=True, **options)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    results = Trainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        results.update(Trainer.test_with_TTA(cfg, model))
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _check_machines(args: argparse.Namespace) -> None:
    if args.machine_rank >= args.num_machines:
        raise ConfigError(
            f"--machine-rank is {args.machine_rank}, but --num-machines is {args.num_machines}; "
            f"write a number from 0 to {args.num_machines - 1}."
        )
    port = _ADDRESS.fullmatch(args.dist_url)
    if args.dist_url not in ("", "auto") and not (port and 0 < int(port[1]) < 2**16):
        raise ConfigError(
            f"--dist-url is {args.dist_url!r}; write tcp://HOST:PORT with a port up to 65535."
        )
    if args.num_machines > 1 and (
        not args.dist_url or args.dist_url == "auto" or "127.0.0.1" in args.dist_url
    ):
        raise ConfigError(
            f"--num-machines is {args.num_machines}, but --dist-url is {args.dist_url!r}, which "
            "other machines cannot reach. Write --dist-url tcp://<first machine>:<port>."
        )


def _processes(args: argparse.Namespace, cfg: CfgNode) -> Processes:
    """Return the processes to start; ``--num-gpus`` counts CPU processes as well."""
    _check_machines(args)
    gpus = torch.cuda.device_count()
    uses_cuda = cfg.MODEL.DEVICE.startswith("cuda")
    starts_several = args.num_gpus * args.num_machines > 1
    if started_by_torchrun() and starts_several:
        raise ConfigError(
            f"--num-gpus is {args.num_gpus} and --num-machines {args.num_machines}, but torchrun "
            "has started the processes already. Leave both out."
        )
    if uses_cuda and (args.num_gpus > max(gpus, 1) or (starts_several and not gpus)):
        raise ConfigError(
            f"--num-gpus is {args.num_gpus}, but torch finds {gpus} CUDA devices on this machine. "
            f"Write --num-gpus {gpus}, or MODEL.DEVICE cpu for as many processes on the CPU."
        )
    is_distributed = starts_several or (started_by_torchrun() and int(os.environ["WORLD_SIZE"]) > 1)
    if is_distributed and uses_cuda and ":" in cfg.MODEL.DEVICE:
        raise ConfigError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but every process needs its own GPU. Write "
            "MODEL.DEVICE cuda; CUDA_VISIBLE_DEVICES chooses among GPUs."
        )
    url = args.dist_url if args.num_machines > 1 else None
    device = "cuda" if uses_cuda and gpus else "cpu"
    machine = (max(args.num_gpus, 1), args.num_machines, args.machine_rank, url)
    return Processes(device, *machine, timeout=cfg.DISTRIBUTED_TIMEOUT)
