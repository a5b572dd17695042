"""A page in the browser that shows what a trained detector does."""

import os

# Gradio would report every start to its makers; it reads this when it is imported.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
