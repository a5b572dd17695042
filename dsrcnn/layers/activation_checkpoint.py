"""Activation checkpointing: less memory for about a third more computation.

Activations inside a block are dropped after the forward pass and recomputed in the backward pass
(arXiv 1604.06174). Results do not change: random numbers are repeated, and batch norms count each
batch once.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .norm import preserve_bn_stats


def checkpointed(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`, which runs `module`, and keep only its arguments and result."""
    contexts = lambda: (nullcontext(), preserve_bn_stats(module))  # noqa: E731
    return checkpoint(function, *args, use_reentrant=False, context_fn=contexts)


def checkpoint_blocks(backbone: nn.Module) -> None:
    """Checkpoint every residual block of a backbone, in place; parameters keep their names.

    Blocks are the members of the ``nn.Sequential`` stages, as in Detectron2's ResNets and timm's
    networks.
    """
    for block in list(_blocks(backbone)):
        block.forward = partial(_run, block, block.forward)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the innermost stages, never a part of another block."""
    for child in module.children():
        is_stage = isinstance(child, nn.Sequential)
        if is_stage and not any(isinstance(m, nn.Sequential) for m in child.children()):
            yield from child.children()
        else:
            yield from _blocks(child)


def _run(block: nn.Module, forward: Callable[..., Any], x: torch.Tensor) -> Any:
    # Frozen first blocks keep no activations.
    has_gradient = x.requires_grad or any(p.requires_grad for p in block.parameters())
    if block.training and torch.is_grad_enabled() and has_gradient:
        return checkpointed(block, forward, x)
    return forward(x)
