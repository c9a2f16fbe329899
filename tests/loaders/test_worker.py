"""Who watches workers ends those that hang, and no others."""

import os
import signal
import threading
import time

import pytest

from loaders.worker import Watch


class Stacks:
    """Stands for the workers' stacks; something may happen while they are asked for."""

    def __init__(self):
        self.asked = threading.Event()
        self.meanwhile = lambda: None

    def ask(self, _processes):
        self.asked.set()
        self.meanwhile()
        return "where they are"


@pytest.fixture
def worker():
    """A process that waits to be killed."""
    pid = os.fork()
    if not pid:
        time.sleep(60)
        os._exit(0)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def is_killed(pid):
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_workers_that_keep_the_trainer_waiting_are_ended(worker):
    watch = Watch(Stacks(), [worker], 0.1)
    watch.begin()
    os.waitid(os.P_PID, worker, os.WEXITED | os.WNOWAIT)
    assert watch.found == "where they are"
    watch.close()


def test_a_batch_that_comes_while_they_are_asked_spares_them(worker):
    stacks = Stacks()
    watch = Watch(stacks, [worker], 0.1)
    stacks.meanwhile = watch.end
    watch.begin()
    assert stacks.asked.wait(30)
    watch.close()
    assert not is_killed(worker)
    assert not watch.found


def test_after_closing_nothing_is_ended(worker):
    """Their process ids may be those of others by then."""
    stacks = Stacks()
    stacks.meanwhile = lambda: time.sleep(0.5)
    watch = Watch(stacks, [worker], 0.1)
    watch.begin()
    assert stacks.asked.wait(30)
    watch.close()
    assert not watch._thread.is_alive()
    assert not is_killed(worker)
