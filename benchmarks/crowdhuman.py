"""Seconds of CrowdHuman's evaluation on synthetic detections, as many images as it validates on.

python -m benchmarks crowdhuman [--images 4370] [--detections 500]
"""

import argparse
import time

import numpy as np

from benchmarks.worker import at_least_one
from dsrcnn.evaluation.crowdhuman import CrowdImage, crowdhuman_metrics, jaccard_index

_WIDTH, _HEIGHT = 800, 600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--images", type=at_least_one, default=4370)
    parser.add_argument("--detections", type=at_least_one, default=500, help="of an image (500)")


def run(args: argparse.Namespace) -> None:
    """Measure and print."""
    generator = np.random.default_rng(0)
    images = [crowd(generator, args.detections) for _ in range(args.images)]
    seconds = []
    for work in (crowdhuman_metrics, jaccard_index):
        start = time.perf_counter()
        work(images)
        seconds.append(time.perf_counter() - start)
    print(
        f"{args.images} images with {args.detections} detections: {seconds[0]:.1f} s for all "
        f"metrics, {seconds[1]:.1f} s of them for the Jaccard index"
    )


def crowd(generator: np.random.Generator, detections: int) -> CrowdImage:
    """Draw an image of 5 to 44 persons (23 on average in CrowdHuman), 40 % of detections near one.

    A tenth of the persons are regions to ignore.
    """
    persons = int(generator.integers(5, 45))
    center = generator.uniform((50, 50), (_WIDTH - 50, _HEIGHT - 50), (persons, 2))
    size = np.stack([generator.uniform(15, 60, persons), generator.uniform(30, 150, persons)], 1)
    boxes = np.concatenate([center - size / 2, center + size / 2], axis=1)
    near = boxes[generator.integers(0, persons, detections)]
    near = near + generator.normal(0, 8, near.shape)
    anywhere = generator.uniform(0, _HEIGHT, near.shape)
    is_near = generator.random(detections) < 0.4
    found = np.where(is_near[:, None], near, anywhere)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 2)
    scores = np.where(is_near, generator.beta(2, 2, detections), generator.beta(1, 8, detections))
    ignored = generator.random(persons) < 0.1
    return CrowdImage(_WIDTH, _HEIGHT, boxes, ignored, found, scores)
