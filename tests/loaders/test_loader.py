"""StreamingLoader with real processes: exact covers, resumption, slabs, and what goes wrong."""

import copy
import gc
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed

from loaders import ImageTransform, LlavaText, StreamingLoader
from loaders.report import LoaderReport
from loaders.text import IMAGE_TOKEN, ByteTokenizer
from shardify.errors import LoaderError, ShardifyError, StateError, UsageError

IMAGE = ImageTransform(8)
TEXT = LlavaText(ByteTokenizer())


def make(data, *, batch_size=8, **options):
    return StreamingLoader(
        data, batch_size=batch_size, **{"image": IMAGE, "text": TEXT, "num_workers": 0, **options}
    )


def numbers(batches):
    return [int(key) for batch in batches for key in batch.keys if key]


def check_contents(batch):
    """Pixels, tokens and keys of one batch belong to the same samples."""
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (len(batch.image_samples), 3, 8, 8)
    for sample, pixels in zip(batch.image_samples.tolist(), batch.images, strict=True):
        number = int(batch.keys[sample])
        assert pixels.float().mean(dim=(1, 2)).tolist() == [number % 256, number // 256, 7]
    for row, (key, valid) in enumerate(zip(batch.keys, batch.valid.tolist(), strict=True)):
        assert valid == bool(key) == (batch.positions[row] >= 0)
        attended = batch.input_ids[row][batch.attention_mask[row]].tolist()
        text = TEXT.tokenizer.decode([t for t in attended if t >= 0])
        assert (f"What is {int(key)}? ASSISTANT: It is {int(key)}." in text) if valid else text == ""


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("shuffle", ["block", None])
def test_every_epoch_is_an_exact_cover(plain_data, workers, shuffle):
    loader = make(plain_data, num_workers=workers, shuffle=shuffle)
    orders = []
    for epoch in range(3):
        assert loader.epoch == epoch
        assert len(loader) == 13
        batches = list(loader)
        assert len(batches) == 13
        for batch in batches:
            check_contents(batch)
        orders.append(numbers(batches))
        assert sorted(orders[-1]) == list(range(103))
    assert loader.epoch == 3
    if shuffle is None:
        assert orders[0] == orders[1] == list(range(103))
    else:
        assert orders[0] != orders[1] != orders[2]
    assert loader.report().samples == 309
    assert not loader.report().faults


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_an_epoch_and_agree_on_its_state(plain_data, workers):
    ranks = [make(plain_data, num_workers=workers, rank=r, world_size=2) for r in range(2)]
    seen = []
    for _ in range(2):
        pairs = list(zip(*ranks, strict=True))
        assert len(pairs) == 7
        for one, other in pairs:
            assert len(one.keys) == len(other.keys)
            assert one.state == other.state
            check_contents(one)
            check_contents(other)
        seen.append(sorted(numbers(batch for pair in pairs for batch in pair)))
    assert seen == [list(range(103))] * 2
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_three_samples_on_eight_ranks(tmp_path, made):
    data = made.write(tmp_path, [made.ordinary(i) for i in range(3)], shards=1)
    seen = []
    for rank in range(8):
        with pytest.warns(UserWarning, match="3 samples for 8 ranks"):
            loader = make(data, batch_size=2, rank=rank, world_size=8)
        batches = list(loader)
        assert [len(batch.keys) for batch in batches] == [1]
        check_contents(batches[0])
        if not batches[0].valid.any():
            assert batches[0].input_ids.tolist() == [[TEXT.pad_token_id]]
            assert batches[0].labels.tolist() == [[-100]]
            assert batches[0].attention_mask.tolist() == [[True]]
            assert batches[0].images.shape == (0, 3, 8, 8)
        seen += numbers(batches)
    assert sorted(seen) == [0, 1, 2]


def test_break_and_a_second_for_continue(plain_data):
    loader = make(plain_data, num_workers=2)
    first = []
    for batch in loader:
        first.append(batch)
        if len(first) == 5:
            break
    assert len(loader) == 8
    assert loader.state_dict() == first[-1].state
    rest = list(loader)
    assert sorted(numbers(first + rest)) == list(range(103))
    assert loader.epoch == 1


def test_global_batch_size_and_drop_last(plain_data):
    ranks = [
        StreamingLoader(plain_data, global_batch_size=20, drop_last=True, num_workers=0, rank=r, world_size=2)
        for r in range(2)
    ]
    batches = [list(loader) for loader in ranks]
    assert [[len(batch.keys) for batch in rank] for rank in batches] == [[10] * 5] * 2
    assert len(set(numbers(batches[0] + batches[1]))) == 100
    assert ranks[0].epoch == 1


@pytest.mark.parametrize("drop_last", [False, True])
def test_an_epoch_without_batches_ends_at_once(tmp_path, made, plain_data, drop_last):
    if drop_last:
        loader = make(plain_data, batch_size=200, drop_last=True)
    else:
        with pytest.warns(UserWarning, match="no samples"):
            loader = make(made.write(tmp_path, [], shards=1))
    assert [len(list(loader)) for _ in range(3)] == [0, 0, 0]
    assert loader.epoch == 3
    assert loader.state_dict()["epoch"] == 3


def test_a_rest_too_short_for_a_batch_ends_its_epoch(plain_data):
    before = make(plain_data, batch_size=10)
    state = next(batch.state for i, batch in enumerate(before) if i == 8)
    loader = make(plain_data, batch_size=50, drop_last=True)
    loader.load_state_dict(state)
    assert [len(list(loader)) for _ in range(2)] == [0, 2]


@pytest.mark.parametrize(("world", "batch_size", "workers"), [(1, 7, 2), (3, 5, 0), (2, 40, 1)])
def test_a_state_continues_under_another_world_and_batch_size(plain_data, world, batch_size, workers):
    ranks = [make(plain_data, rank=r, world_size=2) for r in range(2)]
    seen, state = [], {}
    for pair, _ in zip(zip(*ranks, strict=True), range(3), strict=False):
        seen += numbers(pair)
        state = pair[0].state
    state = json.loads(json.dumps(state))  # as a checkpoint would keep it
    assert (state["epoch"], state["position"], state["start"]) == (0, 48, 0)
    resumed = [
        make(plain_data, batch_size=batch_size, num_workers=workers, rank=r, world_size=world)
        for r in range(world)
    ]
    for loader in resumed:
        loader.load_state_dict(state)
        taken_up = loader.state_dict()
        assert taken_up["history"][:-1] == state["history"]
        assert taken_up["history"][-1]["world_size"] == world
        assert taken_up == {**state, "start": 48, "history": taken_up["history"]}
    steps = list(zip(*resumed, strict=True))
    assert len(steps) == -(-(103 - 48) // (world * batch_size))
    seen += numbers(batch for step in steps for batch in step)
    assert sorted(seen) == list(range(103))
    # and the next epoch is the one that an uninterrupted run would see
    again = numbers(batch for step in zip(*resumed, strict=True) for batch in step)
    assert sorted(again) == list(range(103))
    for loader in resumed:
        loader.close()


def test_a_state_restores_a_loader_that_is_running(plain_data):
    loader = make(plain_data, num_workers=2)
    batches = list(loader)
    loader.load_state_dict(batches[3].state)
    assert loader.epoch == 0
    assert numbers(loader) == numbers(batches[4:])
    assert numbers(loader) == numbers(list(make_at(plain_data, loader_epoch=1)))


def make_at(data, *, loader_epoch):
    loader = make(data)
    loader.load_state_dict({**loader.state_dict(), "epoch": loader_epoch})
    return loader


def test_lanes_come_from_the_state(plain_data):
    eight = make(plain_data, batch_size=10, lanes=8, block=4)
    state = next(iter(eight)).state
    loader = make(plain_data, batch_size=10, block=4)
    loader.load_state_dict(state)
    assert numbers(loader) == numbers(eight)


def test_states_that_do_not_fit_are_refused(tmp_path, made, plain_data):
    other = made.write(tmp_path / "other", [made.ordinary(i) for i in range(20)], shards=2)
    loader = make(plain_data)
    with pytest.raises(StateError, match=r"2 shards of 20 samples; here are 5 shards of 103 samples"):
        loader.load_state_dict(make(other).state_dict())
    with pytest.raises(StateError, match=r"seed is 4 in the state, 0 here.*shuffle is 'full'.*block is 16"):
        loader.load_state_dict(make(plain_data, seed=4, shuffle="full", block=16).state_dict())
    assert len(list(loader)) == 13  # and the loader goes on as if nothing had been asked


def test_pixels_lie_in_slabs_that_are_used_again(plain_data):
    loader = make(plain_data, num_workers=2, prefetch=2)
    places = {batch.images.data_ptr() for _ in range(4) for batch in loader}
    assert len(places) <= 8  # prefetch * workers + 4, of 52 batches
    assert loader.report().overflowed == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_held_batches_never_change_and_never_block(plain_data, workers):
    loader = make(plain_data, num_workers=workers)
    held = [batch for _ in range(3) for batch in loader]
    copies = [batch.images.clone() for batch in held]
    for batch in loader:
        check_contents(batch)
    assert loader.report().overflowed >= 3 * 13 - 8
    for batch, copied in zip(held, copies, strict=True):
        assert torch.equal(batch.images, copied)
        check_contents(batch)
    tail = [batch.images[:2] for batch in held]  # a view keeps a slab as well
    del held, batch
    list(loader)
    assert all(torch.equal(view, copy[:2]) for view, copy in zip(tail, copies, strict=True))
    loader.close()
    assert all(torch.equal(view, copy[:2]) for view, copy in zip(tail, copies, strict=True))


def test_text_only_and_several_images(tmp_path, made):
    counts = [0, 3, 1, 0, 2, 1, 1, 0]
    samples = [
        made.Made([made.png(number)] * images, made.record(number, images))
        for number, images in enumerate(counts)
    ]
    loader = make(made.write(tmp_path, samples, shards=2), batch_size=3, shuffle=None, num_workers=1)
    batches = list(loader)
    for batch in batches:
        check_contents(batch)
        for sample, key in enumerate(batch.keys):
            images = counts[int(key)]
            assert batch.image_samples.tolist().count(sample) == images
            assert batch.input_ids[sample].tolist().count(IMAGE_TOKEN) == images
        assert batch.image_samples.tolist() == sorted(batch.image_samples.tolist())
    assert len(batches) == 3


def test_text_only_batches_have_no_images(tmp_path, made):
    samples = [made.Made([], made.record(number, 0)) for number in range(5)]
    (batch,) = make(made.write(tmp_path, samples, shards=1))
    assert batch.images.shape == (0, 3, 8, 8)
    assert batch.image_samples.shape == (0,)
    assert batch.valid.all()


@pytest.mark.parametrize("workers", [0, 2])
def test_without_image_and_text_the_bytes_remain(plain_data, made, workers):
    loader = StreamingLoader(
        plain_data, batch_size=25, shuffle=None, num_workers=workers, rank=1, world_size=2
    )
    batches = list(loader)
    for batch in batches:
        assert batch.input_ids is batch.labels is batch.attention_mask is None
        assert [len(batch.records), len(batch.keys)] == [len(batch.valid)] * 2
        for key, record in zip(batch.keys, batch.records, strict=True):
            assert record == (made.record(int(key)) if key else b"")
        for sample, data in zip(batch.image_samples.tolist(), batch.images, strict=True):
            assert data == made.png(int(batch.keys[sample]))
    assert not batches[-1].valid[-1]  # 103 is odd: the second rank's last place is a filler
    assert sorted(numbers(batches)) == list(range(1, 103, 2))


def faulty_samples(made):
    samples = [made.ordinary(i) for i in range(20)]
    samples[3] = made.Made([made.png(3)[:30]], made.record(3))
    samples[7] = made.Made([made.png(7)], b'{"id": 7, "conversations": []}')
    samples[11] = made.Made([made.png(11)], b"{]")
    samples[12] = made.Made([made.png(12), b"not a picture"], made.record(12, 2))
    return samples


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_become_fillers_at_their_position(tmp_path, made, workers, caplog):
    data = made.write(tmp_path, faulty_samples(made), shards=2)
    loader = make(data, batch_size=4, shuffle=None, num_workers=workers)
    with caplog.at_level(logging.WARNING, "loaders"):
        batches = list(loader)
    bad = {3, 7, 11, 12}
    for number, batch in enumerate(batches):
        check_contents(batch)
        assert batch.keys == [f"{i:09d}" if i not in bad else "" for i in range(4 * number, 4 * number + 4)]
        fillers = (~batch.valid).nonzero().flatten().tolist()
        assert (batch.input_ids[fillers] == TEXT.pad_token_id).all()
        assert (batch.labels[fillers] == -100).all()
        assert batch.attention_mask[fillers].sum(dim=1).tolist() == [1] * len(fillers)
        assert not set(fillers) & set(batch.image_samples.tolist())
        assert [fault.position % 4 for fault in batch.faults] == fillers
    report = loader.report()
    assert dict(report.faults) == {
        "image-undecodable": 2,
        "no-conversations": 1,
        "record-not-json": 1,
    }
    assert [(fault.key, fault.position) for fault in report.listed] == [(f"{i:09d}", i) for i in sorted(bad)]
    assert {Path(fault.shard) for fault in report.listed} == {data / "000.tar", data / "001.tar"}
    assert (report.batches, report.samples) == (5, 16)
    assert len(caplog.records) == 3  # one line for each reason
    assert "000.tar" in caplog.text


@pytest.fixture(scope="module")
def faulty_data(tmp_path_factory, made):
    return made.write(tmp_path_factory.mktemp("faulty"), faulty_samples(made), shards=3)


@settings(max_examples=40)
@given(data=st.data())
def test_a_chain_of_resumes_covers_every_position_once(plain_data, faulty_data, data):
    folder, length = data.draw(st.sampled_from([(plain_data, 103), (faulty_data, 20)]))
    order = {
        "shuffle": data.draw(st.sampled_from(["block", "full", None])),
        "seed": data.draw(st.integers(0, 9)),
    }
    state, used = None, []
    for run in range(last := data.draw(st.integers(0, 4)), -1, -1):
        world, size = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 20))
        ranks = [make(folder, batch_size=size, rank=r, world_size=world, **order) for r in range(world)]
        for loader in ranks:
            loader.load_state_dict(state or loader.state_dict())
        steps = data.draw(st.integers(0, len(ranks[0]) - 1)) if run else len(ranks[0])
        streams = [iter(loader) for loader in ranks]
        for _ in range(steps):
            batches = [next(stream) for stream in streams]
            assert len({len(batch.keys) for batch in batches}) == 1
            assert all(batch.state == batches[0].state for batch in batches)
            for batch in batches:
                check_contents(batch)
                used += batch.positions[batch.valid].tolist() + [fault.position for fault in batch.faults]
        state = ranks[-1].state_dict()
    assert sorted(used) == list(range(length)), last
    assert (state["epoch"], state["position"], state["start"]) == (1, 0, 0)


def test_the_report_counts_what_was_handed_out(tmp_path, made):
    loader = make(
        made.write(tmp_path, faulty_samples(made), shards=2), batch_size=4, shuffle=None, num_workers=2
    )
    next(iter(loader))
    assert dict(loader.report().faults) == {"image-undecodable": 1}
    assert loader.report().batches == 1


def test_odd_texts_are_noted(tmp_path, made):
    turns = [{"from": "gpt", "value": "Hello."}, *json.loads(made.record(0, 0))["conversations"]]
    samples = [made.Made([], json.dumps({"conversations": turns}).encode())] * 3
    loader = make(made.write(tmp_path, samples, shards=1))
    list(loader)
    assert dict(loader.report().notes) == {"first-turn-dropped": 3}


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_change_after_opening(tmp_path, made, workers):
    data = made.write(tmp_path, [made.ordinary(i) for i in range(30)], shards=3)
    loader = make(data, batch_size=10, shuffle=None, num_workers=workers)
    os.truncate(data / "001.tar", 5000)  # two samples and a piece
    with open(data / "002.tar", "r+b") as file:
        file.write(bytes(512))  # the first header
    batches = list(loader)
    assert [int(batch.valid.sum()) for batch in batches] == [10, 2, 9]
    assert dict(loader.report().faults) == {"shard-read-error": 8, "index-mismatch": 1}
    assert numbers(batches)[:12] == list(range(12))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_gone_ends_the_run(tmp_path, made, workers):
    data = made.write(tmp_path, [made.ordinary(i) for i in range(40)], shards=4)
    loader = make(data, batch_size=10, shuffle=None, num_workers=workers)
    (data / "002.tar").unlink()
    seen = []
    with pytest.raises(LoaderError, match=r"002\.tar cannot be opened any more: No such file") as caught:
        seen.extend(loader)
    assert "Traceback" not in str(caught.value)
    assert loader.state_dict()["position"] == 20


def test_an_iterator_ends_with_its_epoch(plain_data):
    loader = make(plain_data)
    outer = 0
    for _ in loader:
        outer += 1
        assert len(list(loader)) == 12
    assert (outer, loader.epoch) == (1, 1)
    assert sum(len(pair) for pair in zip(loader, loader, strict=False)) == 12
    assert loader.epoch == 2


def test_what_a_user_does_to_a_batchs_state_stays_there(plain_data):
    loader = make(plain_data)
    for batch in loader:
        batch.state["fingerprint"]["digest"] = batch.state["settings"]["block"] = batch.state["position"] = (
            "gone"
        )
    assert loader.epoch == 1
    make(plain_data).load_state_dict(loader.state_dict())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupt_while_a_batch_is_reported_loses_nothing(plain_data, monkeypatch, workers):
    loader = make(plain_data, num_workers=workers)
    seen = [next(iter(loader))]
    add = LoaderReport.add
    with monkeypatch.context() as patch:
        patch.setattr(LoaderReport, "add", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            next(iter(loader))
    assert LoaderReport.add is add
    seen += list(loader)
    assert sorted(numbers(seen)) == list(range(103))


def test_batches_and_loaders_can_be_copied(plain_data):
    loader = make(plain_data)
    batch = next(iter(loader))
    for copied in (copy.deepcopy(batch), pickle.loads(pickle.dumps(batch))):
        assert copied.keys == batch.keys
        assert copied.state == batch.state
        assert torch.equal(copied.images, batch.images)
        assert copied.images.data_ptr() != batch.images.data_ptr()
    twin = copy.copy(loader)
    assert numbers(twin) == numbers(loader)


def test_a_forked_copy_leaves_the_parents_workers_alone(plain_data):
    loader = make(plain_data, num_workers=1)
    seen = [next(iter(loader))]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(sorted(numbers(list(loader)) + numbers(seen)) != list(range(103)))
            loader.close()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert sorted(numbers(seen + list(loader))) == list(range(103))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 4, "global_batch_size": 8}, "not both"),
        ({}, "not both"),
        ({"global_batch_size": 5, "rank": 0, "world_size": 2}, "global_batch_size=5"),
        ({"batch_size": 0}, "=0"),
        ({"batch_size": 4, "num_workers": -1}, "num_workers=-1"),
        ({"batch_size": 4, "prefetch": 0}, "prefetch=0"),
        ({"batch_size": 4, "lanes": 0}, "lanes=0"),
        ({"batch_size": 4, "rank": 1}, "rank=1"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank=2"),
        ({"batch_size": 4, "shuffle": "random"}, "'random'"),
        ({"batch_size": "8"}, "batch_size='8'"),
        ({"batch_size": 8.0}, "batch_size=8.0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"batch_size": 4, "seed": 1.5}, "seed=1.5"),
        ({"batch_size": 4, "seed": None}, "seed=None"),
        ({"batch_size": 4, "block": 2.5}, "block=2.5"),
        ({"batch_size": 4, "lanes": 10**11}, "lanes=100000000000"),
    ],
)
def test_wrong_arguments_are_named(plain_data, options, named):
    with pytest.raises(UsageError, match=named):
        StreamingLoader(plain_data, **options)


def test_rank_and_world_size_come_from_torch_distributed(plain_data, tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        loader = make(plain_data)
        assert (loader.rank, loader.world_size) == (0, 1)
        assert make(plain_data, rank=1, world_size=3).rank == 1
    finally:
        distributed.destroy_process_group()


def test_the_users_random_numbers_stay_as_they_are(plain_data):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    list(make(plain_data, num_workers=1))
    assert torch.equal(torch.rand(1), expected)


def children():
    pids = set()
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that ended meanwhile
            pids |= set(map(int, (task / "children").read_text().split()))
    return pids


def wait_until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


def test_a_killed_worker_fails_the_loader_within_seconds(plain_data):
    before = children()
    loader = make(plain_data, num_workers=2)
    stream = iter(loader)
    seen = numbers([next(stream)])
    workers = children() - before
    assert len(workers) == 2
    begin = time.monotonic()
    with pytest.raises((LoaderError, RuntimeError), match="killed by signal"):
        # torch notices by SIGCHLD, which may reach this process anywhere
        os.kill(min(workers), signal.SIGKILL)
        for _ in range(100):
            time.sleep(0.05)
            seen += numbers([next(stream)])
    assert time.monotonic() - begin < 8
    # what was handed out stands, and new workers continue behind it
    loader.close()
    assert sorted(seen + numbers(loader)) == list(range(103))
    loader.close()
    assert children() <= before


class DyingImage:
    """Ends its process at the first image."""

    shape = (3, 8, 8)
    is_ragged = is_tiled = False

    def prepare(self, data, *, images=1):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dying_worker_is_one_of_our_errors_when_waited_for(plain_data):
    before = children()
    loader = make(plain_data, num_workers=2, image=DyingImage())
    with pytest.raises(LoaderError, match=r"worker \(pid.*killed by signal: Killed"):
        next(iter(loader))
    assert children() <= before


class BuggyImage:
    shape = (3, 8, 8)
    is_ragged = is_tiled = False

    def prepare(self, data, *, images=1):
        raise RuntimeError("a bug of the user's")


def test_an_exception_in_a_worker_arrives_with_its_traceback(plain_data):
    before = children()
    loader = make(plain_data, num_workers=2, image=BuggyImage())
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*a bug of the user's") as caught:
        next(iter(loader))
    assert not isinstance(caught.value, ShardifyError)
    assert children() <= before


def test_after_an_interruption_the_epoch_stays_exact(plain_data, monkeypatch):
    loader = make(plain_data, num_workers=2)
    stream = iter(loader)
    seen = numbers([next(stream), next(stream)])
    built = loader._run.built
    original = type(built).__next__

    def interrupted(self):
        original(self)  # the batch is lost on its way
        raise KeyboardInterrupt

    monkeypatch.setattr(type(built), "__next__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    monkeypatch.undo()
    assert sorted(seen + numbers(loader)) == list(range(103))


SCRIPT = """
import os, sys, time
from loaders import ImageTransform, StreamingLoader
loader = StreamingLoader(sys.argv[1], batch_size=4, image=ImageTransform(8), num_workers=3)
for _ in range(10):
    for batch in loader:
        break
print("ready", flush=True)
time.sleep(600)
"""


def test_nothing_is_left_when_the_process_is_killed(plain_data):
    named = set(os.listdir("/dev/shm"))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, plain_data], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    workers = [
        int(pid)
        for task in os.listdir(f"/proc/{process.pid}/task")
        for pid in Path(f"/proc/{process.pid}/task/{task}/children").read_text().split()
    ]
    assert len(workers) == 3
    process.kill()
    process.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    mine = {name for name in set(os.listdir("/dev/shm")) - named if str(process.pid) in name}
    assert not mine


@pytest.mark.parametrize(("ending", "status"), [("", 0), ("raise SystemExit(3)", 3), ("1 / 0", 1)])
def test_a_program_that_closes_nothing_ends(plain_data, ending, status):
    script = SCRIPT.replace("time.sleep(600)", ending)
    ended = subprocess.run(
        [sys.executable, "-c", script, plain_data], check=False, capture_output=True, timeout=120
    )
    assert ended.returncode == status, ended.stderr.decode()


def test_workers_outlive_the_thread_that_started_them(plain_data):
    loader = make(plain_data, num_workers=1)
    seen = []

    def begin():
        seen.extend(numbers([next(iter(loader))]))

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert sorted(seen + numbers(loader)) == list(range(103))


def test_epochs_and_restarts_leave_no_files_threads_or_memory_behind(plain_data):
    def counts():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), len(children())

    loader = make(plain_data, num_workers=2)
    list(loader)
    running = counts()
    for _ in range(5):
        list(loader)
    assert counts() == running
    for _ in range(3):
        loader.load_state_dict(loader.state_dict())
        list(loader)
    files, threads, processes = counts()
    assert files <= running[0] + 2
    assert (threads, processes) == running[1:]
    pool = weakref.ref(loader._run.slabs)
    loader.close()
    del loader
    gc.collect()
    assert counts()[2] == running[2] - 2
    assert pool() is None


def test_numpys_integers_are_integers(plain_data):
    options = {"batch_size": np.int64(8), "seed": np.int64(3), "num_workers": np.int32(0)}
    loader = make(plain_data, **options)
    batch = next(iter(loader))
    assert json.loads(json.dumps(batch.state)) == batch.state


def test_a_state_of_absurd_lanes_is_refused(plain_data):
    state = make(plain_data).state_dict() | {"lanes": 10**11}
    with pytest.raises(StateError, match="lanes 100000000000"):
        make(plain_data).load_state_dict(state)
