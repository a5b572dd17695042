"""A page on labeled images, for tests."""

import json

from conftest import ANIMALS, write_coco

from dsrcnn.app.views import AssignmentView


def labeled_folder(folder):
    """Write a folder of labeled images, with the classes of the `detector`."""
    for split in ("train", "val"):
        write_coco(folder / f"annotations/instances_{split}.json", folder / f"images/{split}")
        path = folder / f"annotations/instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(ANIMALS, start=1)]
        path.write_text(json.dumps(content))
    return folder


def assignment_view(detector, folder):
    return AssignmentView(detector, detector.cfg_with(labeled_folder(folder)))
