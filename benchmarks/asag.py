"""Time of ASAG's inference by probed levels beside that of a cascade, and of its patches.

Anchors of the image need one decoder layer and cost little. All models have random weights and room
for equally many queries, probed levels for equally many patches; the table has the queries of an
image, which are fewer where patches reach beyond it.
"""

import argparse
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, cast

import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor

from benchmarks.counting import now
from benchmarks.speed import measure_in_turn, median_ratio, time_in_turn
from benchmarks.worker import Shape, add_shape_arguments, at_least_one, make_batch
from dsrcnn.config.load import load_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.modeling import ASAG, SparseRCNN
from dsrcnn.modeling.asag.anchor_generator import NUM_PROBED_LEVELS, AnchorGenerator, ProbingRule
from dsrcnn.modeling.asag.patches import CELLS, PatchCompressor, cut_patches

_PATCHES = (1, 5, 15, 60)


def _build(config: str, kind: type, args: argparse.Namespace) -> Any:
    """Build a model of a class in evaluation mode.

    Raises:
        ConfigError: if the config is of another class.
    """
    opts = ["MODEL.SparseRCNN.NUM_PROPOSALS", str(args.queries), "MODEL.WEIGHTS", "", *args.set]
    model = build_model(load_cfg(config, opts)).eval()
    if not isinstance(model, kind):
        raise ConfigError(f"{config} is no config of {kind.__name__}.")
    return model


def _settle(generator: AnchorGenerator, queries: int, patches: int) -> None:
    """Make untrained anchors small and spread them; limit them and the patches."""
    for net in (generator.proj_all, generator.proj_patch):
        bias = cast(Tensor, net.layers[-1].bias).view(-1, 5)
        bias[:, :2].uniform_(0.05, 0.95).logit_()
        bias[:, 2:4] = -2.5
    generator.rule = generator.rule._replace(
        low=0.0, high=1.0, output=0.0, most=queries, max_patches=patches
    )


def _run(model: Any, batch: list[dict[str, Any]], levels: int = 0) -> tuple[float, ...]:
    """Queries of an image, then seconds of backbone, proposals or anchors, and decoder.

    An encoder counts as part of the proposals.
    """
    times = [now()]
    images = model.preprocess_image(batch)
    features = model.extract_features(images)
    times.append(now())
    if isinstance(model, ASAG):
        model.generator.rule = model.generator.rule._replace(levels=levels)
        anchors, _ = model.anchors(features, images.sizes)
        times.append(now())
        model.decode(features, anchors)
        times.append(now())
        queries = anchors.mask.sum(dim=1).float().mean().item()
    else:
        features = model.encode_features(features, images)  # by the encoder of Deformable DETR
        proposals, _ = model.proposals.propose(features, images.sizes)
        times.append(now())
        model.head(features, proposals)
        times.append(now())
        queries = float(proposals.boxes.shape[1])
    return queries, *(b - a for a, b in pairwise(times))


@torch.no_grad()
def _compare_inference(args: argparse.Namespace) -> str:
    """Table of milliseconds by part; ratios are to the cascade."""
    batch = make_batch(Shape.from_args(args), classes=80)
    cascade = _build(args.baseline, SparseRCNN, args)
    runs = {args.baseline: partial(_run, cascade, batch)}
    for config in args.configs:
        model = _build(config, ASAG, args)
        _settle(model.generator, args.queries, args.patches)
        for name, levels in NUM_PROBED_LEVELS.items():
            runs[f"{config}, {name}"] = partial(_run, model, batch, levels)
    results = measure_in_turn(runs, args.repeats, warm_up=1)
    rows, cascades = [], results[args.baseline]
    for name, rounds in results.items():
        queries, *parts = (median(values) for values in zip(*rounds, strict=True))
        ratios = [  # with the backbone, without it
            median_ratio([sum(x[first:]) for x in rounds], [sum(x[first:]) for x in cascades])
            for first in (1, 2)
        ]
        rows.append([name, queries, *(1000 * seconds for seconds in parts), *ratios])
    headers = ["", "queries", "backbone (ms)", "proposals (ms)", "decoder (ms)"]
    headers += ["ratio", "without backbone"]
    formats = ("", ".0f", *[".1f"] * 3, ".2f", ".2f")
    return tabulate(rows, headers, floatfmt=formats, tablefmt="pipe")


@torch.no_grad()
def _compare_patches(repeats: int) -> str:
    """Table of milliseconds for patches of P3 of one image of 800 x 1333 pixels.

    Anchors are predicted patch by patch or together; the whole map is compressed or only the
    patches.
    """
    generator = AnchorGenerator(
        channels=256, hidden=1000, fixed_anchors=50, probed_anchors=20, rule=ProbingRule()
    ).eval()
    compressor = cast(PatchCompressor, generator.compress[0])
    level = torch.randn(1, 256, 100, 167).to(memory_format=torch.channels_last)
    rows = []
    for count in _PATCHES:
        sides = level.shape[3], level.shape[2]
        positions = torch.stack([torch.randint(0, s - CELLS, (count,)) for s in sides], dim=1)
        images = torch.zeros(count, dtype=torch.int64)
        patches = cut_patches(compressor(level), images, positions)
        runs = {
            "one by one": partial(_predict_one_by_one, generator, patches),
            "together": partial(generator.predict_patches, patches, 2),
            "whole map": partial(compressor, level),
            "as needed": partial(compressor.patches, level, images, positions),
        }
        results = time_in_turn(runs, repeats)
        loop, together, whole, needed = (1000 * median(t) for t in results.values())
        rows.append([count, loop, together, loop / together, whole, needed, whole / needed])
    headers = ["patches", "one by one", "together", "ratio", "whole map", "as needed", "ratio"]
    return tabulate(rows, headers, floatfmt=("", *[".2f"] * 6), tablefmt="pipe")


def _predict_one_by_one(generator: AnchorGenerator, patches: Tensor) -> None:
    for patch in patches:
        generator.predict_patches(patch.unsqueeze(0), 2)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--baseline", default="coco/sparse_rcnn_R50_100pro_3x", help="a cascade")
    configs = ["coco/asag_s_R50_100pro_3x", "coco/asag_a_R50_100pro_3x"]
    parser.add_argument("--configs", nargs="+", default=configs, help="of ASAG")
    add_shape_arguments(parser, images=1, objects=0)
    parser.add_argument("--queries", type=at_least_one, default=100, help="default: 100")
    parser.add_argument("--patches", type=at_least_one, default=5, help="of a level (default: 5)")
    parser.add_argument("--repeats", type=at_least_one, default=7, help="rounds (default: 7)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="for every model")


def run(args: argparse.Namespace) -> None:
    """Print the tables."""
    print(
        f"\n{Shape.from_args(args)}, {args.queries} queries, {args.patches} patches of a probed "
        f"level, {args.repeats} rounds, medians\n\n{_compare_inference(args)}"
    )
    print(f"\nP3 of one image 800x1333, milliseconds\n\n{_compare_patches(args.repeats)}")
