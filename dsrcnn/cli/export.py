"""``dsrcnn export``: a file that other programs run."""

import argparse
from pathlib import Path

from ..export.formats import FORMATS
from .options import add_detector_arguments, load_detector, positive_int

_USAGE = "%(prog)s --model MODEL [options] [KEY VALUE ...]"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.usage = _USAGE
    add_detector_arguments(parser)
    parser.add_argument("--format", choices=[*FORMATS], default="onnx", help="(default: onnx)")
    text = "where to write it (default: RUN/model.onnx and so on)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=text)
    text = "images are resized to fit inside (default: as in evaluation of the middle test image)"
    parser.add_argument("--size", type=positive_int, nargs=2, metavar=("H", "W"), help=text)
    text = "accept any number of images of one size"
    parser.add_argument("--dynamic-batch", action="store_true", help=text)
    text = "NMS inside or not (default: as in evaluation)"
    parser.add_argument("--nms", action=argparse.BooleanOptionalAction, default=None, help=text)
    text = "float16 for convolutions and linear layers, half the size"
    parser.add_argument("--half", action="store_true", help=text)
    text = "image, folder or pattern to compare the file and the model on (default: test set)"
    parser.add_argument("--images", metavar="SOURCE", help=text)
    text = "that the file is made for; ONNX files run on any (default: cpu)"
    parser.add_argument("--device", default="cpu", metavar="NAME", help=text)


def run(args: argparse.Namespace) -> int:
    """Export, compare and describe.

    Returns:
        0.
    """
    detector = load_detector(args, args.opts)
    folder = Path(args.model) if Path(args.model).is_dir() else Path()
    path = args.output or folder / f"model{FORMATS[args.format].suffix}"
    print(f"Exporting to {path}; this takes a minute.", flush=True)
    size = tuple(args.size) if args.size else None
    export = detector.export(
        path,
        args.format,
        size=size,
        dynamic_batch=args.dynamic_batch,
        nms=args.nms,
        half=args.half,
        images=args.images,
    )
    info, parity = export.info, export.parity
    nms = f"NMS {info.nms:g}" if info.nms is not None else "no NMS"
    batch = "any number of images" if info.dynamic_batch else "one image"
    print(
        f"{export.path}: {export.path.stat().st_size / 1e6:.1f} MB, {batch} of any size, resized "
        f"to fit {info.height} x {info.width} (height x width; change it with --size), "
        f"{len(info.classes)} classes, at most {info.detections} detections, {nms}"
    )
    missing = f"; {parity.missing} are missing or added" if parity.missing else ""
    print(
        f"Compared on {export.images}: {parity.detections} detections differ by at most "
        f"{parity.pixels:.2g} pixels of the network input and {parity.score:.2g} in "
        f"score{missing}."
    )
    ratio = export.model_seconds / export.seconds
    print(
        f"One image takes {1e3 * export.seconds:.0f} ms, the model in Python "
        f"{1e3 * export.model_seconds:.0f} ms ({ratio:.2f} times)."
    )
    return 0
