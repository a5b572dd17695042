"""Processes, logging of scalars, and the interface between a model and its training."""
