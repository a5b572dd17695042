"""Images per second of a trained model: `dsrcnn predict` against a loop over DefaultPredictor."""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import cv2
from detectron2.engine import DefaultPredictor
from PIL import Image
from tabulate import tabulate

import dsrcnn
from benchmarks.speed import measure_in_turn, median_ratio
from benchmarks.worker import at_least_one
from dsrcnn.engine.checkpoint import load_trained, without_weights
from dsrcnn.errors import DataError
from dsrcnn.inference import Detector, Result
from dsrcnn.inference.batching import Background
from dsrcnn.inference.results import draw_detections
from dsrcnn.inference.saving import PictureWriter
from dsrcnn.inference.sources import image_files

_THRESHOLD = 0.3


def build_loop(detector: Detector) -> Callable[[str, Path | None], int]:
    """Return the loop that people write: read, predict, draw and save one image after another."""
    cfg = detector.cfg.clone()
    predictor = DefaultPredictor(without_weights(cfg))
    load_trained(predictor.model, cfg)

    def detect(path: str, folder: Path | None) -> int:
        image = cv2.imread(path)
        instances = predictor(image)["instances"].to("cpu")
        instances = instances[instances.scores >= _THRESHOLD]
        if folder is not None:
            height, width = image.shape[:2]
            arrays = (instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
            boxes, scores, labels = (array.numpy() for array in arrays)
            result = Result(boxes, scores, labels, detector.classes, (height, width))
            detections = result.to_supervision()
            drawn = draw_detections(image[..., ::-1], detections, detector.classes)
            Image.fromarray(drawn).save(folder / f"{Path(path).stem}.jpg")
        return len(instances)

    return detect


def seconds_of_loop(
    detect: Callable[[str, Path | None], int], paths: Sequence[str], *, draw: bool
) -> float:
    """Time the loop over all images."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        for path in paths:
            detect(path, Path(folder) if draw else None)
        return time.perf_counter() - start


def seconds_of_predict(
    detector: Detector, paths: Sequence[str], batch: int, *, draw: bool
) -> float:
    """Time `Detector.predict`, with pictures as ``dsrcnn predict`` writes them."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        results = detector.predict(list(paths), batch=batch, stream=True, threshold=_THRESHOLD)
        if draw:
            saving = Background(PictureWriter(Path(folder)).write, ahead=8)
            for result in results:
                saving.put(result)
            saving.close()
        else:
            for _ in results:
                pass
        return time.perf_counter() - start


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("model", help="output folder of a training run, or a weight file")
    parser.add_argument("images", type=Path, help="folder of images")
    parser.add_argument("--count", type=at_least_one, default=200, help="images (default: 200)")
    parser.add_argument("--batches", type=at_least_one, nargs="+", default=[1, 4, 8])
    parser.add_argument("--repeats", type=at_least_one, default=3, help="rounds (default: 3)")
    parser.add_argument("--device", help="such as cpu or cuda")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY VALUE", help="overrides")


def run(args: argparse.Namespace) -> None:
    """Print the table."""
    detector = dsrcnn.load(args.model, device=args.device, opts=args.set)
    files = image_files(args.images)
    if not files:
        raise DataError(f"{args.images} has no image; write a folder of images.")
    paths = list(islice(cycle(files), args.count))
    loop = build_loop(detector)
    rows = []
    for draw in (False, True):
        runs = {"DefaultPredictor, loop": partial(seconds_of_loop, loop, paths, draw=draw)}
        for batch in args.batches:
            call = partial(seconds_of_predict, detector, paths, batch, draw=draw)
            runs[f"predict, batch {batch}"] = call
        timed = measure_in_turn(runs, args.repeats, warm_up=1)
        first = timed["DefaultPredictor, loop"]
        for name, values in timed.items():
            speed = args.count / median(values)
            ratio = median_ratio(first, values)
            rows.append([name, "yes" if draw else "no", f"{speed:.1f}", f"{ratio:.2f}"])
    headers = ["", "pictures", "images/s", "ratio"]
    print(f"\n{args.count} images, {args.repeats} rounds, medians; {detector.model.device}\n")
    print(tabulate(rows, headers, tablefmt="pipe", disable_numparse=True))
