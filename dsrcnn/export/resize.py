"""Resizing of an image of any size onto a canvas of a fixed size, inside an exported graph.

Each axis is a weighted sum of gathered rows. Only their number depends on the image, so whatever
follows has fixed shapes, and the padding comes for free. The filter is Pillow's: a triangle that
widens when images shrink, rounded to whole gray levels after each axis.

Notation: image ``h, w``, canvas ``H, W``, in pixels; ``T`` pixels that a resized one averages.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import ExportError

# Added before rounding down. Ties are common with sizes of simple ratios; a little more than a half
# decides them all in the same way in spite of float32, as Pillow's whole numbers do.
_HALF = 0.5002


def fitting_size(height: Tensor, width: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Largest size in a canvas with the aspect ratio of an image.

    Args:
        height: () int64 of the image.
        width: () int64.
        canvas: ``H, W``.

    Returns:
        Height and width, () int64, rounded to the nearest pixel and at least 1.
    """
    tallest, widest = canvas
    is_tall = height * widest >= width * tallest  # whole numbers, so that no rounding decides
    new_height = torch.where(is_tall, tallest, (2 * height * widest + width) // (2 * width))
    new_width = torch.where(is_tall, (2 * width * tallest + height) // (2 * height), widest)
    return new_height.clamp(min=1), new_width.clamp(min=1)


def interpolation_taps(
    before: Tensor, after: Tensor, places: int, taps: int
) -> tuple[Tensor, Tensor]:
    """Pixels of one axis that each resized pixel averages.

    Args:
        before: () int64, length of the axis.
        after: () int64, length after resizing.
        places: length of the canvas.
        taps: ``T``.

    Returns:
        Indices (places, T) int64 and weights (places, T) float32; weights sum to 1, and are 0
        beyond `after`.
    """
    device = before.device
    scale = before.float() / after.float()
    support = scale.clamp(min=1)  # antialiasing
    place = torch.arange(places, dtype=torch.float32, device=device)
    center = ((place + 0.5) * scale).unsqueeze(1)
    first = (center - support + 0.5).floor()
    pixel = first + torch.arange(taps, dtype=torch.float32, device=device)
    weight = (1 - (pixel + 0.5 - center).abs() / support).clamp(min=0)
    inside = (pixel >= 0) & (pixel < before) & (place < after).unsqueeze(1)
    weight = weight * inside
    weight = weight / weight.sum(dim=1, keepdim=True).clamp(min=1e-6)
    return pixel.long().clamp(min=0).minimum(before - 1), weight


def resize_to_canvas(images: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Resize images of one size to fit a canvas, at its upper left corner.

    Args:
        images: (B, h, w, 3) uint8.
        canvas: ``H, W``.

    Returns:
        Pixels (B, 3, H, W) float32 in 0..255, 0 outside the image; the sizes of the images before
        and after, (2,) int64 each, height first.
    """
    batch, tall, wide, channels = images.shape
    height, width = (_as_tensor(n, images.device) for n in (tall, wide))
    new_height, new_width = fitting_size(height, width, canvas)
    # Images of one or two resized columns or rows may need more; they lose the last ones.
    taps = 2 * _larger(-(-tall // canvas[0]), -(-wide // canvas[1])) + 2
    columns = interpolation_taps(width, new_width, canvas[1], taps)
    rows = interpolation_taps(height, new_height, canvas[0], taps)
    pixels = _average(images.permute(2, 0, 1, 3).flatten(1), *columns)  # x first, as Pillow
    pixels = pixels.view(canvas[1], batch, tall, channels).permute(2, 1, 3, 0).flatten(1)
    pixels = _average(pixels, *rows).view(canvas[0], batch, channels, canvas[1])
    sizes = torch.stack([height, width]), torch.stack([new_height, new_width])
    return pixels.permute(1, 2, 0, 3), *sizes


def resize_to_fit(image: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
    """Resize an image (h, w, 3) uint8 by `resize_to_canvas`, without the padding."""
    pixels, _, (height, width) = resize_to_canvas(torch.from_numpy(image.copy())[None], canvas)
    return pixels[0, :, : int(height), : int(width)].permute(1, 2, 0).byte().numpy()


def check_resizing(image: np.ndarray, canvas: tuple[int, int]) -> None:
    """Compare `resize_to_fit` with Pillow's resizing.

    Raises:
        ExportError: if a pixel differs by more than two gray levels, one for the rounding of each
            axis.
    """
    ours = resize_to_fit(image, canvas)
    height, width = ours.shape[:2]
    pillow = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    difference = np.abs(ours.astype(int) - np.asarray(pillow)).max()
    if difference > 2 and min(height, width) > 2:  # see `taps` above
        raise ExportError(
            f"The program resizes an image of {image.shape[1]}x{image.shape[0]} pixels to "
            f"{width}x{height} with differences of {difference} gray levels from Pillow. No file "
            "was written. Use another version of torch, and report this."
        )


def _average(rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Average rows (n, K) at indices (N, T) with weights (N, T), to whole gray levels (N, K)."""
    gathered = rows.index_select(0, index.flatten()).unflatten(0, index.shape)
    mean = (weight.unsqueeze(1) @ gathered.float()).squeeze(1)
    return (mean + _HALF).floor().clamp(0, 255)


# Lengths are symbols while a program is exported, and tensors while it is traced.


def _as_tensor(length: Any, device: torch.device) -> Tensor:
    if isinstance(length, Tensor):
        return length.to(device, torch.int64)
    return torch.scalar_tensor(length, dtype=torch.int64, device=device)


def _larger(first: Any, second: Any) -> Any:
    is_traced = isinstance(first, Tensor)
    return torch.maximum(first, second) if is_traced else torch.sym_max(first, second)
