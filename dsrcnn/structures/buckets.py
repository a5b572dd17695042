"""Choice of the padded size of a batch."""

from collections.abc import Sequence

Size = tuple[int, int]  # height, width


def smallest_bucket(size: Size, buckets: Sequence[Size]) -> Size | None:
    """Return the bucket with the fewest pixels that contains an image, None if there is none."""
    fitting = [b for b in buckets if b[0] >= size[0] and b[1] >= size[1]]
    return min(fitting, key=lambda b: (b[0] * b[1], b), default=None)
