"""The temperature of DPG's softmax: high at first, so that all experts learn, then falling."""

from typing import NamedTuple

from torch import Tensor

__all__ = ["TemperatureSchedule"]


class TemperatureSchedule(NamedTuple):
    """Linear from `start` to `end` over `iterations` training steps, then `end`.

    Annealing as in dynamic convolution (arXiv 1912.03458, section 3.3), whose method Dynamic Sparse
    R-CNN takes over.

    Attributes:
        start: at step 0.
        end: from step `iterations` on, and in evaluation.
        iterations: how long; 0 for `end` from the first step on.
    """

    start: float = 30.0
    end: float = 1.0
    iterations: int = 75000

    def at(self, step: Tensor) -> Tensor:
        """Temperature of a training step, a tensor on the device of `step`."""
        done = (step / max(self.iterations, 1)).clamp(max=1.0)
        if self.iterations == 0:
            done = done * 0 + 1
        return self.start + (self.end - self.start) * done
