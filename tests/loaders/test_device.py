"""`DevicePrefetcher`: what it hands out, what counts as handed out, and what it lets go of. Without CUDA its look-ahead runs on the CPU."""

import copy
import io
import weakref
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loaders import ImageTransform, LlavaText, StreamingLoader
from loaders.batch import Batch
from loaders.device import DevicePrefetcher, _SideStream
from loaders.nvjpeg import MAX_DEVICE_PIXELS, NvjpegDecoder, fit, invalidate, suits_nvjpeg
from loaders.text import ByteTokenizer
from shardify.errors import ImageError, LoaderError, StateError, UsageError

IMAGE = ImageTransform(8)
TEXT = LlavaText(ByteTokenizer())

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
DEPTHS = [0, 1, 3]


def make(data, *, batch_size=8, **options):
    return StreamingLoader(
        data, batch_size=batch_size, **{"image": IMAGE, "text": TEXT, "num_workers": 0, **options}
    )


def keys(batches):
    return [key for batch in batches for key in batch.keys if key]


def tensors(batch):
    return {
        name: value for name in Batch.__slots__ if isinstance(value := getattr(batch, name), torch.Tensor)
    }


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_loaders_own_normalised(plain_data, device, depth, workers):
    plain, loader = make(plain_data), make(plain_data, num_workers=workers)
    prefetcher = DevicePrefetcher(loader, device, torch.bfloat16, depth=depth)
    for epoch in range(3):
        assert prefetcher.epoch == epoch
        assert len(prefetcher) == 13
        expected = list(plain)
        for number, (batch, other) in enumerate(zip(prefetcher, expected, strict=True)):
            assert batch.images.dtype == torch.bfloat16
            assert torch.equal(batch.images.cpu(), IMAGE.normalize(other.images, torch.bfloat16))
            for name, tensor in tensors(batch).items():
                assert tensor.device.type == device
                if name != "images":
                    assert torch.equal(tensor.cpu(), getattr(other, name))
            assert (batch.keys, batch.faults, batch.state) == (other.keys, other.faults, other.state)
            assert prefetcher.state_dict() == other.state
            assert len(prefetcher) == (12 - number or 13)
            assert prefetcher.epoch == epoch + (number == 12)
    assert prefetcher.stats().batches == 39
    prefetcher.close()


def test_without_a_dtype_images_stay_as_they_are(plain_data):
    batch = next(iter(DevicePrefetcher(make(plain_data), "cpu", None)))
    assert batch.images.dtype == torch.uint8


def test_encoded_images_pass_through(plain_data):
    plain = make(plain_data, image=None)
    for batch, other in zip(DevicePrefetcher(make(plain_data, image=None), "cpu"), plain, strict=True):
        assert [bytes(image) for image in batch.images] == [bytes(image) for image in other.images]


def test_batches_are_prepared_before_they_are_moved(plain_data):
    def prepare(batch):
        return replace(batch, input_ids=batch.input_ids + 1)

    plain = make(plain_data)
    for batch, other in zip(DevicePrefetcher(make(plain_data), "cpu", prepare=prepare), plain, strict=True):
        assert torch.equal(batch.input_ids, other.input_ids + 1)


@settings(deadline=None, max_examples=40)
@given(
    depth=st.integers(0, 3),
    does=st.lists(
        st.tuples(st.sampled_from(["break", "close", "reload", "elsewhere", "loader"]), st.integers(0, 9)),
        max_size=8,
    ),
)
def test_whatever_is_done_between_batches_none_is_lost_or_repeated(plain_data, depth, does):
    expected = two_epochs(plain_data)
    prefetcher = DevicePrefetcher(bare(plain_data), "cpu", depth=depth)
    seen = []
    for what, batches in does:
        for number, batch in enumerate(prefetcher, start=1):
            seen += keys([batch])
            if number >= batches:
                break
        if len(seen) > 180:
            break
        match what:
            case "close":
                prefetcher.close()
            case "reload":
                prefetcher.load_state_dict(copy.deepcopy(prefetcher.state_dict()))
            case "elsewhere":
                state = prefetcher.state_dict()
                prefetcher = DevicePrefetcher(bare(plain_data), "cpu", depth=depth)
                prefetcher.load_state_dict(state)
            case "loader":  # the checkpoint goes to a plain loader, and back
                loader = bare(plain_data)
                loader.load_state_dict(prefetcher.state_dict())
                prefetcher = DevicePrefetcher(loader, "cpu", depth=depth)
    while len(seen) < 206:
        for batch in prefetcher:
            seen += keys([batch])
    assert seen[:206] == expected


@cache
def two_epochs(data):
    return keys(bare(data)) + keys(epoch_of(data, 1))


def bare(data):
    return make(data, text=None)


def epoch_of(data, epoch):
    loader = make(data)
    for _ in range(epoch):
        for _ in loader:
            pass
    return loader


def test_a_state_that_does_not_fit_changes_nothing(plain_data):
    prefetcher = DevicePrefetcher(make(plain_data), "cpu", depth=2)
    first = next(iter(prefetcher))
    with pytest.raises(StateError):
        prefetcher.load_state_dict({**prefetcher.state_dict(), "seed": 5})
    assert prefetcher.state_dict() == first.state
    assert sorted(keys([first]) + keys(prefetcher)) == [f"{i:09d}" for i in range(103)]


def test_what_a_user_does_to_a_batchs_state_stays_there(plain_data):
    prefetcher = DevicePrefetcher(make(plain_data), "cpu", depth=1)
    batch = next(iter(prefetcher))
    before = copy.deepcopy(batch.state)
    batch.state["position"] = 77
    prefetcher.state_dict()["position"] = 78
    assert prefetcher.state_dict() == before


def test_an_epoch_without_batches_ends_at_once(plain_data):
    prefetcher = DevicePrefetcher(make(plain_data, batch_size=200, drop_last=True), "cpu", depth=1)
    for epoch in range(3):
        assert prefetcher.epoch == epoch
        assert len(prefetcher) == 0
        assert list(prefetcher) == []


class Faulty:
    """A loader that raises once, in place of one batch."""

    image = IMAGE

    def __init__(self, loader, at, error):
        self.loader, self.at, self.error = loader, at, error

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        epoch = self.loader.epoch
        while self.loader.epoch == epoch:
            if self.at == 0:
                self.at = None
                raise self.error
            if self.at is not None:
                self.at -= 1
            yield next(iter(self.loader))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("at", [0, 1, 5, 12])
def test_the_loaders_exceptions_come_where_they_belong(plain_data, depth, at):
    expected = list(make(plain_data))
    prefetcher = DevicePrefetcher(Faulty(make(plain_data), at, LoaderError("gone")), "cpu", depth=depth)
    seen = []
    with pytest.raises(LoaderError, match="gone"):
        seen.extend(prefetcher)
    assert keys(seen) == keys(expected[:at])
    assert len(prefetcher) == 13 - at
    if at:
        assert prefetcher.state_dict() == expected[at - 1].state
    assert keys(prefetcher) == keys(expected[at:])


@pytest.mark.parametrize("depth", DEPTHS)
def test_an_interrupt_loses_nothing(plain_data, depth):
    expected = list(make(plain_data))
    prefetcher = DevicePrefetcher(Faulty(make(plain_data), 4, KeyboardInterrupt()), "cpu", depth=depth)
    seen = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(prefetcher)
    assert prefetcher.epoch == 0
    assert keys(seen) + keys(prefetcher) == keys(expected)


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_batch_that_cannot_be_moved_is_told_in_its_turn_and_tried_again(plain_data, depth):
    expected = list(make(plain_data))
    failing = {4: 2}  # batch 4 fails twice

    def prepare(batch):
        number = batch.positions.max().item() // 8
        if failing.get(number, 0):
            failing[number] -= 1
            raise RuntimeError("out of memory")
        return batch

    prefetcher = DevicePrefetcher(make(plain_data, shuffle=None), "cpu", prepare=prepare, depth=depth)
    seen, told = [], 0
    while len(seen) < 13:
        try:
            seen.extend(prefetcher)
        except RuntimeError:
            told += 1
            assert len(seen) == 4
            assert len(prefetcher) == 9
            assert prefetcher.state_dict() == seen[-1].state
    assert told == 2
    assert sorted(keys(seen)) == sorted(keys(expected))


def test_an_error_in_a_worker_comes_through(tmp_path, made):
    class Broken(ImageTransform):
        def prepare(self, data, *, images=1):
            raise RuntimeError("a bug")

    data = made.write(tmp_path, [made.ordinary(i) for i in range(8)], shards=1)
    prefetcher = DevicePrefetcher(make(data, image=Broken(8), num_workers=1), "cpu", depth=1)
    with pytest.raises(RuntimeError, match="a bug"):
        next(iter(prefetcher))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_nothing_is_held_on_to(plain_data, depth, dtype):
    sources = []

    def prepare(batch):
        sources.append(weakref.ref(batch.images))
        return batch

    batches = iter(DevicePrefetcher(make(plain_data), "cpu", dtype, prepare=prepare, depth=depth))
    for number in range(5):
        images = weakref.ref(next(batches).images)
        assert images() is None
        alive = [source() is not None for source in sources]
        ahead = [dtype is None] * depth  # the pixels themselves, or those made of them
        assert alive == [False] * (number + 1) + ahead


def test_slabs_come_back(plain_data):
    loader = make(plain_data, num_workers=1, prefetch=1)
    for batch in DevicePrefetcher(loader, "cpu", None, depth=1):
        del batch
    assert loader.report().overflowed == 0


def test_held_batches_never_change_and_never_block(plain_data):
    prefetcher = DevicePrefetcher(make(plain_data, num_workers=2, prefetch=1), "cpu", None, depth=1)
    kept = [(batch, batch.images.clone()) for _ in range(3) for batch in prefetcher]
    assert len(kept) == 39
    assert all(torch.equal(batch.images, before) for batch, before in kept)


def test_time_waited_is_told(plain_data):
    prefetcher = DevicePrefetcher(make(plain_data), "cpu")
    before = prefetcher.stats()
    assert set(before.as_scalars().values()) == {0.0}
    batches = list(prefetcher)
    stats = prefetcher.stats()
    assert stats.batches == len(batches)
    assert stats.wait > stats.moving > 0
    assert stats.device_wait == 0.0
    assert stats.as_scalars("x/")["x/batches"] == 13.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"device": "nowhere"}, "nowhere"),
        ({"dtype": torch.int32}, "torch.int32"),
        ({"depth": -1}, "depth=-1"),
        ({"decode": "gpu"}, "'gpu'"),
        ({"decode": "nvjpeg"}, "image=None"),
        ({"image": SimpleNamespace(shape=(3, 8, 8), into=None)}, "SimpleNamespace"),
        ({"image": None, "decode": "nvjpeg"}, "normalize=ImageTransform"),
        ({"image": None, "decode": "nvjpeg", "normalize": IMAGE}, "CUDA device is needed"),
        pytest.param(
            {"device": "mps"},
            "device='mps'",
            marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="has MPS"),
        ),
        pytest.param({"device": "cuda:99"}, "device='cuda:99'", marks=needs_cuda),
        pytest.param(
            {"device": "cuda"},
            "no CUDA",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has CUDA"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_arguments_are_named(plain_data, options, told):
    loader = make(plain_data, image=options.pop("image", IMAGE))
    with pytest.raises(UsageError, match=told):
        DevicePrefetcher(loader, **{"device": "cpu", **options})


class FakeStream:
    """Notes in `log` what it is told."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_event(self, event):
        self.log.append(("wait", self.name, event.at))


class FakeEvent:
    """Recorded at a time of its own: the copy is complete 2 s after the main stream came to it, and then seen at once."""

    log = None

    def __init__(self, **options):
        assert options == {"enable_timing": True}

    def record(self, stream):
        self.at = {"side": 5000.0, "main": 3000.0}[stream.name]
        self.log.append(("record", stream.name))

    def query(self):
        return True

    def elapsed_time(self, later):
        return later.at - self.at


def test_what_streams_are_told(plain_data, monkeypatch):
    """On a machine without CUDA: the order of events, and that every tensor is known to both streams."""
    log, current = [], []
    main, side = FakeStream("main", log), FakeStream("side", log)

    @contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(FakeEvent, "log", log)
    monkeypatch.setattr("torch.cuda.Stream", lambda device: side)
    monkeypatch.setattr("torch.cuda.Event", FakeEvent)
    monkeypatch.setattr("torch.cuda.stream", on)
    monkeypatch.setattr("torch.cuda.current_stream", lambda device: current[-1])
    known = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, stream: known.append((id(tensor), stream.name))
    )

    def prepare(batch):
        log.append(("prepare", current[-1].name))
        return batch

    prefetcher = DevicePrefetcher(make(plain_data), "cpu", prepare=prepare, depth=1)
    prefetcher._stream = _SideStream(torch.device("cpu"))
    copied, handed_out = (
        [("prepare", "side"), ("record", "side")],
        [("record", "main"), ("wait", "main", 5000.0)],
    )
    with on(main):
        batches = iter(prefetcher)
        first = next(batches)
        assert (
            log == copied + copied + handed_out
        )  # the second copy is under way before the first batch trains
        assert sorted(known) == sorted((id(tensor), "main") for tensor in tensors(first).values())
        assert len(list(batches)) == 12
    assert log == copied + (copied + handed_out) * 12 + handed_out
    assert prefetcher.stats().device_wait == 26.0


@needs_cuda
@pytest.mark.parametrize("depth", DEPTHS)
def test_slow_copies_are_waited_for_and_slabs_kept(plain_data, depth):
    """The side stream sleeps before each copy, the host goes on, and slabs are written again as soon as they are free."""
    expected = [IMAGE.normalize(batch.images) for batch in make(plain_data)]
    prefetcher = DevicePrefetcher(make(plain_data, num_workers=1, prefetch=1), "cuda", depth=depth)

    def prepare(batch):
        torch.cuda._sleep(50_000_000)  # runs on the side stream
        return batch

    prefetcher._prepare = prepare
    for _ in range(3):
        sums = []
        for batch in prefetcher:
            sums.append(
                batch.images.double().flatten(1).clone()
            )  # on the main stream, not waited for by the host
            del batch
        for found, right in zip(sums, expected, strict=True):
            assert torch.equal(found.cpu(), right.double().flatten(1))
    torch.cuda.synchronize()
    assert prefetcher.stats().device_wait > 0


@needs_cuda
def test_memory_of_a_dropped_batch_is_not_used_while_the_step_is_under_way(plain_data):
    prefetcher = DevicePrefetcher(make(plain_data), "cuda", depth=1)
    plain = [IMAGE.normalize(batch.images) for batch in make(plain_data)]
    results = []
    for batch in prefetcher:
        torch.cuda._sleep(50_000_000)  # the step is late, the batch is dropped, the next copies run ahead
        results.append(batch.images.clone())
        del batch
    for found, right in zip(results, plain, strict=True):
        assert torch.equal(found.cpu(), right)


@needs_cuda
def test_a_plain_copy_of_a_dropped_batch_is_whole(plain_data):
    right = [batch.images.clone() for batch in make(plain_data)]
    loader = make(plain_data, num_workers=1, prefetch=1)
    for _ in range(3):
        found = []
        for batch in loader:
            torch.cuda._sleep(50_000_000)
            found.append(batch.to("cuda").images)
            del batch
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, right, strict=True))
        right = [batch.images.clone() for batch in epoch_of(plain_data, loader.epoch)]


# nvJPEG


def encode(form, mode="RGB", size=(60, 40), **options):
    rng = np.random.default_rng(sum(size))
    image = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize(size).convert(mode)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


SUITED = {
    "JPEG": encode("JPEG"),
    "progressive JPEG": encode("JPEG", progressive=True),
    "grey JPEG": encode("JPEG", "L"),
    "tall JPEG": encode("JPEG", size=(20, 90)),
}
UNSUITED = {
    "CMYK JPEG": encode("JPEG", "CMYK"),
    "PNG": encode("PNG"),
    "WebP": encode("WEBP"),
    "cut-off JPEG": encode("JPEG")[:-20],
    "nothing": b"",
    "noise": b"noise",
    "two markers": b"\xff\xd8\xff\xd9",
}


@pytest.mark.parametrize("fit_name", ["crop", "pad"])
@pytest.mark.parametrize("name", [*SUITED, *UNSUITED])
def test_only_whole_ordinary_jpegs_are_for_the_device(name, fit_name):
    transform = ImageTransform(32, fit=fit_name)
    data = {**SUITED, **UNSUITED}[name]
    assert suits_nvjpeg(memoryview(data), transform) is (name in SUITED)


def test_large_and_thin_pictures_are_for_the_host():
    side = int(MAX_DEVICE_PIXELS**0.5)
    large = encode("JPEG", size=(2 * side, 400))
    assert suits_nvjpeg(large, ImageTransform(336))
    assert not suits_nvjpeg(large, ImageTransform(336, fit="pad"))
    assert not suits_nvjpeg(encode("JPEG", size=(300, 280)), ImageTransform(8))
    assert not suits_nvjpeg(encode("JPEG", size=(2000, 1)), ImageTransform(336))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 150),
    st.integers(1, 150),
    st.integers(1, 60),
    st.sampled_from(["crop", "pad"]),
    st.integers(0, 99),
)
def test_the_geometry_is_image_transforms(height, width, size, fit_name, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    transform = ImageTransform(size, fit=fit_name)
    found = fit(torch.from_numpy(pixels), transform).int()
    assert found.shape == (3, size, size)
    assert (found - transform(file.getvalue()).int()).abs().max() <= 2


class FakeLibrary:
    """nvImageCodec's interface; it refuses what it is told to. `lists` says how refusals are told: None, left out, or raised at the header."""

    class DecodeParams:
        def __init__(self, apply_exif_orientation=True):
            assert not apply_exif_orientation

    def __init__(self, refused=(), lists="none"):
        self.refused, self.lists, self.calls = {bytes(data) for data in refused}, lists, []

    def CodeStream(self, array):  # noqa: N802
        data = array.tobytes()
        if self.lists == "header" and data in self.refused:
            raise RuntimeError("Failed to get image info")
        return data

    BackendKind = SimpleNamespace(CPU_ONLY="cpu")

    def Backend(self, kind):  # noqa: N802
        return kind

    def Decoder(self, *, device_id, max_num_cpu_threads, backends, options):  # noqa: N802
        return SimpleNamespace(decode=self.decode)

    def decode(self, streams, *, params, cuda_stream):
        self.calls.append(len(streams))
        images = [
            None if data in self.refused else np.array(Image.open(io.BytesIO(data)).convert("RGB"))
            for data in streams
        ]
        return [image for image in images if image is not None] if self.lists == "left out" else images


def decoder(library, size=32, fit_name="crop"):
    return NvjpegDecoder(ImageTransform(size, fit=fit_name), torch.device("cpu"), library=library)


@pytest.mark.parametrize("lists", ["none", "left out", "header"])
@pytest.mark.parametrize("fit_name", ["crop", "pad"])
def test_images_keep_their_places_whoever_decodes_them(lists, fit_name):
    images = [*SUITED.values(), *UNSUITED.values(), *SUITED.values()]
    refused = [SUITED["grey JPEG"]]
    found = decoder(FakeLibrary(refused, lists), fit_name=fit_name)([memoryview(data) for data in images])
    assert found.images.shape == (len(images), 3, 32, 32)
    assert found.images.is_contiguous(memory_format=torch.channels_last)
    transform = ImageTransform(32, fit=fit_name)
    for number, data in enumerate(images):
        try:
            right = transform(data)
        except ImageError as error:
            assert found.faults.pop(number).code == error.code
            right = torch.zeros(3, 32, 32)
        assert (found.images[number].int() - right.int()).abs().max() <= 3
    assert not found.faults
    assert found.on_host == len(UNSUITED) + 2 * len(refused)


def test_no_images_are_no_call():
    library = FakeLibrary()
    assert decoder(library)([]).images.shape == (0, 3, 32, 32)
    assert library.calls == []


@pytest.fixture
def nvjpeg(monkeypatch):
    """A prefetcher with the library above in it, on the CPU."""

    def build(loader, library, **options):
        monkeypatch.setattr("loaders.nvjpeg._installed", lambda device: library)
        return DevicePrefetcher(loader, "cpu", normalize=ImageTransform(8), decode="nvjpeg", **options)

    return build


@pytest.mark.parametrize("depth", DEPTHS)
def test_a_loader_of_bytes_becomes_one_of_pixels(plain_data, nvjpeg, depth):
    prefetcher = nvjpeg(make(plain_data, image=None), FakeLibrary(), depth=depth)
    for batch, other in zip(prefetcher, make(plain_data), strict=True):
        assert torch.equal(batch.images, IMAGE.normalize(other.images))  # PNGs: decoded by IMAGE
        assert batch.keys == other.keys
    stats = prefetcher.stats()
    assert (stats.images_on_device, stats.images_on_host) == (0, 103)


def test_images_nobody_can_decode_leave_their_samples_out(tmp_path, made, nvjpeg, caplog):
    good, bad = encode("JPEG", size=(8, 8)), encode("PNG")[:50]
    samples = [
        made.Made([good], made.record(0)),
        made.Made([bad, bad], made.record(1, 2)),
        made.Made([good, good], made.record(2, 2)),
        made.Made([bad], made.record(3)),
    ]
    data = made.write(tmp_path, samples, shards=1)
    prefetcher = nvjpeg(make(data, image=None, shuffle=None, batch_size=4), FakeLibrary(), depth=1)
    plain = next(iter(make(data, image=None, shuffle=None, batch_size=4)))
    (batch,) = prefetcher
    assert batch.valid.tolist() == [True, False, True, False]
    assert batch.keys == ["000000000", "", "000000002", ""]
    assert batch.positions.tolist() == [0, -1, 2, -1]
    assert batch.image_samples.tolist() == [0, 1, 1, 2, 2, 3]
    assert torch.equal(batch.input_ids, plain.input_ids)
    for row in range(4):
        right = plain.labels[row] if row % 2 == 0 else torch.full_like(plain.labels[row], -100)
        assert torch.equal(batch.labels[row], right)
    assert [(fault.position, fault.key, fault.code) for fault in batch.faults] == [
        (1, "000000001", "image-undecodable"),
        (3, "000000003", "image-undecodable"),
    ]
    report = prefetcher.report()
    assert report.samples == 2
    assert report.faults == {"image-undecodable": 2}
    assert tuple(report.listed) == batch.faults
    assert caplog.text.count("sample left out: image-undecodable") == 1


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("limit", [{"on_error": "raise"}, {"max_errors": 1}])
def test_images_nobody_can_decode_end_the_run_as_the_loader_is_told(tmp_path, made, nvjpeg, depth, limit):
    good, bad = encode("JPEG", size=(8, 8)), encode("PNG")[:50]
    samples = [made.Made([bad if number in (4, 5) else good], made.record(number)) for number in range(8)]
    data = made.write(tmp_path, samples, shards=1)
    loader = make(data, image=None, shuffle=None, batch_size=2, num_workers=1, **limit)
    prefetcher = nvjpeg(loader, FakeLibrary(), depth=depth)
    seen = []
    for _ in range(2):  # the second time, too: the batch is not handed out
        with pytest.raises(LoaderError, match=r"image-undecodable .*, key 000000004"):
            seen.extend(prefetcher)
        assert keys(seen) == [f"{number:09}" for number in range(4)]
        assert prefetcher.state_dict() == seen[-1].state
        assert len(prefetcher) == 2


def test_a_packed_rows_other_samples_keep_their_labels():
    batch = Batch(
        keys=["a", "b", "c", "d"],
        positions=torch.arange(4),
        valid=torch.ones(4, dtype=torch.bool),
        rows=torch.tensor([0, 0, 1, 1]),
        input_ids=torch.arange(12).view(2, 6),
        labels=torch.arange(12).view(2, 6),
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool),
        segment_ids=torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 2]]),
        images=[b""] * 4,
        image_samples=torch.arange(4),
        state={},
    )
    found = invalidate(batch, {1: ImageError("image-empty"), 2: ImageError("image-empty")})
    assert found.labels.tolist() == [[0, 1, -100, -100, -100, 5], [-100, 7, 8, 9, 10, 11]]
    assert found.valid.tolist() == [True, False, False, True]
    assert batch.labels.tolist() == torch.arange(12).view(2, 6).tolist()


def test_the_library_itself_decodes_as_expected():
    library = pytest.importorskip(
        "nvidia.nvimgcodec", reason="needs nvImageCodec; it decodes on the CPU here"
    )
    for fit_name in ("crop", "pad"):
        transform = ImageTransform(32, fit=fit_name)
        images = [*SUITED.values(), UNSUITED["PNG"], *SUITED.values()]
        found = decoder(library, fit_name=fit_name)([memoryview(data) for data in images])
        assert not found.faults
        assert found.on_host == 1
        for data, pixels in zip(images, found.images, strict=True):
            assert (pixels.int() - transform(data).int()).abs().max() <= 6


@needs_cuda
def test_nvjpeg_decodes_on_the_device(tmp_path, made):
    pytest.importorskip("nvidia.nvimgcodec", reason="needs nvImageCodec")
    images = [encode("JPEG", size=(100 + i, 80), quality=95) for i in range(20)] + [encode("PNG")]
    data = made.write(
        tmp_path, [made.Made([image], made.record(i)) for i, image in enumerate(images)], shards=1
    )
    transform = ImageTransform(32)
    prefetcher = DevicePrefetcher(make(data, image=None), "cuda", None, normalize=transform, decode="nvjpeg")
    for batch, other in zip(prefetcher, make(data, image=transform), strict=True):
        assert batch.images.is_cuda
        assert (batch.images.cpu().int() - other.images.int()).abs().max() <= 8
    assert prefetcher.stats().images_on_device == 20
