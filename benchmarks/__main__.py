"""make bench: every question once, with what it says about the machine."""

import json

from benchmarks import loading, pack, runner

print(json.dumps(runner.machine(), indent=1))
loading.compare(rounds=5, samples=3072)
pack.compare(rounds=3, total=2_100_000_000)
print(f"\nresults are in {runner.RESULTS}")
