"""Plain vision transformers with the simple feature pyramid of ViTDet (arXiv 2203.16527)."""

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from ...errors import ConfigError
from .timm_backbone import create_from_file, create_network

_PATCH = 16
_STRIDES = (4, 8, 16, 32)
_GLOBAL_BLOCKS = 4  # that attend to the whole image where the others have windows (section 3)


class VisionTransformer(Backbone):
    """The last feature map, of stride 16, of a plain vision transformer; a `SplitBackbone`.

    Position embeddings are resized to any image (bicubic). Class and register tokens are dropped,
    as in ViTDet, so weights of masked autoencoders (MAE, arXiv 2111.06377) fit best.

    Attributes:
        window: side of the windows in patches; 0: all blocks attend to the whole image.
        global_blocks: indices of the blocks that attend to the whole image in any case: the last of
            each quarter.
    """

    def __init__(
        self,
        name: str,
        *,
        pretrained: bool = False,
        weights: str = "",
        drop_path: float = 0.0,
        window: int = 0,
        freeze_at: int = 0,
    ) -> None:
        """Build the network.

        Args:
            name: timm's, such as ``vit_base_patch16_224``.
            pretrained: load timm's weights, from its cache or a download.
            weights: local file of weights instead, such as a checkpoint of MAE, whose decoder is
                left out.
            drop_path: rate of stochastic depth.
            window: side of the windows in patches, 14 in ViTDet; 0 for none.
            freeze_at: number of frozen parts: the embeddings (1), then the blocks.

        Raises:
            ConfigError: if timm is missing, or the network is no plain transformer with patches of
                16 pixels and position embeddings, or its blocks know no windows.
            WeightsError: if the weights cannot be loaded.
        """
        super().__init__()
        options: dict[str, Any] = {"num_classes": 0, "global_pool": "", "dynamic_img_size": True}
        if drop_path:
            options["drop_path_rate"] = drop_path
        _require_plain(name, options)
        if weights:
            body = create_from_file(name, options, weights)
        else:
            body = create_network(name, {"pretrained": pretrained, **options})
        self.embeddings = Embeddings(body.patch_embed, body.pos_embed, body.norm_pre)
        self.blocks, self.norm = body.blocks, body.norm
        if window:
            _require_windows(name, body.blocks)
        self.window = window
        depth = len(self.blocks)
        count = min(_GLOBAL_BLOCKS, depth)
        self.global_blocks = {depth * k // count - 1 for k in range(1, count + 1)}
        for index, block in enumerate(self.blocks):
            if self._has_windows(index):
                # In place of the method, so that activation checkpointing finds and wraps it.
                block.forward = partial(apply_in_windows, block, size=window)
        for part in self.parts()[: max(freeze_at, 0)]:
            for module in part:
                module.requires_grad_(False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W), sides multiples of 16, to ``last``, (B, C, H / 16, W / 16)."""
        tokens = self.embeddings(images)
        height, width = tokens.shape[1:3]
        for index, block in enumerate(self.blocks):
            if self._has_windows(index):
                tokens = block(tokens)
            else:
                tokens = block(tokens.flatten(1, 2)).unflatten(1, (height, width))
        return {"last": self.norm(tokens).permute(0, 3, 1, 2).contiguous()}

    def _has_windows(self, index: int) -> bool:
        return bool(self.window) and index not in self.global_blocks

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of the map."""
        channels = self.embeddings.pos_embed.shape[-1]
        return {"last": ShapeSpec(channels=channels, stride=_PATCH)}

    def parts(self) -> list[list[nn.Module]]:
        """Return the modules of each part: embeddings, then every block, the last with `norm`."""
        *blocks, last = self.blocks
        return [[self.embeddings], *([block] for block in blocks), [last, self.norm]]


class Embeddings(nn.Module):
    """Patches and their positions, for images of any size."""

    def __init__(self, patch_embed: nn.Module, pos_embed: Tensor, norm: nn.Module) -> None:
        """Take the layers of a network of timm; `norm` is that before its first block."""
        super().__init__()
        self.patch_embed, self.norm = patch_embed, norm
        self.grid: tuple[int, int] = tuple(cast(Any, patch_embed).grid_size)
        # Tokens that stand for no patch come first.
        self.pos_embed = nn.Parameter(pos_embed.detach()[:, -self.grid[0] * self.grid[1] :])

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), sides multiples of 16, to (B, H / 16, W / 16, C)."""
        from timm.layers import resample_abs_pos_embed

        tokens = self.patch_embed(images)
        size = list(tokens.shape[1:3])
        positions = resample_abs_pos_embed(
            self.pos_embed, size, list(self.grid), num_prefix_tokens=0
        )
        return self.norm(tokens + positions.unflatten(1, size).to(tokens.dtype))


def apply_in_windows(block: Any, tokens: Tensor, size: int) -> Tensor:
    """Apply a block of timm whose attention is limited to windows (ViTDet, section 3).

    Only the attention: stochastic depth is drawn for whole images, and padding is zero after the
    norm and reaches no other layer.

    Args:
        block: timm's ``Block``.
        tokens: (B, h, w, C).
        size: side of the windows; those at the far ends are padded.

    Returns:
        (B, h, w, C).
    """
    attended = attend_in_windows(block.attn, block.norm1(tokens), size)
    tokens = tokens + block.drop_path1(block.ls1(attended))
    result: Tensor = tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))
    return result


def attend_in_windows(attention: nn.Module, tokens: Tensor, size: int) -> Tensor:
    """Apply attention to windows of ``size x size`` of the tokens (B, h, w, C)."""
    height, width = tokens.shape[1:3]
    padded = F.pad(tokens, (0, 0, 0, -width % size, 0, -height % size))
    rows, columns = padded.shape[1] // size, padded.shape[2] // size
    # (B, rows, size, columns, size, C) to one sequence a window and back
    grid = padded.unflatten(2, (columns, size)).unflatten(1, (rows, size)).transpose(2, 3)
    windows = attention(grid.reshape(-1, size * size, tokens.shape[-1]))
    grid = windows.reshape(grid.shape).transpose(2, 3)
    return grid.flatten(3, 4).flatten(1, 2)[:, :height, :width]


class SimpleFeaturePyramid(Backbone):
    """Levels ``p2`` to ``p5`` from one map of stride 16 (ViTDet, section 3, figure 2).

    Transposed convolutions make the finer maps, pooling the coarser one. There is no top-down path:
    a plain transformer has seen the whole image in its one map.
    """

    def __init__(self, bottom_up: VisionTransformer, out_channels: int) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        channels = bottom_up.output_shape()["last"].channels
        self.levels = nn.ModuleList(_level(stride, channels, out_channels) for stride in _STRIDES)
        self._shapes = {
            f"p{i}": ShapeSpec(channels=out_channels, stride=s) for i, s in enumerate(_STRIDES, 2)
        }

    @property
    def size_divisibility(self) -> int:
        """Divisor that the sides of images need."""
        return _STRIDES[-1]

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides by level."""
        return self._shapes

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images (B, 3, H, W) to levels (B, D, H_l, W_l)."""
        last = self.bottom_up(images)["last"]
        return {k: level(last) for k, level in zip(self._shapes, self.levels, strict=True)}


def _level(stride: int, channels: int, out_channels: int) -> nn.Sequential:
    """Build the layers from stride 16 to another one."""
    half, quarter = channels // 2, channels // 4
    scale: dict[int, list[nn.Module]] = {
        4: [
            nn.ConvTranspose2d(channels, half, 2, 2),
            ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        ],
        8: [nn.ConvTranspose2d(channels, half, 2, 2)],
        16: [],
        32: [nn.MaxPool2d(2)],
    }
    inner = {4: quarter, 8: half}.get(stride, channels)
    return nn.Sequential(
        *scale[stride],
        nn.Conv2d(inner, out_channels, 1, bias=False),
        ChannelNorm(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        ChannelNorm(out_channels),
    )


class ChannelNorm(nn.LayerNorm):
    """Layer normalization over the channels of a map (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize each position."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _require_plain(name: str, options: dict[str, Any]) -> None:
    with torch.device("meta"):  # only for its description
        try:
            body = create_network(name, options, report=False)
        except TypeError:  # other networks know no such options
            body = None
    patches = getattr(getattr(body, "patch_embed", None), "patch_size", None)
    has_positions = isinstance(getattr(body, "pos_embed", None), nn.Parameter)
    has_blocks = isinstance(getattr(body, "blocks", None), nn.Sequential)
    if patches != (_PATCH, _PATCH) or not (has_positions and has_blocks):
        raise ConfigError(
            f"MODEL.TIMM.NAME is {name!r}; build_timm_vit_fpn_backbone needs a plain vision "
            "transformer with patches of 16 pixels and position embeddings, such as "
            "vit_base_patch16_224. Networks with a pyramid of their own: build_timm_fpn_backbone."
        )


def _require_windows(name: str, blocks: nn.Sequential) -> None:
    from timm.models.vision_transformer import Block

    others = {type(block).__name__ for block in blocks if type(block) is not Block}
    if others:
        raise ConfigError(
            f"MODEL.TIMM.WINDOW is not 0, but MODEL.TIMM.NAME {name} is built of "
            f"{' and '.join(sorted(others))}, whose attention cannot be limited to windows. Write "
            "MODEL.TIMM.WINDOW 0, or a network of plain blocks such as vit_base_patch16_224."
        )
