"""Image processors of transformers, read as settings of `ImageTransform`. Nothing of transformers is imported: their `to_dict` says all."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any

from loaders.image import CLIP_MEAN, CLIP_STD
from shardify.errors import UsageError

Settings = Mapping[str, Any]

_FILES = ("preprocessor_config.json", "processor_config.json")
_FILTERS = {1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
_RESCALE = 1 / 255
_HALF = (0.5, 0.5, 0.5)


def settings_of(processor: Any) -> dict[str, Any]:
    """An image processor's settings.

    Args:
        processor: one of transformers, or something that has one as `image_processor`; settings; or the path of a file of them, or of its folder.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(processor, str | os.PathLike):
        processor = _read(os.fspath(processor))
    if not isinstance(processor, Mapping):
        processor = getattr(processor, "image_processor", processor)
        if not callable(getattr(processor, "to_dict", None)):
            raise UsageError(
                f"{type(processor).__name__} is no image processor: it has no to_dict(); a path or a dict of settings will do"
            )
        processor = processor.to_dict()
    return dict(processor.get("image_processor", processor))  # a processor_config.json has it inside


def transform_arguments(settings: Settings) -> dict[str, Any]:
    """What to call `ImageTransform` with, so that it does what these settings say.

    Raises:
        UsageError: a setting that cannot be honoured, or a kind of processor that is not known.
    """
    kind = _kind(settings)
    try:
        return _arguments(kind, settings)
    except (TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{kind}: these settings cannot be read ({error}): {dict(settings)}") from None


def _arguments(kind: str, settings: Settings) -> dict[str, Any]:
    for name in ("do_resize", "do_rescale"):
        if settings.get(name) is False:
            raise _refused(kind, settings, name, "pictures are always resized, and normalised from 0 to 1")
    if abs((settings.get("rescale_factor") or _RESCALE) - _RESCALE) > 1e-6:
        raise _refused(kind, settings, "rescale_factor", "pixels are divided by 255")
    default, mean, std, read = _KINDS[kind]
    resample = settings.get("resample")
    resample = default if resample is None else int(resample)
    if resample not in _FILTERS:
        raise _refused(kind, settings, "resample", f"there are {', '.join(_FILTERS.values())}")
    arguments: dict[str, Any] = {"resample": _FILTERS[resample]}
    if settings.get("do_normalize") is False:
        arguments |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    else:
        arguments |= {
            "mean": _channels(settings.get("image_mean"), mean),
            "std": _channels(settings.get("image_std"), std),
        }
    return arguments | read(kind, settings)


def _channels(value: Any, default: tuple[float, ...]) -> Any:
    """One value for each channel; a single one is for all."""
    if value is None:
        return default
    return (value,) * 3 if isinstance(value, int | float) else value


def _read(path: str) -> Any:
    if os.path.isdir(path):
        found = [name for name in _FILES if os.path.exists(os.path.join(path, name))]
        if not found:
            raise UsageError(f"{path}: no {' or '.join(_FILES)} in it")
        path = os.path.join(path, found[0])
    try:
        with open(path, "rb") as file:
            settings = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: settings of an image processor cannot be read ({error})") from None
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: settings are a JSON object, this is {type(settings).__name__}")
    return settings


def _kind(settings: Settings) -> str:
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    if named is None:  # files of old models do not say
        telling = {
            "merge_size": "Qwen2VLImageProcessor",
            "max_image_size": "Idefics3ImageProcessor",
            "image_grid_pinpoints": "LlavaNextImageProcessor",
        }
        return next((kind for key, kind in telling.items() if key in settings), "CLIPImageProcessor")
    kind = str(named).removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
    if kind not in _KINDS:
        raise UsageError(f"no transform for a {named}; there are some for {', '.join(_KINDS)}")
    return kind


def _one_picture(kind: str, settings: Settings) -> dict[str, Any]:
    """CLIP, SigLIP, LLaVA: one square."""
    shortest, square = _sizes(kind, settings, default=224)
    padded = bool(settings.get("do_pad"))
    if padded and kind != "LlavaImageProcessor":
        raise _refused(kind, settings, "do_pad", "pictures come out in one size")
    _check_crop(kind, settings, shortest or square, needed=square is None and not padded)
    if padded:
        return {"size": shortest or square, "fit": "pad"}
    return {"size": shortest, "fit": "crop"} if square is None else {"size": square, "fit": "squash"}


def _grid_of_tiles(kind: str, settings: Settings) -> dict[str, Any]:
    """LLaVA-NeXT, LLaVA-OneVision."""
    several = kind == "LlavaOnevisionImageProcessor"
    shortest, square = _sizes(kind, settings, default=384 if several else 224)
    size = shortest or square
    assert size is not None
    _check_crop(kind, settings, size, needed=False)
    if settings.get("do_pad") is False:
        raise _refused(kind, settings, "do_pad", "`Batch.to_hf` pads the tiles of a picture")
    pinpoints = settings.get("image_grid_pinpoints")
    if pinpoints is None:
        raise _refused(kind, settings, "image_grid_pinpoints", "the grids must be said")
    # transformers has (height, width), LLaVA and its text form (width, height)
    pairs = pinpoints if isinstance(pinpoints, str) else [(width, height) for height, width in pinpoints]
    return {"size": size, "fit": "anyres", "grid_pinpoints": pairs, "pad_several": several}


def _ragged(kind: str, settings: Settings) -> dict[str, Any]:
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""
    size = settings.get("size") or {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or size.get("min_pixels")
    most = settings.get("max_pixels") or size.get("longest_edge") or size.get("max_pixels")
    if size and not (least and most):
        raise _refused(kind, settings, "size", "shortest_edge and longest_edge are needed, in pixels")
    patches = {
        name: settings[name]
        for name in ("patch_size", "merge_size", "temporal_patch_size")
        if settings.get(name) is not None
    }
    return {"fit": "native", "min_pixels": least, "max_pixels": most, **patches}


def _split(kind: str, settings: Settings) -> dict[str, Any]:
    """Idefics3, SmolVLM."""
    tile = (settings.get("max_image_size") or {"longest_edge": 364}).get("longest_edge")
    longest = (settings.get("size") or {"longest_edge": 4 * 364}).get("longest_edge")
    if tile is None:
        raise _refused(kind, settings, "max_image_size", "longest_edge is needed")
    if longest is None:
        raise _refused(kind, settings, "size", "longest_edge is needed")
    split = settings.get("do_image_splitting") is not False
    return {"size": tile, "fit": "split" if split else "squash", "longest_edge": longest}


def _sizes(kind: str, settings: Settings, *, default: int) -> tuple[int | None, int | None]:
    """The size of the shorter edge, or the side of the square: one of them."""
    size = settings.get("size")
    if size is None:
        size = default
    if isinstance(size, int):
        size = {"shortest_edge": size} if kind in _BY_EDGE else {"height": size, "width": size}
    if isinstance(size, list | tuple) and len(size) == 2:
        size = dict(zip(("height", "width"), size, strict=True))
    size = {name: value for name, value in dict(size).items() if value is not None}
    if size.keys() == {"shortest_edge"}:
        return int(size["shortest_edge"]), None
    if size.keys() == {"height", "width"} and size["height"] == size["width"]:
        return None, int(size["height"])
    raise _refused(
        kind, settings, "size", "squares are made: shortest_edge, or height and width that are equal"
    )


def _check_crop(kind: str, settings: Settings, size: int | None, *, needed: bool) -> None:
    """The centre that is cut out must be the square that comes out."""
    cropped = settings.get("do_center_crop", kind in _BY_EDGE)
    if not cropped:
        if needed:
            raise _refused(kind, settings, "do_center_crop", "without it pictures come out in many sizes")
        return
    crop: Any = settings.get("crop_size")
    if crop is None:
        crop = 224 if kind in _BY_EDGE else size
    sides = (crop, crop) if isinstance(crop, int) else (crop.get("height"), crop.get("width"))
    if sides != (size, size):
        raise _refused(kind, settings, "crop_size", f"only the size itself, {size} px, can be cut out")


def _refused(kind: str, settings: Settings, name: str, why: str) -> UsageError:
    return UsageError(f"{kind}: {name}={settings.get(name)!r} cannot be honoured: {why}")


_BY_EDGE = ("CLIPImageProcessor", "LlavaImageProcessor", "LlavaNextImageProcessor")
_Reader = Callable[[str, Settings], dict[str, Any]]
# what a file that does not say means: filter, mean, std (transformers 5, image_processing_*.py)
_KINDS: dict[str, tuple[int, tuple[float, ...], tuple[float, ...], _Reader]] = {
    "CLIPImageProcessor": (3, CLIP_MEAN, CLIP_STD, _one_picture),
    "SiglipImageProcessor": (3, _HALF, _HALF, _one_picture),
    "LlavaImageProcessor": (3, CLIP_MEAN, CLIP_STD, _one_picture),
    "LlavaNextImageProcessor": (3, CLIP_MEAN, CLIP_STD, _grid_of_tiles),
    "LlavaOnevisionImageProcessor": (3, CLIP_MEAN, CLIP_STD, _grid_of_tiles),
    "Qwen2VLImageProcessor": (3, CLIP_MEAN, CLIP_STD, _ragged),
    "Idefics3ImageProcessor": (1, _HALF, _HALF, _split),
    "SmolVLMImageProcessor": (1, _HALF, _HALF, _split),
}
