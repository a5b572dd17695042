"""Files that evaluators write."""

import json
import logging
from pathlib import Path
from typing import Any

_LOGGER = logging.getLogger(__name__)


def write_detections(path: Path, content: Any) -> None:
    """Write detections as JSON; a full disk is logged, as it must not end a training."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    except OSError as error:
        _LOGGER.error("%s cannot be written: %s.", path, error.strerror)
