"""Functions that do not keep the object alive that they belong to."""

import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


def weak_method(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """Return a function that calls a bound method without owning its object.

    An object whose parts own methods of it stays in memory until Python looks for cycles, and with
    it a model and its optimizer on the GPU.

    Raises:
        ReferenceError: by the returned function, if the object is gone.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        found = reference()
        if found is None:
            raise ReferenceError("the object of this method is gone")
        return found(*args, **kwargs)

    return call
