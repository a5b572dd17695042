#!/usr/bin/env python
"""Convert CrowdHuman annotations to the COCO json of ``crowdhuman_train`` and ``crowdhuman_val``.

python tools/convert_crowdhuman.py annotation_train.odgt datasets/crowdhuman/CrowdHuman_train \
    datasets/crowdhuman/annotations/train.json
"""

import argparse
import sys
from pathlib import Path

import dsrcnn  # noqa: F401  (before detectron2)

# isort: split
from dsrcnn.data.datasets.crowdhuman import convert_crowdhuman
from dsrcnn.errors import DataError


def main() -> None:
    """Convert one file and print the number of images, persons and ignore regions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("odgt", type=Path, help="published annotations")
    parser.add_argument("images", type=Path, help="folder of the images")
    parser.add_argument("output", type=Path, help="json file to write")
    parser.add_argument(
        "--box", default="fbox", choices=["fbox", "vbox", "hbox"],
        help="full body, visible part, or head (default: fbox)",
    )  # fmt: skip
    args = parser.parse_args()
    try:
        counts = convert_crowdhuman(args.odgt, args.images, args.output, box=args.box)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(f"{args.output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
