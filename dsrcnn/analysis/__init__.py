"""Pictures of a trained model or its data: a file for each, which runs the model and draws.

Unless documented otherwise, the functions take a config with ``MODEL.WEIGHTS`` and datasets, a
folder to write to, and a number of images, evenly spaced over the first dataset. They return the
files written and raise

- `ConfigError` if the model has no such picture,
- `DataError` if the dataset cannot be read,
- `WeightsError` if the weights are missing or do not fill the whole model.
"""
