"""Operators that one image dispatches in evaluation, by place: launches, without a GPU."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from detectron2.modeling import build_model
from tabulate import tabulate

from benchmarks.counting import OperatorCount
from benchmarks.speed import add_config_arguments
from benchmarks.worker import at_least_one
from dsrcnn.config.load import load_cfg
from dsrcnn.errors import DsrcnnError

STORED = Path(__file__).with_name("operators.csv")


def count_operators(
    config: str, opts: list[str], *, height: int, width: int, half: bool = False
) -> OperatorCount:
    """Count the operators of one image in evaluation, at the second pass.

    With `half` under autocast with bfloat16, whose copies of the weights are kept.
    """
    cfg = load_cfg(config, ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", *opts])
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    inputs = [{"image": image, "height": height, "width": width}]
    # Inference mode would hide what composite operators consist of.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        model(inputs)
        with OperatorCount() as count:
            model(inputs)
    return count


class Stored(NamedTuple):
    """A row of `STORED`: counts of a config that must not grow."""

    config: str
    precision: str
    operators: int
    conversions: int
    torch: str

    def counted(self) -> "Stored":
        """Count again."""
        half = self.precision == "bf16"
        count = count_operators(self.config, [], height=64, width=96, half=half)
        version = torch.__version__.split("+")[0]
        return self._replace(operators=count.total, conversions=count.casts, torch=version)


def read_stored() -> list[Stored]:
    """Read `STORED`."""
    with STORED.open(newline="") as file:
        return [
            Stored(
                *(r["config"], r["precision"], int(r["operators"]), int(r["conversions"])),
                r["torch"],
            )
            for r in csv.DictReader(file)
        ]


def check(rows: Sequence[Stored]) -> list[str]:
    """Count again, and describe every row whose counts have grown.

    Other versions of torch may compose operators of others.
    """
    grown = []
    for stored in rows:
        now = stored.counted()
        if now.operators > stored.operators or now.conversions > stored.conversions:
            grown.append(
                f"{now.config}, {now.precision}: {now.operators} operators and {now.conversions} "
                f"conversions, stored {stored.operators} and {stored.conversions}"
            )
    return grown


def store(rows: Sequence[Stored]) -> None:
    """Write the counts of now into `STORED`."""
    counted = [row.counted() for row in rows]
    with STORED.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Stored._fields)
        writer.writerows(counted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add_config_arguments(parser, "coco/sparse_rcnn_R50_100pro_3x")
    parser.add_argument("--bf16", action="store_true", help="under autocast with bfloat16")
    parser.add_argument("--size", type=at_least_one, nargs=2, default=[256, 320], metavar="N")
    text = f"compare the configs of {STORED.name} with what is stored there"
    parser.add_argument("--check", action="store_true", help=text)
    parser.add_argument("--store", action="store_true", help="store their counts of now")


def run(args: argparse.Namespace) -> None:
    """Print the counts by place and by name.

    Raises:
        DsrcnnError: with ``--check``, if counts have grown.
    """
    if args.store:
        return store(read_stored())
    if args.check:
        if grown := check(read_stored()):
            raise DsrcnnError(
                "More operators than stored: " + "; ".join(grown) + ". Store the new counts with "
                "--store if they are meant."
            )
        return print(STORED.read_text().strip())
    height, width = args.size
    count = count_operators(args.config_file, args.set, height=height, width=width, half=args.bf16)
    for title, counter in (("place", count.by_place), ("operator", count.by_name)):
        print(tabulate(counter.most_common(), [title, "operators"], tablefmt="pipe"), "\n")
    print(f"{count.total} operators, {count.casts} of them conversions")
