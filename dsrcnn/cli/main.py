"""``dsrcnn <command>``; its table of commands is in ``dsrcnn_command.py``."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dsrcnn_command import COMMANDS, DRAWINGS, answer

from ..config import load_cfg
from ..engine.checkpoint_series import find_checkpoints
from ..engine.console import results_table
from ..engine.main import (
    CommandParser,
    add_process_arguments,
    add_train_arguments,
    exit_status,
    launch,
)
from ..engine.weight_io import export_weights
from ..errors import ConfigError
from ..utils.files import prepare_file
from . import analyze, app, check_data, doctor, export, predict
from .options import add_model_arguments, find_model, output_path, positive_int


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; see `dsrcnn_command.main`."""
    words = sys.argv[1:] if argv is None else argv
    status = answer(words)
    if status is not None:
        return status
    return exit_status(lambda: _run(words))


def _run(words: Sequence[str]) -> int:
    command, *rest = words
    if command == "draw":
        from . import draw  # takes Matplotlib along

        drawing, *rest = rest
        parser = CommandParser(prog=f"dsrcnn draw {drawing}", description=DRAWINGS[drawing])
        draw.add_arguments(parser, drawing)
        args = parser.parse_args(rest) if drawing == "curves" else parser.parse_overrides(rest)
        return draw.run(args, drawing)
    declare, run = _COMMANDS[command]
    parser = CommandParser(prog=f"dsrcnn {command}", description=COMMANDS[command])
    declare(parser)
    takes_pairs = command not in ("weights", "doctor")
    return run(parser.parse_overrides(rest) if takes_pairs else parser.parse_args(rest))


def _declare_train(parser: argparse.ArgumentParser) -> None:
    add_train_arguments(parser)
    parser.set_defaults(eval_only=False)


def _declare_eval(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_process_arguments(parser)
    text = "also write a page with plots, errors, stages and the worst images (RUN/report.html)"
    parser.add_argument("--report", action="store_true", help=text)
    text = "all, or iterations N,M: a table and a plot of AP over iterations (RUN/checkpoints.png)"
    parser.add_argument("--checkpoints", type=_iterations, metavar="all|N,M", help=text)
    text = "where to write the report instead"
    parser.add_argument("--output", type=Path, metavar="FILE.html", help=text)
    parser.set_defaults(eval_only=True, resume=False, overwrite=False)


def _eval(args: argparse.Namespace) -> int:
    args.config_file, args.opts = find_model(args)
    if args.output and not args.report:
        raise ConfigError("--output is where the report goes; write --report, too.")
    if args.checkpoints is not None:
        return _eval_checkpoints(args)
    if not args.report:
        return launch(args)
    if args.num_gpus * args.num_machines > 1:
        raise ConfigError("--report evaluates in one process; leave out --num-gpus.")
    from ..analysis.report import evaluate_in_detail, write_page  # takes Matplotlib along

    output = prepare_file(output_path(args, "report.html"), "--output", (".html",))
    cfg = load_cfg(args.config_file, args.opts)
    if len(cfg.DATASETS.TEST) > 1:
        print(f"The report is about {cfg.DATASETS.TEST[0]}, the first of the test sets.")
    if cfg.TEST.AUG.ENABLED:
        print("The report is without test-time augmentation.")
    evaluation = evaluate_in_detail(cfg)
    print(results_table({"bbox": evaluation.metrics}), end="\n\n", flush=True)
    write_page(cfg, evaluation, output)
    print(output)
    return 0


def _iterations(text: str) -> list[int]:
    """Parse numbers with commas between; ``all`` is the empty list."""
    words = [] if text == "all" else text.split(",")
    if not all(word.isascii() and word.isdigit() and len(word) < 12 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor numbers such as 999,1999")
    return [int(word) for word in words]


def _eval_checkpoints(args: argparse.Namespace) -> int:
    from ..visualization.curves import draw_checkpoints  # takes Matplotlib along

    if args.report or not args.run:
        problem = "and --report exclude each other" if args.report else "needs RUN"
        raise ConfigError(f"--checkpoints {problem}; write dsrcnn eval RUN --checkpoints all.")
    folder = Path(load_cfg(args.config_file, args.opts).OUTPUT_DIR)
    args.checkpoints = find_checkpoints(args.run, args.checkpoints or None)
    if status := launch(args):
        return status
    # Torchrun starts this in every process; the first one has written the table.
    if int(os.environ.get("RANK", args.machine_rank)) == 0:
        draw_checkpoints(folder / "checkpoints.csv", folder / "checkpoints.png")
        print(folder / "checkpoints.png")
    return 0


def _declare_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", help="checkpoint: .pth, .pkl or .safetensors")
    parser.add_argument("output", help="file to write: .safetensors or .pth")
    parser.add_argument("--average", action="store_true", help="the averaged weights (MODEL.EMA)")
    parser.add_argument("--trust", action="store_true", help="run code that the input may contain")


def _weights(args: argparse.Namespace) -> int:
    count = export_weights(args.input, args.output, average=args.average, trust=args.trust)
    print(f"{args.output}: {count} tensors")
    return 0


_DEMO, _DEMO_FOLDER = "quick/sparse_rcnn_shapes", "output/demo"


def _declare_demo(parser: argparse.ArgumentParser) -> None:
    add_train_arguments(parser)
    parser.add_argument("--images", type=positive_int, default=8, metavar="N", help="to draw (8)")
    parser.set_defaults(eval_only=False, config_file=_DEMO)


def _demo(args: argparse.Namespace) -> int:
    from ..analysis.predictions import draw_predictions
    from ..visualization.curves import draw_curves
    from .draw import describe_predictions

    if args.config_file == _DEMO and "OUTPUT_DIR" not in args.opts:
        # Not the config's own, where a training may be.
        args.opts = [*args.opts, "OUTPUT_DIR", _DEMO_FOLDER]
        args.overwrite = args.overwrite or not args.resume
    folder = Path(load_cfg(args.config_file, args.opts).OUTPUT_DIR)
    if status := launch(args):
        return status
    args.run, args.config_file, args.opts = str(folder), None, []
    cfg = load_cfg(*find_model(args))
    report = draw_predictions(cfg, folder / "predictions", images=args.images)
    draw_curves(folder / "metrics.json", folder / "curves.png")
    print(f"predictions: {describe_predictions(report, folder / 'predictions', 0.3)}")
    names = {"curves": "curves.png", "metrics": "metrics.json", "log": "log.txt"}
    for kind, name in {**names, "weights": "model_final.pth"}.items():
        print(f"{kind}: {folder / name}")
    return 0


_COMMANDS = {
    "train": (_declare_train, launch),
    "eval": (_declare_eval, _eval),
    "predict": (predict.add_arguments, predict.run),
    "export": (export.add_arguments, export.run),
    "app": (app.add_arguments, app.run),
    "check-data": (check_data.add_arguments, check_data.run),
    "analyze": (analyze.add_arguments, analyze.run),
    "doctor": (doctor.add_arguments, doctor.run),
    "weights": (_declare_weights, _weights),
    "demo": (_declare_demo, _demo),
}

if __name__ == "__main__":
    sys.exit(main())
