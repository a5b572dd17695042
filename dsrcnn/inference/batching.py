"""Reading ahead in threads, and batches of images of one padded size, in the order given."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from typing import Generic, TypeVar

A = TypeVar("A")
B = TypeVar("B")


def map_ahead(
    function: Callable[[A], B],
    items: Iterable[A],
    *,
    workers: int,
    ahead: int,
    initializer: Callable[[], None] | None = None,
) -> Generator[Future[B], None, None]:
    """Apply a function in threads, at most `ahead` items before the consumer, in order.

    Returns:
        Futures that are done, so that the consumer handles the error of each item.
    """
    iterator = iter(items)
    failure: Exception | None = None
    has_more = True
    running: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(workers, "dsrcnn-ahead", initializer)
    with pool:
        try:
            while True:
                try:
                    while has_more and len(running) < ahead:
                        running.append(pool.submit(function, next(iterator)))
                except StopIteration:  # not kept: an error owns this frame, and that the function
                    has_more = False
                except Exception as error:  # what was read before is handed over first
                    failure, has_more = error, False
                if not running:
                    break
                future = running.popleft()
                future.exception()  # waits
                yield future
        finally:  # a consumer that stops early
            for future in running:
                future.cancel()
    if failure is not None:
        raise failure


def iterate_ahead(items: Iterable[A], *, ahead: int) -> Generator[A, None, None]:
    """Iterate in a thread, at most `ahead` items before the consumer; errors come in order."""
    waiting: queue.Queue[tuple[A | None, BaseException | None]] = queue.Queue(ahead)
    stopped = threading.Event()

    def hand_over(item: A | None, end: BaseException | None = None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):
                waiting.put((item, end), timeout=0.1)
                return

    def run() -> None:
        try:
            for item in items:
                hand_over(item)
                if stopped.is_set():
                    break
        except BaseException as error:
            hand_over(None, error)
        else:
            hand_over(None, StopIteration())

    thread = threading.Thread(target=run, name="dsrcnn-decode", daemon=True)
    thread.start()
    try:
        while True:
            item, end = waiting.get()
            if isinstance(end, StopIteration):
                return
            if end is not None:
                raise end
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()


def map_batches(
    function: Callable[[list[A]], list[B]],
    items: Iterable[tuple[object, A]],
    *,
    size: int,
    window: int,
    workers: int = 1,
    initializer: Callable[[], None] | None = None,
) -> Generator[B, None, None]:
    """Apply a function to batches of items with the same key, and return results in order.

    Args:
        function: from a batch to as many results.
        items: pairs of a key and an item.
        size: of a batch.
        window: number of items to wait for until an incomplete batch is processed.
        workers: threads that call it; 0 for the thread of the consumer.
        initializer: called in every thread first.
    """
    done: dict[int, B] = {}
    first = 0  # number of the next result
    # One batch waits, so that no worker does.
    batches, ahead = _group(items, size, window), workers + 1

    def run(batch: list[tuple[int, A]]) -> list[tuple[int, B]]:
        numbers, values = zip(*batch, strict=True)
        return list(zip(numbers, function(list(values)), strict=True))

    def results() -> Generator[list[tuple[int, B]], None, None]:
        if not workers:
            yield from map(run, batches)
            return
        futures = map_ahead(run, batches, workers=workers, ahead=ahead, initializer=initializer)
        with closing(futures):
            for future in futures:
                yield future.result()

    with closing(results()) as batches_done:
        for batch in batches_done:
            done.update(batch)
            while first in done:
                yield done.pop(first)
                first += 1


def _group(
    items: Iterable[tuple[object, A]], size: int, window: int
) -> Iterator[list[tuple[int, A]]]:
    """Group items into batches of one key, with their numbers.

    An error of the source comes after what came before it.
    """
    waiting: dict[object, list[tuple[int, A]]] = {}
    iterator, failure = enumerate(items), None
    while True:
        try:
            number, (key, item) = next(iterator)
        except StopIteration:
            break
        except Exception as error:
            failure = error
            break
        waiting.setdefault(key, []).append((number, item))
        oldest = next(iter(waiting))  # keys are in the order of their first items
        if len(waiting[key]) == size:
            yield waiting.pop(key)
        elif number - waiting[oldest][0][0] >= window:
            yield waiting.pop(oldest)
    yield from waiting.values()
    if failure is not None:
        raise failure


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
