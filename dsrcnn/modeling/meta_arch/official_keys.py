"""Names of parameters in checkpoints: those of the official Sparse R-CNN."""

from typing import Any

from torch import nn

__all__ = ["keep_official_keys"]

# Checkpoints keep the learned proposals at the top level, as officially, and what DPG adds under a
# name of its own; here all of it belongs to one module. Longer prefixes first.
_STORED_NAMES = {
    "proposals.init_proposal_": "init_proposal_",
    "proposals.": "proposal_generator.",
}


def keep_official_keys(model: nn.Module) -> None:
    """Let `model`, whose proposals are ``model.proposals``, save and load under official names."""
    # The public names of the first two exist only since torch 2.5.
    model._register_state_dict_hook(_save_official_keys)
    model._register_load_state_dict_pre_hook(_load_official_keys)
    model.register_load_state_dict_post_hook(_report_official_keys)


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for key in [k for k in state if k.startswith(old)]:
        state[new + key[len(old) :]] = state.pop(key)


def _save_official_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for own, stored in _STORED_NAMES.items():
        _rename(state, prefix + own, prefix + stored)


def _load_official_keys(state: dict[str, Any], prefix: str, *_: Any) -> None:
    for own, stored in _STORED_NAMES.items():
        _rename(state, prefix + stored, prefix + own)


def _report_official_keys(module: nn.Module, incompatible: Any) -> None:
    for names in (incompatible.missing_keys, incompatible.unexpected_keys):
        for own, stored in _STORED_NAMES.items():
            names[:] = [name.replace(own, stored) for name in names]
