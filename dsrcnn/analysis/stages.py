"""AP and time by stage: how many stages of a cascade are enough."""

import time
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from detectron2.evaluation import DatasetEvaluator

from ..modeling.meta_arch.sparse_rcnn import SparseRCNN


class StageResult(NamedTuple):
    """Metrics of the detections of a stage.

    Attributes:
        stages: number of stages that ran.
        metrics: of the evaluator.
        seconds: of an image with that many stages, the median.
    """

    stages: int
    metrics: dict[str, float]
    seconds: float


@torch.no_grad()
def compare_stages(
    model: SparseRCNN,
    inputs: Iterable[list[dict[str, Any]]],
    evaluators: Sequence[DatasetEvaluator],
    *,
    timed: int = 10,
) -> list[StageResult]:
    """Evaluate the detections of every stage in one pass over the data.

    Args:
        model: cascade with deep supervision, in evaluation mode.
        inputs: batches of model inputs.
        evaluators: one for each stage.
        timed: images whose time is measured; each runs once per number of stages.
    """
    for evaluator in evaluators:
        evaluator.reset()
    times: list[list[float]] = [[] for _ in evaluators]
    for batch in inputs:
        predictions, images = model.raw_predictions(batch, all_stages=True)
        for index, evaluator in enumerate(evaluators):
            outputs = model.postprocess(predictions.of_sets(slice(index, index + 1)), images, batch)
            evaluator.process(batch, outputs)
        if len(times[0]) < timed:
            for number, of_stage in enumerate(times, start=1):
                of_stage.append(_seconds(model, batch, number) / len(batch))
    results = []
    for number, (evaluator, of_stage) in enumerate(zip(evaluators, times, strict=True), start=1):
        metrics = dict((evaluator.evaluate() or {}).get("bbox", {}))
        results.append(StageResult(number, metrics, median(of_stage)))
    return results


def _seconds(model: SparseRCNN, batch: list[dict[str, Any]], stages: int) -> float:
    """Time of an inference that leaves the cascade after `stages`."""
    start = time.perf_counter()
    predictions, images = model.raw_predictions(batch, stages=stages)
    model.postprocess(predictions, images, batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
