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


def test_a_forked_copy_counts_for_itself():
    """Its parent may have let go of the semaphore, and have another under the number."""
    semaphore = Semaphore(5)
    assert semaphore._get_value() == 5
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.read(reader, 1)
        os._exit(semaphore._get_value())
    number = semaphore._file
    del semaphore
    other = Semaphore(77)
    assert other._file == number
    os.write(writer, b".")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
    os.close(reader)
    os.close(writer)


def test_nothing_stays_open_of_a_semaphore():
    before = os.listdir("/proc/self/fd")
    semaphores = [Semaphore(1) for _ in range(5)]
    assert sum(semaphore._get_value() + semaphore._get_value() for semaphore in semaphores) == 10
    del semaphores
    assert os.listdir("/proc/self/fd") == before


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
