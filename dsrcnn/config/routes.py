"""Routes through a cascade: which of them dynamic label assignment trains (``DLA.ROUTE``).

The main route is the cascade that inference runs. With ``DLA.ROUTE auxiliary`` a second route, in
training only, learns by DLA, and the main route learns one to one.
"""

from detectron2.config import CfgNode

from ..errors import ConfigError


def trains_main_route_by_dla(cfg: CfgNode) -> bool:
    """Whether ``MODEL.SparseRCNN.DLA`` is on and trains the route that inference uses."""
    node = cfg.MODEL.SparseRCNN.DLA
    return bool(node.ENABLED) and node.ROUTE == "main"


def has_auxiliary_route(cfg: CfgNode) -> bool:
    """Whether a second route learns by ``MODEL.SparseRCNN.DLA`` in training."""
    node = cfg.MODEL.SparseRCNN.DLA
    return bool(node.ENABLED) and node.ROUTE == "auxiliary"


def with_dla_on_main_route(cfg: CfgNode, *, enabled: bool = True) -> CfgNode:
    """Copy a config and let DLA, or nothing but one-to-one matching, train the main route."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.SparseRCNN.DLA.ENABLED, cfg.MODEL.SparseRCNN.DLA.ROUTE = enabled, "main"
    return cfg


def check_routes(cfg: CfgNode) -> None:
    """Raise a `ConfigError` if there is an auxiliary route with nothing to learn."""
    node, key = cfg.MODEL.SparseRCNN.DLA, "MODEL.SparseRCNN.DLA"
    if node.ROUTE == "auxiliary" and not node.ENABLED:
        raise ConfigError(
            f"{key}.ROUTE is 'auxiliary', but {key}.ENABLED is False: without DLA an auxiliary "
            f"route would learn nothing. Write {key}.ENABLED True, or {key}.ROUTE main."
        )
