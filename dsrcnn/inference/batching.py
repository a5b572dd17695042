"""Reading ahead in threads, and batches of images of one padded size, in the order given."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


def map_ahead(
    function: Callable[[A], B], items: Iterable[A], *, workers: int, ahead: int
) -> Iterator[Future[B]]:
    """Apply a function in threads, at most `ahead` items before the consumer, in order.

    Returns:
        Futures that are done, so that the consumer handles the error of each item.
    """
    iterator = iter(items)
    with ThreadPoolExecutor(workers, thread_name_prefix="dsrcnn-read") as pool:
        running = deque(pool.submit(function, item) for item in islice(iterator, ahead))
        try:
            while running:
                future = running.popleft()
                future.exception()  # waits
                running.extend(pool.submit(function, item) for item in islice(iterator, 1))
                yield future
        finally:  # a consumer that stops early, or an error of the iterator
            for future in running:
                future.cancel()


def map_batches(
    function: Callable[[list[A]], list[B]],
    items: Iterable[tuple[object, A]],
    *,
    size: int,
    window: int,
) -> Iterator[B]:
    """Apply a function to batches of items with the same key, and return results in order.

    Args:
        function: from a batch to as many results.
        items: pairs of a key and an item.
        size: of a batch.
        window: number of items to wait for until an incomplete batch is processed.
    """
    waiting: dict[object, list[tuple[int, A]]] = {}
    done: dict[int, B] = {}
    first = 0  # number of the next result

    def process(key: object) -> None:
        numbers, batch = zip(*waiting.pop(key), strict=True)
        done.update(zip(numbers, function(list(batch)), strict=True))

    for number, (key, item) in enumerate(items):
        waiting.setdefault(key, []).append((number, item))
        if len(waiting[key]) == size:
            process(key)
        elif number - first >= window:
            process(next(k for k, batch in waiting.items() if batch[0][0] == first))
        while first in done:
            yield done.pop(first)
            first += 1
    for key in list(waiting):
        process(key)
    for number in sorted(done):
        yield done[number]


class Background(Generic[A]):
    """A thread that consumes items, at most `ahead` of them waiting.

    Errors of the function are raised by the next `put` or by `close`.
    """

    def __init__(self, function: Callable[[A], None], *, ahead: int) -> None:
        self._function = function
        self._queue: queue.Queue[tuple[A] | None] = queue.Queue(ahead)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="dsrcnn-save", daemon=True)
        self._thread.start()

    def put(self, item: A) -> None:
        """Hand an item over; waits while too many are waiting."""
        self._raise()
        self._queue.put((item,))

    def close(self) -> None:
        """Wait until all items are consumed."""
        self._queue.put(None)
        self._thread.join()
        self._raise()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._function(entry[0])
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
