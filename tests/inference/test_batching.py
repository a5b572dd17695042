"""Reading ahead, batches by key in order, and the thread that saves."""

import threading
import time

import pytest

from dsrcnn.inference.batching import Background, iterate_ahead, map_ahead, map_batches


def test_items_are_processed_ahead_in_threads_and_returned_in_order():
    running, most = set(), []
    lock = threading.Lock()

    def slow(x):
        with lock:
            running.add(x)
            most.append(len(running))
        time.sleep(0.02 if x % 2 else 0.001)
        with lock:
            running.remove(x)
        if x == 5:
            raise ValueError("five")
        return 10 * x

    futures = list(map_ahead(slow, range(9), workers=2, ahead=4))
    assert [f.result() for i, f in enumerate(futures) if i != 5] == [
        10 * i for i in range(9) if i != 5
    ]
    with pytest.raises(ValueError, match="five"):
        futures[5].result()
    assert max(most) == 2


def test_reading_stays_at_most_a_few_items_ahead_and_stops_with_the_consumer():
    started = []
    stream = map_ahead(started.append, range(100), workers=1, ahead=3)
    next(stream)
    time.sleep(0.05)
    assert len(started) <= 4
    stream.close()
    assert len(started) < 10


@pytest.mark.parametrize(("keys", "size", "window", "batches"), [
    ("aaaaa", 2, 9, ["01", "23", "4"]),
    # Complete batches first; the rest at the end, in the order of their first items.
    ("abcab", 2, 9, ["03", "14", "2"]),
    # Item 0 would wait for another "a" too long.
    ("abbbbbbb", 2, 3, ["12", "0", "34", "56", "7"]),
    ("", 2, 3, []),
])  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_one_key_and_results_keep_the_order(keys, size, window, batches, workers):
    seen = []

    def process(batch):
        seen.append("".join(str(i) for i in batch))
        return [i * 10 for i in batch]

    items = [(key, i) for i, key in enumerate(keys)]
    results = list(map_batches(process, items, size=size, window=window, workers=workers))
    assert results == [i * 10 for i in range(len(keys))]
    assert seen == batches


def test_the_background_thread_consumes_in_order_and_reports_its_error():
    seen = []
    thread = Background(seen.append, ahead=2)
    for i in range(5):
        thread.put(i)
    thread.close()
    assert seen == list(range(5))

    def fail(_):
        raise OSError("disk full")

    thread = Background(fail, ahead=2)
    thread.put(0)
    with pytest.raises(OSError, match="disk full"):
        thread.close()


def test_items_before_an_error_of_their_source_are_processed_first():
    def items():
        yield from range(5)
        raise OSError("gone")

    stream = map_ahead(lambda x: -x, items(), workers=2, ahead=9)
    assert [next(stream).result() for _ in range(5)] == [0, -1, -2, -3, -4]
    with pytest.raises(OSError, match="gone"):
        next(stream)
    results = map_batches(lambda x: x, (("a", i) for i in items()), size=3, window=9)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="gone"):
        next(results)


def test_a_thread_iterates_ahead_and_stops_with_the_consumer():
    taken, closed = [], threading.Event()

    def items():
        try:
            for i in range(100):
                taken.append(i)
                yield i
        finally:
            closed.set()

    source = items()
    stream = iterate_ahead(source, ahead=2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    time.sleep(0.3)
    assert 3 < len(taken) <= 6
    stream.close()
    source.close()
    assert closed.is_set()
    assert len(taken) <= 7
    assert list(iterate_ahead(range(4), ahead=2)) == [0, 1, 2, 3]


def test_an_error_of_the_thread_comes_after_its_items():
    def items():
        yield 1
        raise ValueError("two")

    stream = iterate_ahead(items(), ahead=3)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="two"):
        next(stream)
