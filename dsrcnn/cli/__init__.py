"""Commands of the ``dsrcnn`` program."""
