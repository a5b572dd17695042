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


def checkpoint_blocks(backbone: nn.Module) -> int:
    """Checkpoint every residual block of a backbone, in place; parameters keep their names.

    Blocks are the members of the ``nn.Sequential`` stages, as in Detectron2's ResNets and timm's
    networks. Single layers, such as those of a stem, are none.

    Returns:
        The number of blocks.
    """
    blocks = list(_blocks(backbone))
    for block in blocks:
        block.forward = partial(_run, block, block.forward)
    return len(blocks)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of the innermost stages, never a part of another block."""
    for child in module.children():
        is_stage = isinstance(child, nn.Sequential)
        if is_stage and not any(isinstance(m, nn.Sequential) for m in child.children()):
            yield from (member for member in child.children() if _layers(member) > 1)
        else:
            yield from _blocks(child)


def _layers(module: nn.Module) -> int:
    """Count the layers with weights."""
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def _run(block: nn.Module, forward: Callable[..., Any], *args: Any) -> Any:
    # Frozen first blocks keep no activations.
    has_gradient = any(t.requires_grad for t in (*_tensors(args), *block.parameters()))
    if block.training and torch.is_grad_enabled() and has_gradient:
        # Blocks may replace the elements of a list, which are needed again in the backward pass.
        return checkpointed(block, lambda *given: forward(*map(_copied, given)), *args)
    return forward(*args)


def _copied(value: Any) -> Any:
    return [*map(_copied, value)] if isinstance(value, list) else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in arguments, which may be lists of them, one for each resolution."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
