"""ASAG's point: anchors of the image need one decoder layer, and cost little themselves."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, cast

import torch
from detectron2.modeling import build_model
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from benchmarks.worker import make_batch, now
from dsrcnn.config.load import load_cfg
from dsrcnn.errors import ConfigError
from dsrcnn.modeling import ASAG
from dsrcnn.modeling.asag import LEVELS_PROBED, AnchorGenerator
from dsrcnn.modeling.asag.patches import PatchCompressor, cut_patches
from dsrcnn.modeling.meta_arch.base import SparseDetector

__all__ = ["compare_inference", "compare_patches"]


class _Variant(NamedTuple):
    """A model, and of ASAG how many levels are probed."""

    name: str
    model: SparseDetector
    levels: int | None = None


@torch.no_grad()
def compare_inference(
    baseline: str,
    configs: Sequence[str],
    opts: Sequence[str],
    *,
    images: int = 1,
    height: int = 480,
    width: int = 640,
    queries: int = 100,
    patches: int = 5,
    repeats: int = 7,
) -> str:
    """Measure inference of ASAG by level beside that of a cascade, in turn, with random weights.

    All have room for equally many queries, and every probed level for equally many patches; the
    table says how many queries there are. They are fewer where patches reach beyond the image.

    Args:
        baseline: config of the cascade.
        configs: of ASAG.
        opts: ``KEY, VALUE, ...`` for all.
        images: batch size.
        height: of the images in pixels.
        width: of the images in pixels.
        queries: of an image, at most.
        patches: of an image and probed level, at most; what was published is about 5.
        repeats: rounds.

    Returns:
        A table. Its ratios are to the cascade, medians of those of each round.
    """
    variants = [_Variant(baseline, _model(baseline, opts, queries))]
    for config in configs:
        model = _model(config, opts, queries)
        if not isinstance(model, ASAG):
            raise ConfigError(f"{config} is no config of ASAG.")
        _settle(model.generator, queries, patches)
        variants += [_Variant(f"{config}, {k}", model, n) for k, n in LEVELS_PROBED.items()]
    batch = make_batch(images, height, width, 1, 80)
    seconds: dict[str, list[list[float]]] = {v.name: [] for v in variants}
    counts: dict[str, float] = {}
    for _ in tqdm(range(repeats + 1), desc="measuring"):
        for variant in variants:
            times, counts[variant.name] = _parts(variant, batch)
            seconds[variant.name].append(times)
    own = seconds[baseline][1:]  # the first round warms up
    rows = []
    for name, rounds in seconds.items():
        whole = median(sum(a) / sum(b) for a, b in zip(rounds[1:], own, strict=True))
        rest = median(sum(a[1:]) / sum(b[1:]) for a, b in zip(rounds[1:], own, strict=True))
        parts = [1000 * median(r[i] for r in rounds[1:]) for i in range(3)]
        rows.append([name, counts[name], *parts, whole, rest])
    headers = ["", "queries", "backbone (ms)", "proposals (ms)", "decoder (ms)"]
    headers += ["ratio", "without backbone"]
    formats = ("", ".0f", *[".1f"] * 3, ".2f", ".2f")
    return tabulate(rows, headers, floatfmt=formats, tablefmt="pipe")


def _model(config: str, opts: Sequence[str], queries: int) -> SparseDetector:
    count = ["MODEL.SparseRCNN.NUM_PROPOSALS", str(queries), "MODEL.WEIGHTS", ""]
    return cast(SparseDetector, build_model(load_cfg(config, [*count, *opts])).eval())


def _settle(generator: AnchorGenerator, queries: int, patches: int) -> None:
    """Let untrained anchors be small, and as many as is said, of them and of patches."""
    for net in (generator.proj_all, generator.proj_patch):
        cast(Tensor, net.layers[-1].bias).view(-1, 5)[:, 2:4] = -2.5
    generator.rule = generator.rule._replace(
        low=0.0, high=1.0, overlap=1.0, output=0.0, most=queries, max_patches=patches
    )


def _parts(variant: _Variant, batch: list[dict]) -> tuple[list[float], float]:
    """Seconds of the backbone, of proposals or anchors, and of the rest; queries of an image."""
    model, times = cast(Any, variant.model), [now()]
    features, sizes, _ = model.extract(batch)
    times.append(now())
    if isinstance(model, ASAG):
        model.generator.rule = model.generator.rule._replace(levels=variant.levels or 0)
        anchors, _ = model.anchors(features, sizes)
        times.append(now())
        model.decode(features, anchors)
        count = anchors.mask.sum(dim=1).float().mean().item()
    else:
        proposals = model.proposals(features, sizes)
        times.append(now())
        model.head(features, proposals)
        count = float(proposals.boxes.shape[1])
    times.append(now())
    return [b - a for a, b in pairwise(times)], count


@torch.no_grad()
def compare_patches(
    counts: Sequence[int] = (1, 5, 15, 60),
    *,
    height: int = 800,
    width: int = 1333,
    repeats: int = 7,
) -> str:
    """Measure what patches of P3 cost: one after the other, together, and where they are alone.

    Args:
        counts: of patches.
        height: of the image in pixels.
        width: of the image in pixels.
        repeats: rounds.

    Returns:
        A table in milliseconds; ratios are to all patches together.
    """
    generator = AnchorGenerator().eval()
    net = cast(PatchCompressor, generator.compress[0])
    level = torch.randn(1, 256, -(-height // 8), -(-width // 8))
    level = level.to(memory_format=torch.channels_last)
    rows = []
    for count in tqdm(counts, desc="measuring"):
        places = [
            torch.randint(0, side - 15, (count,)) for side in (level.shape[3], level.shape[2])
        ]
        positions, images = torch.stack(places, dim=1), torch.zeros(count, dtype=torch.int64)
        whole = net(level)
        cut = cut_patches(whole, images, positions, 15)
        ways: dict[str, Callable[[], object]] = {
            "together": partial(generator.predict_patches, cut, 2),
            "one by one": partial(_one_by_one, generator, cut),
            "map": partial(net, level),
            "windows": partial(net.patches, level, images, positions, 15),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeats + 1):
            for name, way in ways.items():
                start = now()
                way()
                seconds[name].append(now() - start)
        medians = {name: 1000 * median(values[1:]) for name, values in seconds.items()}
        loop, together, map_, windows = (
            medians[x] for x in ("one by one", "together", "map", "windows")
        )
        rows.append([count, loop, together, loop / together, map_, windows, map_ / windows])
    headers = ["patches", "one by one", "together", "ratio", "whole map", "as needed", "ratio"]
    return tabulate(rows, headers, floatfmt=("", *[".2f"] * 6), tablefmt="pipe")


def _one_by_one(generator: AnchorGenerator, patches: Tensor) -> None:
    for patch in patches:
        generator.predict_patches(patch.unsqueeze(0), 2)
