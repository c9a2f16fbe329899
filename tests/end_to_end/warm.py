"""Runs of scripts by processes that need not import anything: forked from one that has, which costs a tenth of starting them.

python warm.py    reads requests from its input, a line of JSON each, and answers with a line: {"status": ...}

Each run is otherwise as by hand: arguments, environment, output and exit status are its own, and of several ranks the others end when one fails.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch._dynamo
import torch.optim
import transformers
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama

import train

IMPORTED = (torch._dynamo, torch.optim, modeling_clip, modeling_llama, train)
IMPORTED += (transformers.LlavaForConditionalGeneration, transformers.AutoTokenizer)


def rank(number, of, port, script, arguments, outputs):
    """Become one process of a run; never returns."""
    status = 1
    try:
        for output, descriptor in zip(outputs, (1, 2), strict=True):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        if of:
            ranks = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": of, "LOCAL_WORLD_SIZE": of}
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in (ranks | place).items()})
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(script, run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def finished(pids):
    """The first status that is no success, when all processes have ended; the others are told to end when one fails."""
    found = 0
    deadline = None
    while pids:
        for pid in list(pids):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended:
                continue
            pids.remove(pid)
            status = os.waitstatus_to_exitcode(status)
            found = found or status
            if status and deadline is None:
                deadline = time.monotonic() + 10
                for other in pids:
                    os.kill(other, signal.SIGTERM)
        if deadline is not None and time.monotonic() > deadline:
            for other in pids:
                os.kill(other, signal.SIGKILL)
        time.sleep(0.01)
    return found


for line in sys.stdin:
    request = json.loads(line)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes, pids = request["processes"], []
    for number in range(processes or 1):
        if not (pid := os.fork()):
            rank(number, processes, port, request["script"], request["arguments"], request["outputs"])
        pids.append(pid)
    print(json.dumps({"status": finished(pids)}), flush=True)
