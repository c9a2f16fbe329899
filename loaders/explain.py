"""What a plan will do, and what a checkpoint has seen; no data is read.

    python -m loaders.explain SHARDS --world 64 --workers 8 --batch-size 32     what an epoch would do
    python -m loaders.explain CHECKPOINT --step 12345 [--rank 3]                what a step saw
    python -m loaders.explain consumed CHECKPOINT... [--id ID] [--exclude FILE] what a model was trained on

In Python: `explain_epoch`, `samples_at` and `consumed`, with `read_state` for states that lie in checkpoints. Exit status: 0 done, 1 the data
or the state is not what it should be, 2 wrong usage, 130 interrupted.
"""

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from loaders.checkpoints import read_state
from loaders.mixture import Mixture, Shards
from loaders.outlook import EpochPlan, Spread, explain_epoch
from loaders.past import (
    Consumed,
    ConsumedPart,
    ConsumedRun,
    SampleTrace,
    StepSample,
    StepSamples,
    Trace,
    consumed,
    samples_at,
)
from shardify.errors import ShardifyError, UsageError

__all__ = [
    "Consumed",
    "ConsumedPart",
    "ConsumedRun",
    "EpochPlan",
    "SampleTrace",
    "Spread",
    "StepSample",
    "StepSamples",
    "Trace",
    "consumed",
    "explain_epoch",
    "read_state",
    "samples_at",
]

_STEPS_SHOWN = 20
_SAMPLES_SHOWN = 20


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with warnings.catch_warnings():
        warnings.showwarning = _note
        return _run(given)


def _run(given: list[str]) -> int:
    try:
        if given[:1] == ["consumed"]:
            _consumed(_consumed_parser().parse_args(given[1:]))
        elif any(word == "--step" or word.startswith("--step=") for word in given):
            _step(_step_parser().parse_args(given))
        else:
            _epoch(_epoch_parser().parse_args(given))
    except ShardifyError as error:
        kind = "usage error" if isinstance(error, UsageError) else "error"
        print(f"explain: {kind}: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("\nexplain: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # what is left of the output has no reader; Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _note(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"note: {message}", file=sys.stderr)


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"python -m loaders.explain{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _epoch_parser() -> argparse.ArgumentParser:
    parser = _parser("", f"{__doc__}\nOptions for SHARDS (--step and consumed have their own: add --help):")
    add = parser.add_argument
    add(
        "shards",
        metavar="SHARDS",
        nargs="+",
        help="a brace pattern, a folder, a manifest, tars, URLs, or a mixture's .yaml",
    )
    add("--world", type=int, default=1, metavar="N", help="ranks (default 1)")
    add("--nodes", type=int, default=1, metavar="N", help="machines they are on (default 1)")
    add("--workers", type=int, default=4, metavar="N", help="worker processes of a rank (default 4)")
    add("--batch-size", type=int, metavar="N", help="samples of a rank")
    add("--global-batch-size", type=int, metavar="N", help="samples of all ranks, instead")
    add("--epoch", type=int, default=0, metavar="N", help="which, from 0 (default 0)")
    add("--shuffle", choices=["block", "full", "none"], default="block", help="(default block)")
    add("--seed", type=int, default=0, metavar="N", help="(default 0)")
    add(
        "--group-by",
        choices=["length", "modality", "modality_length"],
        help="by words of the index (default no groups)",
    )
    add("--max-tiles", type=int, metavar="N", help="most images of a rank's batch (default no budget)")
    add(
        "--plan-window",
        type=int,
        default=16_384,
        metavar="N",
        help="samples grouped together (default 16384)",
    )
    add(
        "--lanes",
        type=int,
        metavar="N",
        help="of the block shuffle (default 64, or the ranks when they are more)",
    )
    add("--block", type=int, default=32, metavar="N", help="neighbours that stay together (default 32)")
    add("--window", type=int, default=8, metavar="N", help="blocks that are mixed (default 8)")
    add("--drop-last", action="store_true", help="leave out short batches")
    add("--split", choices=["train", "validation"], help="one side of it (default all samples)")
    add("--validation", default="0.01", metavar="SHARE", help="share of the validation side (default 0.01)")
    add("--max-samples", type=int, metavar="N", help="take no more (default all)")
    add("--exclude", metavar="FILE", help="ids, URLs and image hashes that become fillers")
    add("--json", action="store_true", help="print JSON")
    return parser


def _step_parser() -> argparse.ArgumentParser:
    parser = _parser("", "The exact samples that a step saw: positions, keys, ids, shards and bytes.")
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a loader's state as JSON, or a torch checkpoint that holds one",
    )
    add(
        "--step",
        type=int,
        required=True,
        metavar="K",
        help='the batch after which batch.state["step"] is K; the first is 1',
    )
    add("--rank", type=int, metavar="N", help="that rank alone (default all)")
    _add_places(parser)
    return parser


def _consumed_parser() -> argparse.ArgumentParser:
    parser = _parser(
        " consumed",
        "What a model was trained on, and how often. Of several checkpoints of one run the last one counts. Samples that could not be read or decoded\n"
        "are counted: which they were, the run's log says.",
    )
    add = parser.add_argument
    add("checkpoints", metavar="CHECKPOINT", nargs="+", help="one of each stage, as for --step")
    add(
        "--id",
        action="append",
        default=[],
        metavar="ID",
        help="how often and when it was seen; may be given several times",
    )
    add("--exclude", metavar="FILE", help="the same for each entry of a list: ids, URLs, image hashes")
    _add_places(parser)
    return parser


def _add_places(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards",
        nargs="+",
        metavar="SHARDS",
        help="where the data is now (default where the run found it); a mixture's .yaml for its parts",
    )
    parser.add_argument(
        "--state", metavar="NAME", help="where in the checkpoint the state is, such as loader.train"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _epoch(given: argparse.Namespace) -> None:
    plan = explain_epoch(
        _places(given.shards),
        batch_size=given.batch_size,
        global_batch_size=given.global_batch_size,
        world_size=given.world,
        num_workers=given.workers,
        nodes=given.nodes,
        epoch=given.epoch,
        shuffle=None if given.shuffle == "none" else given.shuffle,
        seed=given.seed,
        group_by=given.group_by,
        max_tiles=given.max_tiles,
        plan_window=given.plan_window,
        drop_last=given.drop_last,
        split=given.split,
        validation=given.validation,
        max_samples=given.max_samples,
        exclude=given.exclude,
        lanes=given.lanes,
        block=given.block,
        window=given.window,
    )
    if given.json:
        _print_json(asdict(plan))
    else:
        _print_epoch(plan, given.block)


def _step(given: argparse.Namespace) -> None:
    state = read_state(given.checkpoint, given.state)
    found = samples_at(state, given.step, given.rank, shards=_places(given.shards))
    if given.json:
        _print_json(asdict(found))
    else:
        _print_step(found, state["step"])


def _consumed(given: argparse.Namespace) -> None:
    states = [read_state(path, given.state) for path in given.checkpoints]
    found = consumed(states, ids=given.id, exclude=given.exclude, shards=_places(given.shards))
    if given.json:
        _print_json(_as_json(found, given.checkpoints))
    else:
        _print_consumed(found, given.checkpoints)


def _places(given: list[str] | None) -> Any:
    """Shards as the package takes them: one word as it is, a mixture's file as the mixture."""
    if given is None:
        return None
    shards: Shards | Mixture = given[0] if len(given) == 1 else given
    if isinstance(shards, str) and shards.endswith((".yaml", ".yml")):
        return Mixture.from_yaml(shards)
    return shards


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def _print_epoch(plan: EpochPlan, block: int) -> None:
    size = "" if plan.global_batch_size is None else f", global batches of {plan.global_batch_size:,}"
    nodes = f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
    again = f" ({plan.data_samples:,} in the data)" if plan.positions != plan.data_samples else ""
    print(f"Epoch {plan.epoch}: {plan.positions:,} samples{again}, {plan.world_size} ranks{nodes}{size}\n")
    print(f"batches         {plan.batches:,} a rank, {plan.batches_per_worker:,} a worker")
    print(f"fillers         {plan.fillers:,} to make ranks equal, {plan.excluded:,} excluded samples")
    if plan.dropped:
        print(f"left out        {plan.dropped:,} samples of short batches")
    print(f"shards          {plan.shards_touched:,} of {plan.shards:,} are read\n")
    print("of a rank             least       average          most")
    shown: list[tuple[str, Spread, Callable[[float], str]]] = [
        ("samples", plan.samples, _count),
        ("bytes", plan.bytes, _bytes),
        ("words", plan.words, _count),
        ("images", plan.images, _count),
    ]
    for name, spread, write in shown:
        print(f"{name:13}{write(spread.least):>14}{write(spread.mean):>14}{write(spread.most):>14}")
    print(
        f"\nsteps           in each, the fullest rank has {plan.step_imbalance:.2f} times the words of the average one"
    )
    ranks = plan.world_size / plan.nodes
    print(
        f"if remote       {_count(plan.requests.mean / ranks)} requests a rank ({plan.requests_per_sample:.3f} a sample), a node fetches"
        f" {_bytes(plan.bytes_fetched.mean)}, {plan.fetched_over_used:.3f} times what it uses"
    )
    print(
        f"shuffle         neighbours on a rank lie {plan.neighbour_distance:.1%} of the data apart (uniform 33.3%),"
        f" {plan.neighbours_in_block:.2%} in the same {block} (uniform {plan.neighbours_in_block_uniform:.2%});"
        f" correlation of place and position {plan.correlation:+.3f} (uniform 0)"
    )
    _print_notes(plan.notes)


def _print_step(found: StepSamples, made_at: int) -> None:
    size = "" if found.global_batch_size is None else f", global batch of {found.global_batch_size:,}"
    print(f"Step {found.step}, epoch {found.epoch}, {found.world_size} ranks{size}")
    if found.future:
        print(f"The checkpoint is of step {made_at}: this is what a run that goes on unchanged will see.")
    if found.skipped is not None:
        print(f"Nothing: steps {found.skipped[0]} to {found.skipped[1]} were skipped (skip=).")
    else:
        print(
            f"{len(found.samples):,} samples, {sum(sample.size for sample in found.samples):,} bytes, {found.fillers:,} fillers"
        )
        print("rank\trow\tposition\tkey\tid\tshard\toffset\tsize\twords\timages")
    for sample in found.samples:
        fields = (
            sample.rank,
            sample.row,
            sample.position,
            sample.key,
            "" if sample.id is None else sample.id,
            sample.shard,
            sample.offset,
            sample.size,
            sample.words,
            sample.images,
            "excluded: a filler stood here" if sample.excluded else "",
        )
        print("\t".join(map(str, fields)).rstrip())
    _print_notes(found.notes)


def _print_consumed(found: Consumed, names: Sequence[str]) -> None:
    for name, run in zip(names, found.runs, strict=True):
        if run.part_of is not None:
            print(f"{name}: an earlier state of {names[run.part_of]}, counted there")
            continue
        print(f"{name}: {run.samples:,} samples in {run.steps:,} steps, {run.epochs:,} epochs finished")
        if run.skipped[0]:
            print(f"  {run.skipped[0]:,} steps were skipped, with {run.skipped[1]:,} samples")
        if run.excluded:
            print(f"  {run.excluded:,} times a filler stood for an excluded sample")
    for part in found.parts:
        named = f"{', '.join(part.names)} ({part.place})" if part.names else part.place
        print(f"\n{named}: {part.seen:,} of {len(part.counts):,} samples seen, {part.total:,} times in all")
        for times, samples in part.histogram.items():
            print(f"  {'never' if not times else f'{times:,} times':>12}  {samples:,} samples")
        if part.excluded:
            print(f"  {part.excluded:,} samples were excluded, for some of the time at least")
    if found.traces:
        print()
    for trace in found.traces:
        _print_trace(trace, found, names)
    if len(found.traces) > 1:
        seen = sum(trace.times > 0 for trace in found.traces)
        print(f"{seen:,} of {len(found.traces):,} entries were seen, {len(found.traces) - seen:,} never")
    _print_notes(found.notes)


def _print_trace(trace: Trace, found: Consumed, names: Sequence[str]) -> None:
    if not trace.samples:
        print(f"{trace.entry}: never seen: no sample of this data is named so")
        return
    what = f"seen {trace.times:,} times" if trace.times else "never seen"
    print(f"{trace.entry}: {what}")
    for sample in trace.samples[:_SAMPLES_SHOWN]:
        print(
            f"  {sample.key}, id {sample.id}, {sample.shard}: {_where(sample, names, several=len(found.runs) > 1)}"
        )
    if len(trace.samples) > _SAMPLES_SHOWN:
        print(f"  and {len(trace.samples) - _SAMPLES_SHOWN:,} more samples (--json has all)")


def _where(sample: SampleTrace, names: Sequence[str], *, several: bool) -> str:
    said = []
    for what, places in (("seen", sample.steps), ("excluded", sample.excluded), ("skipped", sample.skipped)):
        steps = [f"{names[run]} {step}" if several else f"{step}" for run, step in places[:_STEPS_SHOWN]]
        more = f" and {len(places) - _STEPS_SHOWN:,} more" if len(places) > _STEPS_SHOWN else ""
        if steps:
            said.append(f"{what} at step{'s' if len(places) > 1 else ''} {', '.join(steps)}{more}")
    return "; ".join(said) or "not met"


def _as_json(found: Consumed, names: Sequence[str]) -> dict[str, Any]:
    parts = [
        {
            "names": part.names,
            "place": part.place,
            "samples": len(part.counts),
            "seen": part.seen,
            "total": part.total,
            "histogram": part.histogram,
            "excluded": part.excluded,
        }
        for part in found.parts
    ]
    return {
        "runs": [{"checkpoint": name, **asdict(run)} for name, run in zip(names, found.runs, strict=True)],
        "parts": parts,
        "traces": [{**asdict(trace), "times": trace.times} for trace in found.traces],
        "notes": found.notes,
    }


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"note: {note}")


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:,.4g} TB"


if __name__ == "__main__":
    sys.exit(main())
