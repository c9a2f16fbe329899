"""make bench: every question once, with what it says about the machine."""

import json

from benchmarks import loading, pack, raw, runner, shuffle

print(json.dumps(runner.machine(), indent=1))
for kind in loading.CLASSES:
    loading.compare(kind=kind, rounds=5, seconds=2)
    raw.compare(kind=kind, rounds=7, seconds=2)
shuffle.compare()
pack.compare(rounds=3, total=2_100_000_000)
print(f"\nresults are in {runner.RESULTS}")
