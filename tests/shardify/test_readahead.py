"""Reads come back in order, whether they are fast or wait."""

import threading
import time

import pytest

from shardify.readahead import read_ahead


def test_fast_reads_stay_in_this_thread():
    seen = []

    def read(number):
        seen.append(threading.get_ident())
        return number * 2

    assert list(read_ahead(read, range(500), size=lambda _: 10)) == [(n, n * 2) for n in range(500)]
    assert set(seen) == {threading.get_ident()}


def test_slow_reads_wait_together_and_come_in_order():
    waiting = 0
    most = 0
    lock = threading.Lock()

    def read(number):
        nonlocal waiting, most
        with lock:
            waiting += 1
            most = max(most, waiting)
        time.sleep(0.003 + 0.002 * (number % 3))
        with lock:
            waiting -= 1
        return -number

    assert list(read_ahead(read, range(300), size=lambda _: 10)) == [(n, -n) for n in range(300)]
    assert most > 8


def test_items_are_drawn_a_bounded_number_ahead():
    drawn = 0

    def items():
        nonlocal drawn
        for number in range(10_000):
            drawn += 1
            yield number

    for number, _ in read_ahead(lambda _: time.sleep(0.002), items(), size=lambda _: 50_000_000):
        assert drawn <= number + 8
        if number == 100:
            break


@pytest.mark.parametrize("slow", [0, 0.003])
def test_a_failure_is_raised_in_its_place(slow):
    def read(number):
        time.sleep(slow)
        if number == 40:
            raise KeyError(number)
        return number

    done = []
    with pytest.raises(KeyError):
        for item, _ in read_ahead(read, range(100), size=lambda _: 1):
            done.append(item)
    assert done == list(range(40))


def test_nothing_runs_on_after_the_reader_is_left():
    before = threading.active_count()
    reads = read_ahead(lambda _: time.sleep(0.003), range(1000), size=lambda _: 1)
    for _, (number, _) in zip(range(60), reads, strict=False):
        assert number >= 0
    reads.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
