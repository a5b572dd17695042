"""Augmentations beyond Detectron2's, configured by ``INPUT.AUG``."""
