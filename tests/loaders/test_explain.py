"""Asking the past: what `samples_at` and `consumed` say is what runs recorded, through kills, resumes and changes; and what an epoch would do."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from loaders import ImageTransform, LlavaText, Mixture, StreamingLoader
from loaders import outlook as outlook_module
from loaders.dataset import Dataset, Part
from loaders.explain import consumed, explain_epoch, main, read_state, samples_at
from loaders.text import ByteTokenizer
from shardify.errors import FormatError, ShardifyError, StateError, UsageError
from shardify.format.index import INDEX_DTYPE
from shardify.format.shards import ShardFile, ShardSet, open_shards
from tests.loaders.tars import record, write_tars

TEXT = LlavaText(ByteTokenizer())


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def image(number):
    return b"\x89PNG\r\n\x1a\n" + number.to_bytes(4, "big") * 99


def tars(folder, count, cuts, **options):
    """Samples with none, one or two images, of 2 to 16 words; sample n has the key and the id of n."""
    samples = [([image(n + i) for i in range(n % 3)], record(n, n % 3)) for n in range(count)]
    return write_tars(folder, samples, cuts, **options)


def grow(folder, whole, shards):
    """The next shards of a data set come into a folder."""
    folder.mkdir(exist_ok=True)
    for shard in shards:
        shutil.copy(whole / f"{shard:03}.tar", folder)
    return folder


@pytest.fixture
def data(tmp_path):
    return tars(tmp_path / "data", 90, [20, 20, 55])


@pytest.fixture
def other(tmp_path):
    return tars(tmp_path / "other", 40, [11])


class Run:
    """A run that is taken up again and again, and its record: step -> rank -> [(key, position), ...] of what was handed out."""

    def __init__(self):
        self.state = None
        self.record = {}
        self.states = {}

    def go(self, shards, steps, *, world=1, back=0, **options):
        """Hand out `steps` batches on all ranks, die, and forget the last `back` of them: they came after the checkpoint."""
        options = {"num_workers": 0, "text": TEXT, **options}
        ranks = [StreamingLoader(shards, rank=rank, world_size=world, **options) for rank in range(world)]
        for loader in ranks:
            if self.state is not None:
                loader.load_state_dict(json.loads(json.dumps(self.state)))
        numbers = []
        while len(numbers) < steps:
            step = ranks[0].state_dict()["step"] + 1
            epoch = ranks[0].epoch
            batches = [next(iter(loader), None) for loader in ranks]
            if batches[0] is None:  # nothing was left of the epoch
                assert set(batches) == {None}
                assert ranks[0].epoch == epoch + 1
                continue
            self.record[step] = [
                [(key, int(at)) for key, at in zip(batch.keys, batch.positions, strict=True) if key]
                for batch in batches
            ]
            self.states[step] = batches[0].state
            assert all(batch.state == batches[0].state for batch in batches)
            numbers.append(step)
        kept = numbers[: len(numbers) - back]
        for step in numbers[len(kept) :]:
            del self.record[step], self.states[step]
        if kept:
            self.state = self.states[kept[-1]]
        for loader in ranks:
            loader.close()
        return self

    def counts(self, *, prefix=""):
        """Number of the sample -> how often it was handed out, of one part."""
        keys = [key for ranks in self.record.values() for batch in ranks for key, _ in batch]
        return Counter(int(key[len(prefix) :]) for key in keys if key.startswith(prefix))

    def steps_of(self, key):
        return [
            step
            for step, ranks in sorted(self.record.items())
            for batch in ranks
            for k, _ in batch
            if k == key
        ]


def check(run, **options):
    """Every step as it was recorded, from the last state; returns all that `samples_at` says."""
    found = {}
    for step, ranks in run.record.items():
        told = found[step] = samples_at(run.state, step, **options)
        assert (told.step, told.world_size, told.future, told.skipped) == (step, len(ranks), False, None)
        for rank, batch in enumerate(ranks):
            own = [(s.key, s.position) for s in told.samples if s.rank == rank and not s.excluded]
            assert own == batch
        alone = samples_at(run.state, step, len(ranks) - 1, **options)
        assert alone.samples == tuple(s for s in told.samples if s.rank == len(ranks) - 1)
    return found


def counted(part):
    return {number: int(times) for number, times in enumerate(part.counts.tolist()) if times}


PLANS = {
    "plain": {},
    "full": {"shuffle": "full"},
    "sequential": {"shuffle": None},
    "groups": {"group_by": "modality", "plan_window": 32},
    "lengths": {"group_by": "modality_length", "plan_window": 48},
    "packs": {"pack_tokens": 300, "plan_window": 40},
    "packed groups": {"pack_tokens": 300, "group_by": "modality", "plan_window": 64, "image_tokens": 9},
    "budget": {"max_tokens": 900, "plan_window": 40},
    "tiles": {"max_tiles": 5, "plan_window": 40, "image_tokens": 3},
    "budget groups": {"max_tokens": 900, "max_tiles": 9, "group_by": "length", "plan_window": 40},
    "train side": {"split": "train", "validation": 0.2, "max_samples": 70},
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_run_with_kills_and_changed_shapes_is_told_exactly(data, plan):
    options = {**PLANS[plan], "block": 4, "lanes": 8}
    run = Run()
    run.go(data, 5, world=2, batch_size=4, back=2, **options)
    run.go(data, 4, world=3, batch_size=2, drop_last=True, **options)
    run.go(data, 3, world=3, batch_size=2, drop_last=True, back=3, **options)
    run.go(data, 9, world=1, batch_size=5, skip=[(9, 11)], **options)
    run.go(data, 30, world=2, batch_size=3, back=1, **options)
    assert run.state["epoch"] >= 1
    told = check(run)
    shards = {f"{number:09}": shard for number, shard in ((0, "000"), (19, "000"), (20, "002"), (89, "003"))}
    for sample in (sample for step in told.values() for sample in step.samples):
        number = int(sample.key)
        assert json.loads(sample.id) == f"id{number}"
        assert sample.images == number % 3
        if sample.key in shards:
            assert Path(sample.shard).stem == shards[sample.key]
        with open(sample.shard, "rb") as file:
            file.seek(sample.offset)
            assert file.read(100).startswith(sample.key.encode())
            file.seek(sample.offset)
            assert f'"id{number}"'.encode() in file.read(sample.size)
    result = consumed([run.state], ids=["id7", "id50"])
    assert counted(result.parts[0]) == run.counts()
    for trace, key in zip(result.traces, ("000000007", "000000050"), strict=True):
        steps = run.steps_of(key)
        assert trace.times == len(steps)
        assert [step for sample in trace.samples for _, step in sample.steps] == steps
    assert result.runs[0].steps == len(run.record)
    assert result.runs[0].samples == run.counts().total()


def test_skips_and_exclusions_are_not_seen(tmp_path, data):
    lists = [tmp_path / f"{name}.txt" for name in ("first", "second")]
    lists[0].write_text("id3\nid4\n")
    lists[1].write_text("id3\nid60\nhttps://example.org/none.jpg\n")
    run = Run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.go(data, 14, batch_size=8)
        run.go(data, 14, batch_size=8, exclude=lists[0], skip=[(16, 19), (21, 22)])
        run.go(data, 14, batch_size=4, world=2, exclude=lists[1], skip=[(2, 30)], back=2)
    assert run.state["skipped"] == [[16, 19], [21, 22]]
    check(run)
    result = consumed([run.state], ids=["id3", "id60", "id4", "nobody"], exclude=lists[1])
    assert counted(result.parts[0]) == run.counts()
    assert not result.notes
    for trace, number in zip(result.traces[:3], (3, 60, 4), strict=True):
        (sample,) = trace.samples
        assert [step for _, step in sample.steps] == run.steps_of(f"{number:09}")
        assert trace.times < 4
        stood = sorted(step for _, step in (*sample.steps, *sample.excluded, *sample.skipped))
        assert len(stood) == trace.times + len(sample.excluded) + len(sample.skipped)
        # in each of its epochs a sample stands once
        assert len(stood) in (3, 4)
    assert [trace.entry for trace in result.traces[3:]] == [
        "nobody",
        "id3",
        "id60",
        "https://example.org/none.jpg",
    ]
    assert result.traces[3].samples == () and result.traces[3].times == 0
    assert result.traces[4].samples == result.traces[0].samples
    assert result.runs[0].skipped[0] == 4
    # the steps that were left out say so; that before a stretch is also found by its state's number
    before = samples_at(run.state, 16)
    assert [samples_at(run.state, step).skipped for step in (17, 18, 22)] == [(17, 19), (17, 19), None]
    jumped = samples_at(run.state, 19)
    assert (jumped.step, jumped.samples) == (16, before.samples)
    assert run.states[16]["step"] == 19
    assert "17 to 19 were skipped" in jumped.notes[0]


def test_an_exclusion_list_that_is_gone_proves_nothing(tmp_path, data):
    (tmp_path / "list.txt").write_text("id3\n")
    run = Run().go(data, 12, batch_size=8, exclude=tmp_path / "list.txt")
    assert consumed([run.state], ids=["id3"]).traces[0].times == 0
    # another list under the same name, on a machine that has kept nothing
    (tmp_path / "list.txt").write_text("id4\n")
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(tmp_path / "elsewhere")}):
        result = consumed([run.state], ids=["id3"])
        assert result.traces[0].times == 1
        assert "counts as seen" in result.notes[0]
        (tmp_path / "moved.txt").write_text("id3\n")
        result = consumed([run.state], exclude=tmp_path / "moved.txt")
        assert result.traces[0].times == 0
        assert not result.notes


def test_a_mixture_whose_parts_change(tmp_path, data, other):
    third = tars(tmp_path / "third", 25, [])
    run = Run()
    options = {"batch_size": 6, "lanes": 8, "block": 4}
    run.go(Mixture({"a": (data, 1), "b": (other, 0.5)}), 13, **options)
    run.go(Mixture({"a": (data, "1/3"), "b": (other, 2), "c": (third, 1)}), 9, **options, back=1)
    run.go(Mixture({"b": (other, 3), "c": (third, 2)}, weights=True), 9, world=2, **options)
    run.go(Mixture({"a": (data, 1), "c": (third, 1)}), 30, **options, back=4)
    check(run)
    result = consumed([run.state], ids=["id5"])
    places = {"a": data, "b": other, "c": third}
    assert {part.names: part.place for part in result.parts} == {
        (name,): str(path) for name, path in places.items()
    }
    for part in result.parts:
        assert counted(part) == run.counts(prefix=f"{part.names[0]}/")
    (trace,) = result.traces
    assert {sample.part for sample in trace.samples} == {0, 1, 2}
    steps = [step for sample in trace.samples for _, step in sample.steps]
    assert sorted(steps) == sorted(step for name in places for step in run.steps_of(f"{name}/000000005"))
    # parts may have moved, all of them
    moved = {}
    for name, path in places.items():
        moved[name] = path.rename(tmp_path / f"moved {name}")
    with pytest.raises(StateError, match=r"part 'a'.* not found.* no such"):
        consumed([run.state])
    now = Mixture({name: (path, 1) for name, path in moved.items()})
    again = consumed([run.state], shards=now)
    assert [counted(part) for part in again.parts] == [counted(part) for part in result.parts]
    check(run, shards=now)


def test_data_that_grew_while_the_run_went_on(tmp_path):
    whole = tars(tmp_path / "whole", 80, [20, 40, 70])
    folder = grow(tmp_path / "growing", whole, range(2))
    run = Run().go(folder, 4, batch_size=7)
    grow(folder, whole, [2])
    run.go(folder, 12, batch_size=7, world=2)
    grow(folder, whole, [3])
    run.go(folder, 22, batch_size=5)
    assert run.state["epoch"] >= 2
    check(run)
    (part,) = consumed([run.state]).parts
    assert counted(part) == run.counts()
    assert len(part.counts) == 80


def test_a_mixture_that_grew(tmp_path, other):
    whole = tars(tmp_path / "whole", 70, [20, 40])
    folder = grow(tmp_path / "growing", whole, range(2))
    mixture = Mixture({"grows": (folder, 1.5), "stays": (other, 1)})
    run = Run().go(mixture, 9, batch_size=7)
    grow(folder, whole, [2])
    run.go(mixture, 40, batch_size=7, world=2)
    check(run)
    result = consumed([run.state])
    for part in result.parts:
        assert counted(part) == run.counts(prefix=f"{part.names[0]}/")


def test_stages_add_up_and_states_of_one_run_do_not(data, other):
    one = Run().go(data, 8, batch_size=8)
    early = one.state
    one.go(data, 9, batch_size=5)
    two = Run().go(Mixture({"x": (data, 1), "y": (other, 1)}), 20, batch_size=6, seed=3)
    result = consumed([early, two.state, one.state], ids=["id9"])
    assert [run.part_of for run in result.runs] == [2, None, None]
    shared, alone = result.parts
    assert (shared.names, alone.names) == (("x",), ("y",))
    assert counted(shared) == one.counts() + two.counts(prefix="x/")
    assert counted(alone) == two.counts(prefix="y/")
    in_data = next(sample for sample in result.traces[0].samples if sample.part == 0)
    expected = [(1, step) for step in two.steps_of("x/000000009")] + [
        (2, step) for step in one.steps_of("000000009")
    ]
    assert list(in_data.steps) == expected
    assert [run.part_of for run in consumed([early, early]).runs] == [None, 0]


def test_steps_to_come_are_planned_on(data):
    run = Run().go(data, 5, batch_size=8, group_by="length", plan_window=32)
    state = run.state
    run.go(data, 25, batch_size=8, group_by="length", plan_window=32, skip=[(20, 22)])
    for step in (6, 12, 13, 20, 23, 30):
        told = samples_at(state, step)
        assert told.future
        if step in run.record:
            assert [(sample.key, sample.position) for sample in told.samples] == run.record[step][0]


def test_token_counts_that_are_not_here(tmp_path, data):
    run = Run().go(data, 4, batch_size=3, pack_tokens=300, plan_window=40)
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(tmp_path / "elsewhere")}):
        for ask in (lambda **kw: samples_at(run.state, 2, **kw), lambda **kw: consumed([run.state], **kw)):
            with pytest.raises(UsageError, match="token counts are needed as the run had them"):
                ask()
        with pytest.raises(UsageError, match="makes other tokens"):
            samples_at(run.state, 2, text=LlavaText(ByteTokenizer(), template="plain"))
        check(run, text=TEXT)
        check(run)  # which are kept now


def test_batches_that_depend_on_tiles(tmp_path, made):
    samples = []
    for number in range(60):
        pictures = [made.png(number + place) for place in range(number % 3)]
        samples.append(made.Made(pictures, made.record(number, len(pictures))))
    data = made.write(tmp_path / "tiled", samples, shards=3)
    anyres = ImageTransform(8, fit="anyres", grid_pinpoints=[(16, 8), (8, 16), (16, 16)])
    options = {"image": anyres, "max_tiles": 9, "plan_window": 32}
    run = Run().go(data, 6, **options).go(data, 9, world=2, batch_size=3, **options)
    check(run)
    assert counted(consumed([run.state]).parts[0]) == run.counts()
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(tmp_path / "elsewhere")}):
        with pytest.raises(UsageError, match="tile counts are needed"):
            consumed([run.state])
        with pytest.raises(UsageError, match="makes other tiles"):
            consumed([run.state], image=ImageTransform(8, fit="anyres", grid_pinpoints=[(16, 8)]))
        check(run, image=anyres)


def test_other_shards_are_refused(tmp_path, data, other):
    run = Run().go(data, 4, batch_size=3)
    with pytest.raises(StateError, match=r"not found: .*other: other shards"):
        data.rename(tmp_path / "gone")
        samples_at(run.state, 2, shards=other)
    check(run, shards=tmp_path / "gone")


def test_a_past_that_does_not_add_up_is_refused(data):
    run = Run().go(data, 4, batch_size=3)
    with pytest.raises(StateError, match="planned again 12"):
        consumed([{**run.state, "samples": 13}])
    for wrong in ({"version": 99}, {"order_version": 0}, {"history": []}, {"data": {}}, {"settings": {}}):
        with pytest.raises(StateError):
            samples_at({**run.state, **wrong}, 2)
    for step in (0, -3, "2"):
        with pytest.raises(UsageError, match="step"):
            samples_at(run.state, step)
    with pytest.raises(UsageError, match="rank 1: the run had ranks 0 to 0"):
        samples_at(run.state, 2, 1)


def start_rank(given):
    """A process of its own, forked, that hands out batches and writes down what they are until it is killed."""
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        parts = {name: (path, rate) for name, (path, rate) in given["parts"].items()}
        loader = StreamingLoader(
            Mixture(parts), text=TEXT, num_workers=1, rank=given["rank"], world_size=given["world"],
            batch_size=given["batch"], pack_tokens=300, plan_window=40,
        )  # fmt: skip
        if given["state"]:
            loader.load_state_dict(given["state"])
        with open(given["out"], "w") as out:
            while True:
                for batch in loader:
                    samples = [(k, int(p)) for k, p in zip(batch.keys, batch.positions, strict=True) if k]
                    out.write(json.dumps({"samples": samples, "state": batch.state}) + "\n")
                    out.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def test_real_processes_that_are_killed(tmp_path, data, other):
    run = Run()
    parts = {"a": (str(data), 1), "b": (str(other), 0.5)}
    for leg, (world, batch, steps) in enumerate([(2, 2, 5), (3, 1, 4), (1, 3, 30)]):
        outs = [tmp_path / f"{leg}-{rank}.jsonl" for rank in range(world)]
        ranks = []
        for rank, out in enumerate(outs):
            given = {
                "parts": parts,
                "rank": rank,
                "world": world,
                "batch": batch,
                "state": run.state,
                "out": str(out),
            }
            ranks.append(start_rank(given))
        try:
            deadline = time.monotonic() + 120
            while not all(out.exists() and out.read_bytes().count(b"\n") >= steps for out in outs):
                assert time.monotonic() < deadline
                assert not any(os.waitpid(rank, os.WNOHANG)[0] for rank in ranks)
                time.sleep(0.05)
        finally:
            for rank in ranks:
                with suppress(ProcessLookupError, ChildProcessError):
                    os.killpg(rank, signal.SIGKILL)
                    os.waitpid(rank, 0)
        lines = [
            [json.loads(line) for line in out.read_text().splitlines(keepends=True) if line.endswith("\n")]
            for out in outs
        ]
        kept = min(map(len, lines)) - leg  # the checkpoint was written some steps ago
        for step in zip(*(rank[:kept] for rank in lines), strict=True):
            assert all(line["state"] == step[0]["state"] for line in step)
            run.state = step[0]["state"]
            run.record[run.state["step"]] = [[tuple(sample) for sample in line["samples"]] for line in step]
    assert sorted(run.record) == list(range(1, run.state["step"] + 1))
    some = dict(list(run.record.items())[:40])
    whole, run.record = run.record, some
    check(run)
    run.record = whole
    for part in consumed([run.state]).parts:
        assert counted(part) == run.counts(prefix=f"{part.names[0]}/")


# states in checkpoints


def test_states_in_checkpoints(tmp_path, data, capsys):
    run = Run().go(data, 4, batch_size=3)
    holding = {"model": {"w": torch.zeros(3, 5)}, "step": 4, "trainer": {"loaders": [{"loader": run.state}]}}
    torch.save(holding, tmp_path / "new.pt")
    torch.save(holding, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.json").write_text(json.dumps(run.state, indent=1))
    (tmp_path / "inside.json").write_text(json.dumps([1, {"a": [run.state, run.state]}]))
    for name in ("new.pt", "old.pt", "bare.json", "inside.json"):
        assert read_state(tmp_path / name) == run.state
        assert main([str(tmp_path / name), "--step", "2"]) == 0
        assert capsys.readouterr().out.count("\n0\t") == 3
    later = {**run.state, "seed": 5}
    torch.save({"train": {"loader": run.state}, "eval": later}, tmp_path / "two.pt")
    with pytest.raises(UsageError, match=r"several loader states; there are train.loader, eval; .*--state"):
        read_state(tmp_path / "two.pt")
    assert read_state(tmp_path / "two.pt", "eval") == later
    with pytest.raises(UsageError, match="no loader state at 'test'"):
        read_state(tmp_path / "two.pt", "test")


class Refused:
    pass


def test_files_that_hold_no_state(tmp_path, data, capsys):
    (tmp_path / "broken.json").write_text('{"a": ')
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise.pt").write_bytes(b"\x80\x02noise")
    torch.save({"a": Refused()}, tmp_path / "object.pt")
    status = {}
    for name in ("broken.json", "empty.json", "empty", "noise.pt", "object.pt", "missing", "."):
        with pytest.raises(ShardifyError) as caught:
            read_state(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert isinstance(caught.value, FormatError | UsageError)
        status[name] = main([str(tmp_path / name), "--step", "1"])
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("explain: ")
        assert said.err.count("\n") == 1
    assert status == {
        "broken.json": 1,
        "empty.json": 2,
        "empty": 1,
        "noise.pt": 1,
        "object.pt": 1,
        "missing": 1,
        ".": 2,
    }


def test_the_checkpoint_of_the_training_script(tmp_path, data, capsys):
    """As train.py writes it."""
    run = Run().go(data, 6, batch_size=4, world=2)
    path = tmp_path / "step-000000006.pt"
    parts = {
        "parameters": {"w": torch.ones(9)},
        "optimizer": {"state": {}, "param_groups": []},
        "loader": run.state,
    }
    torch.save({"model": "tiny", "stage": "pretrain", **parts, "step": 6}, path)
    command = [sys.executable, "-m", "loaders.explain"]
    done = subprocess.run(
        [*command, path, "--step", "3", "--rank", "1", "--json"], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert [(sample["key"], sample["position"]) for sample in told["samples"]] == run.record[3][1]
    done = subprocess.run(
        [*command, "consumed", path, "--id", "id8", "--json"], capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    assert told["parts"][0]["total"] == 48
    assert [step for _, step in told["traces"][0]["samples"][0]["steps"]] == run.steps_of("000000008")
    assert "Traceback" not in done.stderr


def test_what_the_command_line_prints(tmp_path, data, other, capsys):
    run = Run().go(data, 30, batch_size=8, skip=[(13, 15)])
    checkpoint = tmp_path / "state.json"
    checkpoint.write_text(json.dumps(run.state))
    (tmp_path / "list.txt").write_text(f"id3\n{xxhash.xxh3_64_hexdigest(image(5))}\nnobody\n")
    assert main(["consumed", str(checkpoint), "--id", "id4", "--exclude", str(tmp_path / "list.txt")]) == 0
    said = capsys.readouterr().out
    assert f"{checkpoint}: {run.counts().total():,} samples in 30 steps, 2 epochs finished" in said
    assert "2 steps were skipped, with 16 samples" in said
    for number in (3, 4):
        steps = run.steps_of(f"{number:09}")
        assert f"id{number}: seen {len(steps)} times" in said
    assert "nobody: never seen: no sample of this data is named so" in said
    assert "3 of 4 entries were seen, 1 never" in said
    assert main([str(checkpoint), "--step", "14"]) == 0
    assert "steps 14 to 15 were skipped" in capsys.readouterr().out
    assert main([str(checkpoint), "--step=40"]) == 0
    assert (
        "The checkpoint is of step 32: this is what a run that goes on unchanged will see."
        in capsys.readouterr().out
    )
    data.rename(tmp_path / "moved")
    assert main([str(checkpoint), "--step", "2"]) == 1
    assert "--shards" in capsys.readouterr().err
    assert main([str(checkpoint), "--step", "2", "--shards", str(tmp_path / "moved")]) == 0
    said = capsys.readouterr().out
    assert [line.split("\t")[3] for line in said.splitlines()[3:]] == [key for key, _ in run.record[2][0]]


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["{data}"], 2, "batch_size"),
        (["{data}", "--batch-size", "0"], 2, "batch_size=0"),
        (["{data}", "--batch-size", "2", "--world", "3", "--nodes", "2"], 2, "nodes=2"),
        (["{data}/none", "--batch-size", "2"], 1, "no such shard"),
        (["{data}", "--batch-size", "2", "--split", "train", "--validation", "2"], 2, "validation"),
        (["{data}/mix.yaml", "--batch-size", "2"], 2, "mix.yaml: cannot be read"),
        (["{data}", "--batch-size", "2", "--exclude", "{data}/none.txt"], 1, "none.txt"),
        (["{data}", "--batch-size", "2", "--group-by", "length", "--plan-window", "1"], 2, "plan_window=1"),
        (["consumed", "{data}/none.pt"], 1, "none.pt"),
    ],
)
def test_mistakes_are_one_line(data, capsys, arguments, status, said):
    open_shards(str(data), say=lambda _: None)  # which says that it indexes them
    assert main([argument.format(data=data) for argument in arguments]) == status
    shown = capsys.readouterr()
    assert shown.err.startswith("explain: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1


# what an epoch would do


@pytest.mark.parametrize(
    "plan", [name for name in PLANS if name not in ("packs", "packed groups", "budget", "budget groups")]
)
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("mixed", [False, True])
def test_an_epoch_does_what_was_said(data, other, plan, drop_last, mixed):
    shards = Mixture({"a": (data, 1.5), "b": (other, 1)}) if mixed else data
    options = {"batch_size": 3, "drop_last": drop_last, "block": 4, "lanes": 12, **PLANS[plan]}
    plan = explain_epoch(shards, world_size=4, nodes=2, epoch=1, num_workers=2, **options)
    ranks = [StreamingLoader(shards, rank=rank, world_size=4, num_workers=0, **options) for rank in range(4)]
    seen = []
    for loader in ranks:
        loader._state = loader._planner.next_epoch(loader._state)
        batches = []
        for batch in loader._planner.batches(loader._state):
            if batch.epoch > 1:
                break
            batches.append(batch)
        seen.append(batches)
    assert plan.batches == len(seen[0]) == len(ranks[0])
    assert plan.batches_per_worker == -(-plan.batches // 2)
    sums = {
        name: [sum(int(getattr(batch.index, column).sum()) for batch in batches) for batches in seen]
        for name, column in (("bytes", "size"), ("words", "words"), ("images", "images"))
    }
    sums["samples"] = [sum(len(batch.samples) for batch in batches) for batches in seen]
    for name, own in sums.items():
        spread = getattr(plan, name)
        assert (spread.least, spread.most) == (min(own), max(own))
        assert spread.mean == pytest.approx(np.mean(own))
    fillers = [int((batch.positions < 0).sum()) for batches in seen for batch in batches]
    assert plan.fillers == sum(fillers)
    assert plan.dropped == plan.positions - sum(sums["samples"])
    extents = [
        {
            extent
            for batches in node
            for batch in batches
            for extent in zip(
                batch.index.shard.tolist(),
                batch.index.extent_begin.tolist(),
                batch.index.extent_end.tolist(),
                strict=True,
            )
        }
        for node in (seen[:2], seen[2:])
    ]
    assert (plan.requests.least, plan.requests.most) == (min(map(len, extents)), max(map(len, extents)))
    fetched = sum(end - begin for node in extents for _, begin, end in node)
    assert plan.fetched_over_used == pytest.approx(fetched / sum(sums["bytes"]))
    assert plan.shards_touched == len({shard for node in extents for shard, _, _ in node})
    streams = [np.concatenate([batch.samples for batch in batches]) for batches in seen]
    apart = np.concatenate([np.abs(np.diff(stream)) for stream in streams])
    assert plan.neighbour_distance == pytest.approx(apart.mean() / plan.data_samples)
    same = np.concatenate([np.diff(stream // 4) == 0 for stream in streams])
    assert plan.neighbours_in_block == pytest.approx(same.mean())
    if drop_last is False:
        order = ranks[0]._planner.order(ranks[0]._state).samples(np.arange(plan.positions))
        assert plan.correlation == pytest.approx(np.corrcoef(np.arange(len(order)), order)[0, 1], abs=1e-9)
    assert plan.looked_at == plan.positions
    if "group" not in str(options):
        words = [[int(batch.index.words.sum()) for batch in step] for step in zip(*seen, strict=True)]
        ratios = [max(step) / np.mean(step) for step in words if sum(step)]
        assert plan.step_imbalance == pytest.approx(np.mean(ratios))


def test_excluded_samples_and_tokens_in_an_epoch(tmp_path, data):
    (tmp_path / "list.txt").write_text("id3\nid4\n")
    plan = explain_epoch(data, batch_size=8, exclude=tmp_path / "list.txt")
    assert (plan.excluded, plan.samples.most) == (2, 88)
    packed = explain_epoch(data, batch_size=2, pack_tokens=300, text=TEXT)
    assert packed.batches == len(
        StreamingLoader(data, batch_size=2, pack_tokens=300, text=TEXT, num_workers=0)
    )
    with pytest.raises(UsageError, match="text="):
        explain_epoch(data, batch_size=2, pack_tokens=300)


def made_index(samples, shards):
    rng = np.random.default_rng(1)
    index = np.zeros(samples, INDEX_DTYPE)
    cuts = np.linspace(0, samples, shards + 1).astype(np.int64)
    index["size"] = rng.integers(1, 90, samples) * 512
    index["shard"] = np.repeat(np.arange(shards), np.diff(cuts))
    ends = np.concatenate([[0], np.cumsum(index["size"].astype(np.int64))])
    index["offset"] = ends[:-1] - np.repeat(ends[cuts[:-1]], np.diff(cuts))
    index["words"] = rng.lognormal(4, 1, samples)
    index["images"] = rng.random(samples) < 0.7
    files = tuple(ShardFile(f"{n}.tar", "", int(size), 0, "") for n, size in enumerate(np.diff(cuts)))
    return ShardSet(files, index, cuts)


@pytest.mark.parametrize(
    "options", [{}, {"shuffle": "full"}, {"group_by": "modality_length", "plan_window": 4096}], ids=str
)
def test_a_large_epoch_is_estimated_and_says_so(monkeypatch, options):
    shards = made_index(400_000, 37)
    monkeypatch.setattr(
        outlook_module, "open_dataset", lambda _, *, block, **__: Dataset([Part("", shards)], block=block)
    )
    options = {"batch_size": 16, "world_size": 8, "nodes": 2, "block": 8, "window": 4, **options}
    exact = explain_epoch("made", **options)
    assert exact.looked_at == exact.positions == 400_000
    assert not exact.notes
    monkeypatch.setattr(outlook_module, "_MOST", 100_000)
    monkeypatch.setattr(outlook_module, "_MOST_PLANNED", 200)
    some = explain_epoch("made", **options)
    assert 50_000 < some.looked_at <= 110_000
    assert "stretches" in some.notes[-1]
    assert some.batches == pytest.approx(exact.batches, rel=0.02)
    for name in ("samples", "bytes", "words", "images", "requests", "bytes_fetched"):
        assert getattr(some, name).mean == pytest.approx(getattr(exact, name).mean, rel=0.03)
    assert some.fetched_over_used == pytest.approx(exact.fetched_over_used, rel=0.03)
    assert some.step_imbalance == pytest.approx(exact.step_imbalance, rel=0.05)
    assert some.neighbour_distance == pytest.approx(exact.neighbour_distance, rel=0.1)
    if not options.get("group_by"):
        assert some.fillers == exact.fillers


def test_what_the_command_line_prints_of_an_epoch(tmp_path, data, other, capsys):
    (tmp_path / "mix.yaml").write_text(
        "parts:\n  a: {shards: data, repeat: 2}\n  b: {shards: other, repeat: 1/2}\n"
    )
    command = [str(tmp_path / "mix.yaml"), "--world", "3", "--workers", "2", "--batch-size", "5"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "Epoch 0: 200 samples (130 in the data), 3 ranks, global batches of 15" in said
    assert "14 a rank, 7 a worker" in said
    assert "3 ranks do not divide the 64 lanes" in said
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["batches"] == 14


# chains of any runs, planned alone


@st.composite
def legs(draw):
    world = draw(st.integers(1, 5))
    return {
        "world": world,
        "batch_size": draw(st.integers(1, 30 // world)),
        "drop_last": draw(st.booleans()),
        "steps": draw(st.integers(0, 12)),
        "skip": draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), max_size=2)),
    }


@pytest.mark.long
@settings(max_examples=20)
@given(
    plan=st.sampled_from(sorted(set(PLANS) - {"train side"})),
    runs=st.lists(legs(), min_size=1, max_size=5),
    rates=st.sampled_from([None, ("1", "1"), ("1/2", "3"), ("0.3", "0.7")]),
    seed=st.integers(0, 99),
)
def test_any_chain_is_told_exactly(plan, runs, rates, seed):
    rng = np.random.default_rng(seed)
    sets = [made_index(int(rng.integers(5, 300)), int(rng.integers(1, 6))) for _ in range(2)]
    excluded = np.flatnonzero(rng.random(len(sets[0].index)) < 0.1)
    names = ["a", "b"] if rates else [""]
    mixture = (
        Mixture({name: (name, rate) for name, rate in zip(names, rates, strict=True)}) if rates else None
    )
    parts = [Part(name, shards) for name, shards in zip(names, sets, strict=False)]
    parts[0] = Part(parts[0].name, parts[0].shards, excluded=excluded)
    tokens = [rng.integers(1, 200, part.samples).astype(np.int32) for part in parts]

    class Text:
        fingerprint = "made up"
        pad_token_id = 0

    def dataset(_shards=None, *, block=32, **_):
        return Dataset(parts, mixture=mixture, block=block, exclusions="digest")

    def lengths(dataset, _text, *, image_tokens):
        from loaders.lengths import Lengths

        return Lengths(dataset, tuple(tokens), image_tokens)

    def opened(place):
        return sets[names.index(place)] if place in names else sets[0]

    state, recorded = None, {}
    with (
        mock.patch("loaders.loader.open_dataset", dataset),
        mock.patch("loaders.loader.token_lengths", lengths),
        mock.patch("loaders.history.token_lengths", lengths),
        mock.patch("loaders.history.open_shards", opened),
        mock.patch(
            "loaders.history.kept_excluded",
            lambda shards, _: (
                excluded
                if shards is sets[0] or len(shards.index) == len(sets[0].index)
                else np.zeros(0, np.int64)
            ),
        ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        for leg in runs:
            shape = {name: leg[name] for name in ("batch_size", "drop_last")}
            shape["skip"] = [(begin, begin + length) for begin, length in leg["skip"]]
            ranks = [
                StreamingLoader(
                    mixture or "",
                    rank=rank,
                    world_size=leg["world"],
                    num_workers=0,
                    text=Text(),
                    seed=seed,
                    **shape,
                    **PLANS[plan],
                )
                for rank in range(leg["world"])
            ]
            for loader in ranks:
                if state is not None:
                    loader.load_state_dict(json.loads(json.dumps(state)))
            streams = [loader._planner.batches(loader._state) for loader in ranks]
            for _ in range(leg["steps"]):
                batches = [next(stream, None) for stream in streams]
                if batches[0] is None:
                    break
                recorded[batches[0].step + 1] = batches
                state = batches[0].state
        if state is None:
            return
        some = rng.permutation(sorted(recorded))[:6].tolist()
        for step, batches in ((step, recorded[step]) for step in some):
            with mock.patch(
                "loaders.past._names", lambda _, samples, __: [(str(n), None) for n in samples.tolist()]
            ):
                told = samples_at(state, step, text=Text())
            for rank, batch in enumerate(batches):
                own = [sample for sample in told.samples if sample.rank == rank]
                assert [sample.position for sample in own] == batch.positions[batch.positions >= 0].tolist()
                assert [int(sample.key) for sample in own] == batch.samples.tolist()
                assert [sample.row for sample in own] == batch.rows[batch.positions >= 0].tolist()
                assert [sample.excluded for sample in own] == batch.index.excluded.tolist()
        result = consumed([state], text=Text())
        expected = Counter()
        for batches in recorded.values():
            for batch in batches:
                expected.update(batch.samples[~batch.index.excluded].tolist())
        told = Counter()
        for part in result.parts:
            first = dataset().starts[names.index(part.names[0] if part.names else "")]
            told.update({int(first) + number: times for number, times in counted(part).items()})
        assert told == expected
        skipped = {
            n for begin, end in state["skipped"] for n in range(begin + 1, min(end, state["step"]) + 1)
        }
        assert set(recorded) | skipped == set(range(1, state["step"] + 1))
        assert not set(recorded) & skipped
