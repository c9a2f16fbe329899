"""The command line, but what makes a shard is one of the functions below. Ray pickles them by value: nodes need not have this file."""

import os
import signal
import sys
import time
from pathlib import Path

from shardify import cli, convert
from shardify.errors import PackError
from shardify.pack import pack_shard


def mark(task, word):
    """Leave a file that says what this node has done; its folder and the node's name are in the node's environment."""
    path = Path(os.environ["ON_RAY"], f"{os.environ.get('NODE', 'none')} {task.name} {word} {time.time_ns()}")
    path.write_text(str(os.getpid()))


def slow(context, task, report):
    """Takes its time between the records and the end."""
    mark(task, "begun")
    result = pack_shard(context, task, report)
    time.sleep(float(os.environ.get("PAUSE", "0")))
    mark(task, "done")
    return result


def dies_once(context, task, report):
    """The first worker that has a certain shard is killed in the middle of it."""

    def report_and_die(records, size):
        report(records, size)
        path = Path(os.environ["ON_RAY"], "died")
        if task.name == "003.tar" and not path.exists():
            path.write_text("")
            os.kill(os.getpid(), signal.SIGKILL)

    return pack_shard(context, task, report_and_die)


def dies(context, task, report):
    """As dies_once, but always."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuses(context, task, report):
    """A fault that was foreseen."""
    raise PackError(f"{task.name} is cursed")


if __name__ == "__main__":
    convert.pack_shard = globals()[sys.argv.pop(1)]
    cli.main()
