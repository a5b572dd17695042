"""Train on synthetic shapes, evaluate, draw: a first look in a few minutes, on a CPU too."""

import argparse
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--config-file", default="quick/sparse_rcnn_shapes", help="YAML file or shipped name"
    )
    parser.add_argument("--images", type=int, default=8, help="pictures to draw (default: 8)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE overrides")


def run(args: argparse.Namespace) -> int:
    """Train and evaluate through the command line's own body, then draw."""
    from ..analysis.predictions import draw_predictions
    from ..config.load import load_cfg
    from ..engine.main import run as train
    from ..visualization import draw_curves

    cfg = load_cfg(args.config_file, args.opts)
    output = Path(cfg.OUTPUT_DIR)
    (output / "metrics.json").unlink(missing_ok=True)  # else the curves would show two runs
    status = train(["--config-file", args.config_file, *args.opts])
    if status:
        return status
    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    written = draw_predictions(cfg, output / "predictions", images=args.images)
    draw_curves(output / "metrics.json", output / "curves.png")
    for what, where in {
        "predictions": f"{output / 'predictions'} ({len(written)} pictures)",
        "curves": output / "curves.png",
        "metrics": output / "metrics.json",
        "log": output / "log.txt",
        "weights": output / "model_final.pth",
    }.items():
        print(f"{what:>12}: {where}")
    return 0
