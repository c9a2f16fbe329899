"""What does it cost that the shards are behind a web server with 50 ms of latency, and what does a small cache save?

nginx serves them on this machine and waits 50 ms before each answer (its echo module: apt-get install nginx libnginx-mod-http-echo). One worker
decodes, so that half of two cores' decoding is asked for and the other core has room to fetch. Every contender reads all samples once to
warm up; processor time is that of the whole process tree, the server's not included.
"""

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import loading, runner

LATENCY = 0.05  # seconds
BATCH = 64
ORDER = {"lanes": 4, "window": 4}  # few blocks at a time, as the data is small
COUNTED = ("samples", "bytes_used", "bytes_fetched", "requests")
_MODULE = "ngx_http_echo_module.so"
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_CONFIGURATION = """
load_module {module};
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/errors.log;
events {{ worker_connections 256; }}
http {{
    access_log off; sendfile on; keepalive_requests 1000000;
    server {{
        listen 127.0.0.1:{port};
        location / {{ echo_sleep {latency}; echo_exec @files; }}
        location @files {{ root {root}; }}
    }}
}}
"""


@contextmanager
def slow_server(root: Path, folder: Path) -> Iterator[str]:
    """Nginx over a folder, every answer late by `LATENCY`; gives its URL."""
    binary = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    module = next(
        (found for top in ("/usr/lib", "/usr/lib64") for found in Path(top).glob(f"nginx/modules/{_MODULE}")),
        None,
    )
    if binary is None or module is None:
        raise SystemExit("nginx and its echo module are needed: apt-get install nginx libnginx-mod-http-echo")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "nginx.conf").write_text(
        _CONFIGURATION.format(module=module, folder=folder, port=port, root=root, latency=LATENCY)
    )
    server = subprocess.Popen(
        [binary, "-p", str(folder), "-e", str(folder / "errors.log"), "-c", str(folder / "nginx.conf")]
    )
    try:
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()


def processor_time() -> float:
    """Seconds that this process and all below it have used so far."""
    total, todo = 0.0, [os.getpid()]
    while todo:
        pid = todo.pop()
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) * _TICK
            for task in Path(f"/proc/{pid}/task").iterdir():
                todo += [int(child) for child in (task / "children").read_text().split()]
    return total


def epochs(place, *, image, count: int, **settings) -> list[dict[str, float]]:
    """Of each epoch: samples/s, processor microseconds a sample, and what was asked for and came."""
    from loaders import StreamingLoader

    loader = StreamingLoader(place, batch_size=BATCH, image=image, text=None, num_workers=1, **settings)
    results = []
    try:
        before = dict.fromkeys(COUNTED, 0)
        for _ in range(count):
            begin, used = time.perf_counter(), processor_time()
            for _ in loader:
                pass
            seconds, used = time.perf_counter() - begin, processor_time() - used
            total = loader.stats().total
            now = {name: getattr(total, name) for name in COUNTED}
            epoch = {name: now[name] - before[name] for name in COUNTED}
            before = now
            results.append(
                {"rate": epoch["samples"] / seconds, "cpu": used / epoch["samples"] * 1e6, **epoch}
            )
    finally:
        loader.close()
    return results


def compare(*, rounds: int, samples: int) -> runner.Comparison:
    from loaders import ImageTransform

    described, pictures = runner.photos()
    runner.headline(
        f"Remote: {described}, one worker, batches of {BATCH}, 336 crop, {LATENCY * 1000:.0f} ms latency"
    )
    image = ImageTransform(336, fit="crop")
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = loading.write_data_set(folder, pictures, samples)
        size = sum(path.stat().st_size for path in data.glob("*.tar"))
        costs: dict[str, list[float]] = {"local": [], "remote": []}
        with slow_server(folder, folder) as url:

            def rate(name: str, place: object) -> float:
                # the second epoch: everything is at work; the cache holds what the next batches need, and little that was needed before
                small = {} if name == "local" else {"cache_size": max(size // 8, 256 * 1024 * 1024)}
                result = epochs(place, image=image, count=2, **ORDER, **small)[-1]
                costs[name].append(result["cpu"])
                return result["rate"]

            remote = f"{url}/data/manifest.json"
            contenders = {"local": lambda: rate("local", data), "remote": lambda: rate("remote", remote)}
            comparison = runner.interleave(contenders, rounds=rounds, unit="samples/s")
            ratio = statistics.median(
                far / near for far, near in zip(costs["remote"], costs["local"], strict=True)
            )
            first = epochs(remote, image=None, count=1, **ORDER)[0]
            kept = {"cache_dir": folder / "cache", "cache_size": size // 4}
            second = epochs(remote, image=None, count=2, **ORDER, **kept)[-1]
    print(runner.table(comparison, reference="local"))
    facts = {
        "processor_time_over_local": round(ratio, 3),
        "fetched_over_used": round(first["bytes_fetched"] / first["bytes_used"], 3),
        "requests_per_sample": round(first["requests"] / first["samples"], 4),
        "second_epoch_cache_25_percent_fetched_over_used": round(
            second["bytes_fetched"] / second["bytes_used"], 3
        ),
    }
    for name, value in facts.items():
        print(f"  {name.replace('_', ' ')}: {value}")
    runner.save("remote", comparison, data=described, samples=samples, batch=BATCH, latency=LATENCY, **facts)
    return comparison


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=12288)
    arguments = parser.parse_args()
    compare(rounds=arguments.rounds, samples=arguments.samples)
