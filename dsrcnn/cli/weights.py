"""Take the weights out of a checkpoint, as .safetensors or as a small .pth."""

import argparse

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("input", help="checkpoint: .pth, .pkl or .safetensors")
    parser.add_argument("output", help="file to write: .safetensors or .pth")
    parser.add_argument("--average", action="store_true", help="the averaged weights (MODEL.EMA)")
    parser.add_argument("--trust", action="store_true", help="run code that the input may hold")


def run(args: argparse.Namespace) -> int:
    """Write the file."""
    from ..engine.weight_io import export_weights

    count = export_weights(args.input, args.output, average=args.average, trust=args.trust)
    print(f"{args.output}: {count} tensors")
    return 0
