"""Where proposals come from."""

from .learned import LearnedProposals

__all__ = ["LearnedProposals"]
