"""Training, evaluation and everything around a run."""
