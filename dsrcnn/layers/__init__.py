"""Layers that know nothing of detectors."""
