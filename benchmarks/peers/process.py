"""The outside of a contender: starts it, asks it, and stops it (SIGSTOP) while others are measured."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-peers"
# module of benchmarks.peers: what it imports
PEERS = {
    "webdataset": "webdataset",
    "energon": "megatron.energon",
    "mosaicml": "streaming",
    "litdata": "litdata",
    "huggingface": "datasets",
    "spdl": "spdl.io",
    "spdl_in_process": "spdl.io",
}
NAMES = {
    "shardify": "StreamingLoader",
    "webdataset": "webdataset",
    "energon": "Energon",
    "mosaicml": "MosaicML Streaming",
    "litdata": "litData",
    "huggingface": "HF datasets",
    "spdl": "SPDL",
    "spdl_in_process": "SPDL in process",
}
_PATIENCE = 20  # seconds


def interpreter(module: str) -> str | None:
    """The Python that can run a module: .venv-peers's, or else this one; None when neither has what it needs."""
    if module == "shardify":
        return sys.executable
    python = ENVIRONMENT / "bin" / "python"
    if python.exists():
        return str(python)
    try:
        return sys.executable if find_spec(PEERS[module]) else None
    except ImportError:
        return None


class Contender:
    """A process of `benchmarks.peers.serve`, stopped except while it is asked something.

    A loader left idle fills its queues, some poll; stopped, it takes nothing from whoever is measured, and goes on where it was.

    Args:
        module: of benchmarks.peers.
        log: file for what it prints.
    """

    def __init__(self, module: str, log: Path) -> None:
        python = interpreter(module)
        assert python is not None
        self._module, self._log = module, log
        environment = {
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TQDM_DISABLE": "1",
        }
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.serve", module],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                process_group=0,  # of its own, in our session: should we die, the kernel ends it although it is stopped
            )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Continue it, ask, and wait until it has answered and stopped."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if line:
            ended = os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if not line or ended.si_code != os.CLD_STOPPED:
            self._process.wait()
            end = "\n".join(self._log.read_text(errors="replace").splitlines()[-30:])
            raise RuntimeError(f"{self._module} ended with status {self._process.returncode}:\n{end}")
        return json.loads(line)

    def measure(self, seconds: float) -> dict[str, float]:
        """Samples, bytes and seconds over about so many seconds, and `cpu`: seconds of processor time of all its processes."""
        before = self._cpu()
        answer = self.ask(do="measure", seconds=seconds)
        return {**answer, "cpu": self._cpu() - before}

    def _cpu(self) -> float:
        """Processor time of its processes that live, in seconds."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = stat.read_text().rpartition(")")[2].split()
                if int(fields[2]) == self._process.pid:  # the process group
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        self._signal(signal.SIGKILL)  # what is left of its group
        self._process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
