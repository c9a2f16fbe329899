"""make bench: every question once, with what it says about the machine."""

import json

from benchmarks import loading, memory, pack, planning, raw, remote, resume, runner, shuffle

print(json.dumps(runner.machine(), indent=1))
for kind in loading.CLASSES:
    loading.compare(kind=kind, rounds=5, seconds=2)
    raw.compare(kind=kind, rounds=7, seconds=2)
shuffle.compare()
planning.compare(rounds=5)
resume.compare(rounds=7)
memory.compare(epochs=20, samples=1024)
try:
    remote.compare(rounds=5, samples=12_288)
except SystemExit as missing:  # no nginx
    print(f"left out: {missing}")
pack.compare(rounds=3, total=2_100_000_000)
print(f"\nresults are in {runner.RESULTS}")
