"""What every data set is checked for when it is loaded, whatever it was read from."""

import logging
from pathlib import Path

from ...errors import DataError
from ..annotations import box_fault

__all__ = ["check_records"]

_LOGGER = logging.getLogger(__name__)
_WARNED: set[str] = set()
_SHOWN = 5  # examples named in a message


def check_records(records: list[dict], source: str, image_root: str) -> None:
    """Refuse records that cannot be used, and take unusable boxes out of the others, in place.

    Boxes that are not finite, have no area or lie wholly outside their image are left out with one
    warning that counts and names them; boxes that reach over the border are clipped when an image
    is loaded.

    Args:
        records: in Detectron2's format.
        source: file or folder they were read from, for messages.
        image_root: folder of the images, for messages.

    Raises:
        DataError: if there are no images or boxes, or images that do not exist.
    """
    if not records:
        raise DataError(f"The data set is empty: {source} lists no images.")
    _check_images(records, source, image_root)
    _drop_unusable_boxes(records, source)
    if not any(record["annotations"] for record in records):
        raise DataError(
            f"{source} has {len(records)} images but no box that can be used; check the "
            "annotations."
        )


def _check_images(records: list[dict], source: str, image_root: str) -> None:
    missing = [r["file_name"] for r in records if not Path(r["file_name"]).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(records)} images of {source} do not exist: "
            f"{_some(missing, ', ')}. File names are relative to {image_root!r}; correct the image "
            "folder or the file."
        )


def _drop_unusable_boxes(records: list[dict], source: str) -> None:
    faults: list[str] = []
    for record in records:
        usable = []
        for annotation in record["annotations"]:
            fault = box_fault(annotation, record.get("height"), record.get("width"))
            if fault is None:
                usable.append(annotation)
            else:
                faults.append(f"{Path(record['file_name']).name} {annotation['bbox']} ({fault})")
        record["annotations"] = usable
    if faults:
        message = (
            f"{source}: {len(faults)} boxes cannot be used and are left out, the images stay: "
            f"{_some(faults, '; ')}. Correct or remove them in the file to silence this warning."
        )
        if message not in _WARNED:  # loaders are built for every evaluation; once is enough
            _WARNED.add(message)
            _LOGGER.warning(message)


def _some(items: list[str], separator: str) -> str:
    return separator.join(items[:_SHOWN]) + (f"{separator}..." if len(items) > _SHOWN else "")
