"""Registry and builder of proposals."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...config.validate import check_name
from ...errors import ConfigError
from ...structures import Predictions, Proposals, Targets

PROPOSALS_REGISTRY = Registry("PROPOSALS")
PROPOSALS_REGISTRY.__doc__ = """
Sources of proposals: the input of the cascade.

A source is a `ProposalSource`, built from a config and called as ``source(features, sizes)`` with
pyramid levels (B, D, H_l, W_l), finest first, and sizes (B, 4) as ``w, h, w, h`` in pixels. It
returns `Proposals`; one that selects them from predictions may return a pair of both, and gives the
predictions `losses`. ``MODEL.SparseRCNN.PROPOSALS.NAME`` selects one.
"""

_DPG = "DynamicProposals"
EXCLUDED_LOGIT = -20.0  # of candidates that must not be selected; it has no gradient
_COPY_NOISE = 0.01  # relative to the standard deviation of all values


class ProposalSource(nn.Module):
    """Base of all sources of proposals.

    Attributes:
        proposal_dimensions: by name of a parameter, its dimension that counts proposals; weights
            with another number of proposals are cut or tiled along it.
        gives_queries: whether features are (B, P, 2 * D), a position and a content side by side,
            as Deformable DETR takes them.
    """

    proposal_dimensions: ClassVar[Mapping[str, int]] = MappingProxyType({})
    gives_queries: ClassVar[bool] = False

    def propose(self, features: Any, sizes: Tensor) -> tuple[Proposals, Predictions | None]:
        """Return the proposals, and predictions they were selected from, which have losses too."""
        result = self(features, sizes)  # not `forward`, which would skip hooks
        return (result, None) if isinstance(result, Proposals) else result

    def losses(
        self, candidates: Predictions, targets: Targets, normalizers: Any
    ) -> dict[str, Tensor]:
        """Compute the weighted losses by name of the candidates that `propose` returns.

        Args:
            candidates: predictions that proposals were selected from.
            targets: ground truth of the batch.
            normalizers: from `loss_normalizers`; None for those of this batch.
        """
        raise NotImplementedError(f"{type(self).__name__} proposes from predictions without losses")

    def loss_normalizers(self, targets: list[Targets]) -> Any:
        """Return the normalizers of `losses` for a batch in parts, by the targets of each part."""
        return None

    def end_iteration(self) -> None:
        """Advance schedules: called once per training iteration, after its last forward pass."""


def resize_proposals(value: Tensor, count: int, dimension: int) -> Tensor:
    """Cut or tile learned boxes or features along `dimension` to `count` proposals.

    Copies get a little noise, the same on all processes, so that they do not stay equal: with equal
    costs both would be assigned the same object forever.
    """
    before = value.shape[dimension]
    index = torch.arange(count, device=value.device) % before
    resized = value.index_select(dimension, index)
    noise = torch.randn(resized.shape, generator=torch.Generator().manual_seed(0)).to(resized)
    is_copy = (torch.arange(count) >= before).to(resized)
    shape = [count if i == dimension else 1 for i in range(resized.dim())]
    return resized + _COPY_NOISE * value.std() * noise * is_copy.view(shape)


def check_config_of_source(cfg: CfgNode, *, takes_queries: bool) -> None:
    """Check that the source ``PROPOSALS.NAME`` gives what a decoder takes.

    Args:
        cfg: of the model.
        takes_queries: see `ProposalSource.gives_queries`.

    Raises:
        ConfigError: if it is not registered, or gives something else.
    """
    name, key = cfg.MODEL.SparseRCNN.PROPOSALS.NAME, "MODEL.SparseRCNN.PROPOSALS.NAME"
    if not name:
        return
    check_name(key, name, PROPOSALS_REGISTRY)
    source = PROPOSALS_REGISTRY.get(name)
    if getattr(source, "gives_queries", False) != takes_queries:
        fitting = sorted(
            known for known, kind in PROPOSALS_REGISTRY if kind.gives_queries == takes_queries
        )
        kind = "queries with a position and a content" if takes_queries else "boxes and features"
        raise ConfigError(
            f"{key} is {name!r}, but {cfg.MODEL.META_ARCHITECTURE} needs {kind}. Write one of "
            f"{', '.join(fitting)}, or a subclass of one."
        )


def build_proposals(cfg: CfgNode, default: str = "LearnedProposals") -> ProposalSource:
    """Build the source named by ``MODEL.SparseRCNN.PROPOSALS.NAME``.

    An empty name is that of DPG if it is enabled, otherwise the architecture's `default`.

    Raises:
        ConfigError: if the name is not registered, or has no DPG though that is enabled.
    """
    node = cfg.MODEL.SparseRCNN
    name = node.PROPOSALS.NAME or (_DPG if node.DPG.ENABLED else default)
    check_name("MODEL.SparseRCNN.PROPOSALS.NAME", name, PROPOSALS_REGISTRY)
    source_class = PROPOSALS_REGISTRY.get(name)
    if node.DPG.ENABLED and not issubclass(source_class, PROPOSALS_REGISTRY.get(_DPG)):
        raise ConfigError(
            f"MODEL.SparseRCNN.PROPOSALS.NAME is {name!r}, but MODEL.SparseRCNN.DPG.ENABLED is "
            f"True, which needs {_DPG} or a subclass of it. Write one of them, or DPG.ENABLED "
            "False."
        )
    source: ProposalSource = source_class(cfg)
    return source
