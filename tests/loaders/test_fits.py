"""Geometry of every fit, from the references' rules worked by hand; pixels against Pillow's own resizing."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from loaders.fits import AnyRes, Native, Split, best_grid, longest_edge, parse_grids
from loaders.image import CLIP_MEAN, ImageTransform
from shardify.errors import ImageError, UsageError

sys.path.insert(0, str(Path(__file__).parent))
from references import anyres_by_pillow

LLAVA_16 = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]


def picture(width: int, height: int) -> np.ndarray:
    """Gradients, edges and noise, uint8 [height, width, 3]."""
    y, x = np.mgrid[:height, :width]
    shades = np.stack([255 * x / width, 255 * y / height, 127 * ((x // 7 + y // 5) % 2)], axis=-1)
    noise = np.random.default_rng(width * 1009 + height).integers(0, 64, (height, width, 3))
    return (shades * 0.75 + noise).clip(0, 255).astype(np.uint8)


# grids: (width, height), as LLaVA has them


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        # 640x480 = 307,200 px. 336x672: scale min(.525, 1.4) -> 336x252 = 84,672 px survive; 672x336: scale min(1.05, .7) -> 448x336 = 150,528;
        # 672x672: scale 1.05 -> 672x504, more than there are: all 307,200; 1008x336: 448x336; 336x1008: 336x252
        (640, 480, (672, 672)),
        # 1000x250 = 250,000 px. 672x336: .672 -> 672x168 = 112,896; 672x672: the same; 1008x336: 1.008 -> all; most survive there
        (1000, 250, (1008, 336)),
        # upright likewise
        (250, 1000, (336, 1008)),
        # 100x100 survives whole everywhere: the least is wasted in 336x672 and 672x336, of which the first is taken
        (100, 100, (336, 672)),
        # 300x200: whole in all of them; the smallest are equal again
        (300, 200, (336, 672)),
        # 2000x1000: 672x336 -> 672x336 = 225,792, no waste; 672x672 -> the same 225,792, 225,792 wasted; 1008x336 -> 672x336, 112,896 wasted
        (2000, 1000, (672, 336)),
        # one line: int(1 * scale) is 0 pixels high but in no grid more, so nothing survives anywhere: the smallest grid, the first of them
        (10_000, 1, (336, 672)),
    ],
)
def test_the_best_grid(width, height, grid):
    assert best_grid(height, width, LLAVA_16) == grid


def test_of_equally_good_grids_the_first_is_taken():
    assert best_grid(50, 50, [(672, 336), (336, 672)]) == (672, 336)
    assert best_grid(50, 50, [(336, 672), (672, 336)]) == (336, 672)


@pytest.mark.parametrize(
    ("text", "grids"),
    [
        ("[(336, 672), (672, 336)]", ((336, 672), (672, 336))),
        ("(336,672),(672,336)", ((336, 672), (672, 336))),
        # all from 1x1 to 2x3 tiles, the first number slowest
        (
            "(1x1),...,(2x3)",
            ((336, 336), (336, 672), (336, 1008), (672, 336), (672, 672), (672, 1008)),
        ),
        ([[336, 672]], ((336, 672),)),
        (np.array([[336, 672]]), ((336, 672),)),
    ],
    ids=["literal", "bare", "range", "list", "array"],
)
def test_pinpoints_as_they_are_written(text, grids):
    assert parse_grids(text, 336) == grids


@pytest.mark.parametrize(
    "pinpoints",
    ["", "anything", "[1, 2]", [], [(336,)], [(336, 600)], [(0, 336)], [(336, 224)], 7],
    ids=["empty", "word", "numbers", "none", "one", "odd", "zero", "small", "int"],
)
def test_pinpoints_that_are_none(pinpoints):
    with pytest.raises(UsageError, match="grid_pinpoints"):
        ImageTransform(336, fit="anyres", grid_pinpoints=pinpoints)


def test_tiles_of_anyres_by_hand():
    # 40x20, white, S = 16, grid of 32x32. scale_w = 32/40 = .8 < scale_h = 1.6: 32 x ceil(20 * .8) = 32x16, pasted at y = (32 - 16) // 2 = 8:
    # rows 8 to 23 of the grid are white. Upper tiles: rows 8.. white; lower: rows 0..7
    transform = ImageTransform(16, fit="anyres", grid_pinpoints=[(32, 32)])
    tiles = transform(np.full((20, 40, 3), 255, np.uint8))
    assert tiles.shape == (5, 3, 16, 16)
    assert bool((tiles[0] == 255).all())
    for tile in tiles[1:3]:
        assert not tile[:, :8].any()
        assert bool((tile[:, 8:] == 255).all())
    for tile in tiles[3:5]:
        assert bool((tile[:, :8] == 255).all())
        assert not tile[:, 8:].any()


def test_rounding_up_leaves_an_odd_row_below():
    # 30x10, S = 16, grid 32x16. scale_w = 32/30 < 1.6: ceil(10 * 1.0667) = 11 rows, pasted at (16 - 11) // 2 = 2: rows 2 to 12; 3 black below
    tiles = ImageTransform(16, fit="anyres", grid_pinpoints=[(32, 16)])(np.full((10, 30, 3), 255, np.uint8))
    for tile in tiles[1:]:
        white = (tile == 255).all(dim=2).all(dim=0)
        assert white.tolist() == [False] * 2 + [True] * 11 + [False] * 3


def test_tiles_go_row_by_row():
    pixels = np.zeros((32, 48, 3), np.uint8)
    for number in range(6):
        row, column = divmod(number, 3)
        pixels[16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = 40 * number
    tiles = ImageTransform(16, fit="anyres", grid_pinpoints=[(48, 32)])(pixels)
    assert [int(tile[0, 8, 8]) for tile in tiles[1:]] == [0, 40, 80, 120, 160, 200]
    assert tiles.shape[0] == 7


@given(width=st.integers(1, 400), height=st.integers(1, 400), size=st.integers(8, 48), wide=st.integers(1, 4))
@settings(max_examples=60)
def test_anyres_is_within_two_of_pillow(width, height, size, wide):
    grids = [(a * size, b * size) for a in range(1, wide + 1) for b in range(1, 4)]
    pixels = picture(width, height)
    ours = ImageTransform(size, fit="anyres", grid_pinpoints=grids)(pixels).permute(0, 2, 3, 1).numpy()
    expected = anyres_by_pillow(Image.fromarray(pixels), size, grids)
    assert ours.shape == expected.shape
    assert np.abs(ours.astype(int) - expected).max() <= 2


def test_several_pictures_of_a_sample_are_padded_where_asked_for():
    several = ImageTransform(16, fit="anyres", grid_pinpoints=[(32, 32)], pad_several=True)
    pixels = picture(40, 20)
    alone, among = several.prepare(pixels, images=1), several.prepare(pixels, images=2)
    assert (alone.tiles, among.tiles) == (5, 1)
    memory = np.empty(among.nbytes, np.uint8)
    among.write(memory)
    padded = ImageTransform(16, fit="pad")(pixels).permute(1, 2, 0).numpy()
    assert np.array_equal(memory.reshape(16, 16, 3), padded)  # of the mean's colour, where tiles are black
    assert ImageTransform(16, fit="anyres").prepare(pixels, images=2).tiles > 1


# Idefics3, SmolVLM


@pytest.mark.parametrize(
    ("width", "height", "resized"),
    [
        # the longer edge to 100; the other truncated, then made even
        (400, 300, (100, 76)),  # 75 -> 76
        (300, 400, (76, 100)),
        (100, 100, (100, 100)),
        (50, 49, (100, 98)),  # 98.0
        (1000, 1, (100, 1)),  # 0 is even, and no size
        (3, 7, (42, 100)),  # 42.86
    ],
)
def test_the_longest_edge(width, height, resized):
    assert longest_edge(height, width, 100) == resized[::-1]


def test_the_longest_edge_has_a_bound():
    assert longest_edge(1000, 2000, 5000) == (2048, 4096)


@pytest.mark.parametrize(
    ("width", "height", "rows", "columns"),
    [
        # S = 64, longest edge 256. 500x375 -> 256x192: 4 columns, 3 rows
        (500, 375, 3, 4),
        # 375x500 -> 192x256
        (375, 500, 4, 3),
        # 500x380 -> 256x194 -> width 256, height ceil(int(256 / 1.3196) / 64) = ceil(194 / 64) = 4
        (500, 380, 4, 4),
        # 640x10 -> 256x4 -> 256x64
        (640, 10, 1, 4),
    ],
)
def test_rows_and_columns_of_a_split(width, height, rows, columns):
    layout = Split(64, 256).layout(height, width)
    assert (layout.rows, layout.columns, layout.tiles) == (rows, columns, rows * columns + 1)


def test_a_split_of_one_tile_is_the_whole():
    transform = ImageTransform(64, fit="split", longest_edge=64)
    assert transform.layout(48, 60).tiles == 1
    assert transform(picture(60, 48)).shape == (1, 3, 64, 64)


def test_the_whole_comes_last_in_a_split():
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 64:] = 200
    tiles = ImageTransform(64, fit="split", longest_edge=128)(pixels)
    assert tiles.shape[0] == 3
    assert not tiles[0].any()
    assert bool((tiles[1] == 200).all())
    assert {int(tiles[2, 0, 0, 0]), int(tiles[2, 0, 0, 63])} == {0, 200}


# Qwen2-VL


@pytest.mark.parametrize(
    ("width", "height", "resized"),
    [
        # nearest multiples of 28: 640 / 28 = 22.86 -> 23 * 28 = 644; 480 / 28 = 17.14 -> 476
        (640, 480, (644, 476)),
        # halves to even, as Python rounds: 42 / 28 = 1.5 -> 2, 70 / 28 = 2.5 -> 2
        (42, 70, (56, 56)),
        # 4000x3000 would be 4004x2996 px: above 1,003,520. beta = sqrt(12,000,000 / 1,003,520) = 3.458; 4000 / 3.458 / 28 = 41.3 -> 41 * 28 = 1148,
        # 3000 / 3.458 / 28 = 30.98 -> 30 * 28 = 840
        (4000, 3000, (1148, 840)),
        # 20x20 would be 28x28 = 784 px: below 3,136. beta = sqrt(3136 / 400) = 2.8; 20 * 2.8 / 28 = 2 -> 56
        (20, 20, (56, 56)),
        # 10x10 would be 0x0: beta = 5.6, 10 * 5.6 / 28 = 2
        (10, 10, (56, 56)),
        # 1x200: beta = sqrt(3136 / 200) = 3.96: 1 * 3.96 -> 28, 200 * 3.96 / 28 = 28.28 -> 29 * 28 = 812
        (1, 200, (28, 812)),
    ],
)
def test_native_sizes(width, height, resized):
    layout = Native(28, 56 * 56, 28 * 28 * 1280).layout(height, width)
    assert (layout.width, layout.height, layout.tiles) == (*resized, 1)


def test_elongated_pictures_have_no_native_size():
    transform = ImageTransform(fit="native")
    assert transform(picture(2, 400)).shape[1] > 28
    with pytest.raises(ImageError, match="image-elongated"):
        transform(picture(2, 401))


@given(
    width=st.integers(1, 3000),
    height=st.integers(1, 3000),
    factor=st.sampled_from([28, 32]),
    least=st.integers(1, 40),
    more=st.integers(0, 60),
)
def test_native_sizes_are_those_of_transformers(width, height, factor, least, more):
    module = pytest.importorskip(
        "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl", reason="needs transformers 5"
    )
    bounds = least * factor**2, (least + more) * factor**2
    fit = Native(factor, *bounds)
    try:
        expected = module.smart_resize(height, width, factor, *bounds)
    except ValueError:
        with pytest.raises(ImageError, match="image-elongated"):
            fit.layout(height, width)
    else:
        layout = fit.layout(height, width)
        assert (layout.height, layout.width) == expected


# filters, colours


def by_pillow(pixels: np.ndarray, height: int, width: int, kind: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), kind))


@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    size=st.integers(1, 120),
    resample=st.sampled_from(["bicubic", "bilinear", "lanczos"]),
)
@settings(max_examples=60)
def test_every_filter_is_within_two_of_pillow(width, height, size, resample):
    pixels = picture(width, height)
    ours = ImageTransform(size, fit="squash", resample=resample)(pixels).permute(1, 2, 0).numpy()
    expected = by_pillow(pixels, size, size, Image.Resampling[resample.upper()])
    assert np.abs(ours.astype(int) - expected).max() <= (0 if resample == "lanczos" else 2)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("width", "height"), [(132, 272), (400, 1000), (50, 900), (1000, 400)])
def test_sharp_edges_keep_their_order_of_passes(width, height, resample):
    pixels = np.random.default_rng(0).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255
    ours = ImageTransform(107, fit="squash", resample=resample)(pixels).permute(1, 2, 0).numpy()
    expected = by_pillow(pixels, 107, 107, Image.Resampling[resample.upper()])
    assert np.abs(ours.astype(int) - expected).max() <= 2


def test_colours_of_padding():
    white = np.full((8, 16, 3), 255, np.uint8)

    def corner(**options):
        return ImageTransform(16, **options)(white)[..., 0, 0].reshape(-1, 3)[-1].tolist()

    assert corner(fit="pad") == [122, 116, 104]  # int(mean * 255)
    assert corner(fit="pad", mean=(0.5, 0.5, 0.5)) == [127, 127, 127]
    assert corner(fit="pad", background=(1, 2, 3)) == [1, 2, 3]
    upright = np.full((16, 8, 3), 255, np.uint8)
    for options, colour in [({}, [0, 0, 0]), ({"background": (9, 8, 7)}, [9, 8, 7])]:
        tiles = ImageTransform(16, fit="anyres", grid_pinpoints=[(16, 16)], **options)(upright)
        assert tiles[1, :, 0, 0].tolist() == colour
    assert tuple(int(value * 255) for value in CLIP_MEAN) == ImageTransform(fit="pad").padding


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grid_pinpoints", {"grid_pinpoints": [(336, 336)]}),
        ("pad_several", {"fit": "pad", "pad_several": True}),
        ("background", {"background": (0, 0, 0)}),
        ("background", {"fit": "pad", "background": (0, 0, 256)}),
        ("background", {"fit": "pad", "background": (0, 0.5, 0)}),
        ("longest_edge", {"longest_edge": 100}),
        ("min_pixels", {"min_pixels": 100}),
        ("max_pixels", {"fit": "anyres", "max_pixels": 100}),
        ("max_pixels", {"fit": "native", "max_pixels": 100}),
        ("resample", {"resample": "nearest"}),
        ("patch_size", {"fit": "native", "patch_size": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_that_mean_nothing_are_refused(name, options):
    with pytest.raises(UsageError, match=name):
        ImageTransform(**options)


FITS = [
    {"fit": "squash"},
    {"fit": "anyres"},
    {"fit": "split"},
    {"fit": "native", "max_pixels": 28 * 28 * 16},
]


@pytest.mark.parametrize("options", FITS, ids=lambda options: options["fit"])
def test_pictures_with_sides_beyond_all_are_refused(options):
    file = io.BytesIO()
    Image.new("1", (70_000, 400)).save(file, "PNG")
    with pytest.raises(ImageError, match="image-too-large"):
        ImageTransform(16, **options)(file.getvalue())


@pytest.mark.parametrize(
    "options", [{}, {"fit": "pad"}, *FITS], ids=lambda options: options.get("fit", "crop")
)
def test_what_has_no_pixels_has_no_layout(options):
    """Of images that cannot be read, sidecars say 0 x 0."""
    for size in ((0, 0), (0, 5), (5, 0)):
        with pytest.raises(ImageError, match="image-undecodable"):
            ImageTransform(16, **options).layout(*size)


@pytest.mark.parametrize("options", FITS, ids=lambda options: options["fit"])
def test_headers_tell_the_layout(options):
    transform = ImageTransform(32, **options)
    for kind in ("JPEG", "PNG"):
        file = io.BytesIO()
        Image.fromarray(picture(90, 61)).save(file, kind)
        prepared = transform.prepare(file.getvalue())
        assert transform.layout_of(file.getvalue()) == prepared.layout
        assert transform.layout_of(picture(90, 61)) == prepared.layout
        assert (prepared.size, prepared.nbytes) == ((61, 90), prepared.layout.nbytes)
    with pytest.raises(ImageError):
        transform.layout_of(b"no picture")


@pytest.mark.parametrize("options", FITS, ids=lambda options: options["fit"])
def test_a_call_into_and_write_agree(options):
    transform = ImageTransform(32, **options)
    pixels = picture(90, 61)
    called = transform(pixels)
    assert called.is_contiguous()
    out = torch.zeros_like(called)
    transform.into(pixels, out)
    assert torch.equal(out, called)
    prepared = transform.prepare(pixels)
    memory = np.zeros(prepared.nbytes, np.uint8)
    prepared.write(memory)
    tiles = torch.from_numpy(memory.reshape(prepared.tiles, *prepared.shape, 3)).permute(0, 3, 1, 2)
    assert torch.equal(tiles if transform.is_tiled else tiles[0], called)


def test_anyres_refuses_nothing_that_its_parts_can_do():
    assert AnyRes(16, ((32, 16),)).layout(1, 60_000).tiles == 3
