"""A page on labeled images, for tests."""

from conftest import ANIMALS, write_coco

from dsrcnn.app.views import AssignmentView


def assignment_view(detector, folder):
    """The view of a folder of labeled images, with the classes of the `detector`."""
    for split in ("train", "val"):
        annotations = folder / f"annotations/instances_{split}.json"
        write_coco(annotations, folder / f"images/{split}", classes=ANIMALS)
    return AssignmentView(detector, detector.cfg_with(folder))
