"""Registry and builder of proposals."""

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from ...config.validate import check_name
from ...errors import ConfigError

PROPOSALS_REGISTRY = Registry("PROPOSALS")
PROPOSALS_REGISTRY.__doc__ = """
Sources of proposals: the input of the cascade.

A source is a `ProposalSource`, built from a config and called as ``source(features, sizes)`` with
pyramid levels (B, D, H_l, W_l), finest first, and sizes (B, 4) as ``w, h, w, h`` in pixels. It
returns `Proposals`. ``MODEL.SparseRCNN.PROPOSALS.NAME`` selects one.
"""

_DPG = "DynamicProposals"


class ProposalSource(nn.Module):
    """Base of all sources of proposals."""

    def end_iteration(self) -> None:
        """Advance schedules: called once per training iteration, after its last forward pass."""


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
