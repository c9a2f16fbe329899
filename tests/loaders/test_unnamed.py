"""Locks and queues without names: they behave as multiprocessing's own, between processes too."""

import os
import queue
import time

import pytest

from loaders.unnamed import Semaphore, UnnamedContext


def test_a_semaphore_counts_and_waits_between_processes():
    semaphore, turn = Semaphore(2), UnnamedContext().Lock()
    assert semaphore.acquire()
    assert semaphore._get_value() == 1
    assert semaphore.acquire(block=False)
    assert not semaphore.acquire(block=False)
    assert not semaphore.acquire(timeout=0.01)
    child = os.fork()
    if not child:
        time.sleep(0.1)
        semaphore.release()
        os._exit(0)
    assert semaphore.acquire(timeout=30)
    os.waitpid(child, 0)
    with turn:
        assert not turn.acquire(block=False)
    assert turn.acquire(block=False)


def test_queues_carry_all_in_order_and_know_their_length():
    context = UnnamedContext()
    named = set(os.listdir("/dev/shm"))
    there, back, ended = context.Queue(), context.Queue(), context.Event()

    def work():
        while (item := there.get()) is not None:
            back.put(item * 2)
        ended.set()
        back.close()
        back.join_thread()

    worker = context.Process(target=work)
    worker.start()
    for number in range(1000):
        there.put(number)
    assert [back.get(timeout=30) for _ in range(1000)] == [2 * number for number in range(1000)]
    with pytest.raises(queue.Empty):
        back.get(timeout=0.01)
    assert not ended.is_set()
    there.put(None)
    worker.join(30)
    assert ended.is_set()
    assert worker.exitcode == 0
    assert back.qsize() == 0
    assert not {name for name in set(os.listdir("/dev/shm")) - named if str(os.getpid()) in name}
