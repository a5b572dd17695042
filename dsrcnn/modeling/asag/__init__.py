"""ASAG (arXiv 2308.09242): anchors of the image instead of learned proposals, one decoder layer."""
