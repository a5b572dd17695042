"""Drawing without a model: boxes on images, and curves of a training run."""
