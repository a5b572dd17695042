"""Resizing inside exported graphs against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from dsrcnn.export.resize import fitting_size, resize_to_canvas


def photo(height, width):
    pixels = np.random.randint(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))


@pytest.mark.parametrize(("image", "canvas", "expected"), [
    ((480, 640), (256, 352), (256, 341)), ((640, 480), (256, 352), (256, 192)),
    ((100, 100), (256, 352), (256, 256)), ((10, 900), (256, 352), (4, 352)),
    ((3, 2), (5, 5), (5, 3)), ((1, 999), (64, 64), (1, 64)), ((256, 352), (256, 352), (256, 352)),
])  # fmt: skip
def test_images_get_the_largest_size_with_their_aspect_ratio_that_fits(image, canvas, expected):
    size = fitting_size(*map(torch.tensor, image), canvas)
    assert tuple(map(int, size)) == expected


@pytest.mark.parametrize("image", [(480, 640), (37, 51), (301, 200), (40, 300), (1000, 900)])
def test_pixels_are_those_of_pillow(image):
    original, canvas = photo(*image), (128, 160)
    pixels, before, after = resize_to_canvas(torch.from_numpy(np.array(original))[None], canvas)
    assert tuple(before) == image
    height, width = after.tolist()
    resized = np.array(original.resize((width, height), Image.Resampling.BILINEAR)).astype(float)
    difference = np.abs(pixels[0, :, :height, :width].permute(1, 2, 0).numpy() - resized)
    assert difference.max() <= 1  # where its whole numbers round a tie the other way
    assert (difference > 0).mean() < 0.01
    assert pixels.shape == (1, 3, *canvas)
    assert not pixels[:, :, height:].any()
    assert not pixels[..., width:].any()


def test_images_of_the_size_of_the_canvas_stay_as_they_are():
    images = torch.randint(0, 256, (2, 30, 40, 3), dtype=torch.uint8)
    pixels, _, _ = resize_to_canvas(images, (30, 40))
    assert torch.equal(pixels, images.permute(0, 3, 1, 2).float())
