"""A small real LLaVA data set from the photographs that scikit-image ships, to try everything on without a download.

`make_demo` lays it out as LLaVA-CC3M-Pretrain-595K does: chat.json, metadata.json and a flat images.zip. Crops, scales, brightness and JPEG
qualities are drawn from a seed; captions and answers say what a crop shows, so that even a tiny model finds something to learn. What
real data sets trip converters with is in it too: see `_ROLES`.
"""

import fcntl
import json
import os
import random
import shutil
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm import tqdm

from shardify.errors import ShardifyError, UsageError

_FILES = ("chat.json", "images.zip", "metadata.json")
_MADE_WITH = "demo.json"  # written last: the demo is whole
_UNFINISHED = ".unfinished"
_VERSION = 1
_ZIP_DATE = (2024, 1, 1, 0, 0, 0)

_Role = Literal["caption", "dialogue", "text-only", "again", "several", "png", "missing", "truncated"]
# one record in so many; the rest, two thirds, are captions
_ROLES: tuple[tuple[_Role, int], ...] = (
    ("dialogue", 5),  # several turns about one picture; some with integer ids
    ("text-only", 25),
    ("again", 20),  # the id and picture of another record, with other turns
    ("several", 100),  # `image` is a list; of one picture, too
    ("png", 128),  # a PNG named .jpg
    ("missing", 256),  # no such picture in images.zip: to be set aside
    ("truncated", 256),  # a JPEG cut off: to be set aside
)
_ALWAYS: tuple[_Role, ...] = ("dialogue", "text-only", "again", "several", "png")
"""At least one record each, however few records there are."""

_LONG_SIDES, _LONG_SIDE_WEIGHTS = (800, 640, 500, 336), (15, 55, 20, 10)
_ASPECTS, _ASPECT_WEIGHTS = (4 / 3, 3 / 2, 16 / 9, 1.0, 3 / 4, 2 / 3), (35, 20, 5, 10, 20, 10)
_QUALITIES = (75, 85, 90, 90, 92, 95, 95)
_LIGHTS = {"dim": 0.6, "normal": 1.0, "bright": 1.35}
_WITHOUT_BLIP = 0.1


@dataclass(frozen=True, slots=True)
class _Photo:
    """A photograph as shipped: its file and what it shows."""

    file: str
    subject: str
    detail: str


_PHOTOS = (
    _Photo(
        "astronaut.png",
        "a smiling astronaut in an orange suit",
        "a flag and a model of the space shuttle stand behind her",
    ),
    _Photo("brick.png", "a wall of long narrow bricks", "the joints between the bricks are light"),
    _Photo("camera.png", "a man in a dark coat behind a camera", "the camera stands on a tripod on a lawn"),
    _Photo(
        "chelsea.png",
        "a tabby cat with green eyes",
        "the cat looks past the camera and has long white whiskers",
    ),
    _Photo(
        "coffee.png",
        "a cup of coffee on a red saucer",
        "a spoon lies on the saucer and the table is made of wood",
    ),
    _Photo("coins.png", "rows of old coins on a dark ground", "there are four rows of six coins"),
    _Photo("grass.png", "blades of grass and leaves", "the ground is covered all over"),
    _Photo("gravel.png", "a bed of gravel", "the stones are small and have sharp edges"),
    _Photo(
        "hubble_deep_field.jpg",
        "many far galaxies in a black sky",
        "some of the galaxies are blue and some are orange",
    ),
    _Photo("ihc.png", "stained tissue under a microscope", "the stain is brown and blue"),
    _Photo("moon.png", "the surface of the moon with craters", "one crater has a bright rim"),
    _Photo("motorcycle_left.png", "a red motorcycle in a garage", "shelves with boxes stand behind it"),
    _Photo("page.png", "a printed page about segmentation", "the page is darker on one side"),
    _Photo(
        "retina.jpg",
        "the back of an eye with its blood vessels",
        "the blood vessels spread from a bright spot",
    ),
    _Photo("rocket.jpg", "a rocket on its launch pad at dusk", "towers and lamps stand around it"),
)
_CAPTION_REQUESTS = (
    "Describe the picture in a few words.",
    "Give a short caption for this photo.",
    "Say briefly what the picture shows.",
    "What can be seen here? Keep it short.",
    "Summarise the photo in one line.",
)


@dataclass(frozen=True, slots=True)
class _Picture:
    """A crop of a photograph, and the facts that captions and answers are made of."""

    number: int
    photo: _Photo
    colour: bool
    part: str
    light: str
    width: int
    height: int

    @property
    def id(self) -> str:
        return f"GCC_train_{self.number:09d}"

    @property
    def file(self) -> str:
        return f"{self.id}.jpg"

    @property
    def caption(self) -> str:
        light = "" if self.light == "normal" else f" in {self.light} light"
        return f"{self.photo.subject}{light}, {self.part}."

    def questions(self) -> list[tuple[str, str]]:
        """Questions with their answers."""
        shape = "wide" if self.width > self.height else "tall" if self.width < self.height else "square"
        return [
            ("What does the picture show?", f"It shows {self.photo.subject}."),
            ("Which part of the photograph is this?", f"It is {self.part}."),
            ("How much light is there?", f"The light is {self.light}."),
            ("Is it in colour?", "Yes, it is in colour." if self.colour else "No, it is black and white."),
            ("Which shape does the picture have?", f"It is {shape}."),
            ("What else is there to say about the photograph?", f"{_sentence(self.photo.detail)}"),
        ]


def make_demo(folder: str | os.PathLike[str], *, samples: int = 512, seed: int = 0) -> None:
    """Make the demo data set: chat.json, metadata.json and images.zip, about 60 kB a record.

    The same samples, seed and library versions give the same bytes. Does nothing when the folder holds this demo already.

    Args:
        folder: is made, or must be empty.
        samples: records, at least 16. Under one in a hundred must be set aside by a converter, none of fewer than 256.
        seed: of the crops, scales, qualities and words.

    Raises:
        UsageError: the folder holds something else, another run makes a demo there, `samples` is too small, or scikit-image is
            not installed.
        ShardifyError: the files cannot be written.
    """
    if samples < 16:
        raise UsageError(f"a demo of {samples} records cannot hold what it should show; make at least 16")
    target = Path(folder).resolve()
    made_with = {"version": _VERSION, "samples": samples, "seed": seed}
    next_step = f"next: shardify pack {folder}/chat.json --images {folder}/images.zip --out data"
    if _is_made(target, made_with):
        print(f"{folder} holds this demo already; {next_step}")
        return
    existed = target.exists()
    # made inside its place, which may be the current folder or a mounted disk, and moved up when all is written
    unfinished = target / _UNFINISHED
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{target}: cannot be made ({error.strerror})") from None
    try:
        with open(unfinished / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"{target}: another run is making a demo there") from None
            try:
                files = _write_demo(unfinished, made_with)
                for name in (*files, _MADE_WITH):
                    (unfinished / name).rename(target / name)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        raise ShardifyError(
            f"{error.filename or target}: {error.strerror or error}; the demo was not finished, the same command again makes it"
        ) from None
    finally:
        if not existed:
            with suppress(OSError):  # not empty: the demo
                target.rmdir()
    print(f"{folder}: {samples} records, {sum(files.values()) / 1e6:.1f} MB; {next_step}")


def _write_demo(folder: Path, made_with: dict[str, int]) -> dict[str, int]:
    """Write the demo's files and what they were made with; returns their sizes by name."""
    photos = _load_photos()
    rng = random.Random(made_with["seed"])  # noqa: S311 - for variety, not secrets
    roles = _draw_roles(made_with["samples"], rng)
    pictures = _make_pictures(folder / "images.zip", roles, photos, rng)
    _write_json(folder / "chat.json", _make_records(roles, pictures, rng))
    _write_json(
        folder / "metadata.json", [_metadata(picture, rng) for _, picture in sorted(pictures.items())]
    )
    files = {name: (folder / name).stat().st_size for name in _FILES}
    libraries = {name: version(name) for name in ("scikit-image", "pillow")}
    _write_json(folder / _MADE_WITH, {"made_with": made_with, "libraries": libraries, "files": files})
    return files


def _is_made(target: Path, made_with: dict[str, int]) -> bool:
    """Whether the folder holds exactly this demo; False when it can be made.

    Raises:
        UsageError: it holds something else.
    """
    if target.is_dir():
        content = sorted(path.name for path in target.iterdir() if path.name != _UNFINISHED)
    elif target.exists():
        raise UsageError(f"{target}: is a file; name a folder for the demo")
    else:
        return False
    if not content:
        return False
    if _MADE_WITH not in content:
        if (target / _UNFINISHED).is_dir() and set(content) <= set(_FILES):
            return False  # killed between its last steps
        raise UsageError(
            f"{target}: holds other files ({', '.join(content[:3])}); name a new or empty folder for the demo"
        )
    try:
        known = json.loads((target / _MADE_WITH).read_bytes())
        found, files = known["made_with"], known["files"]
        whole = all((target / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        found, whole = None, False
    if found == made_with and whole:
        return True
    what = "a demo whose files were changed" if not whole else f"a demo made with {found}, not {made_with}"
    raise UsageError(f"{target}: holds {what}; delete it or name another folder")


def _load_photos() -> dict[_Photo, Image.Image]:
    spec = find_spec("skimage")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "the demo is made from the photographs in scikit-image: pip install 'shardify[demo]'"
        )
    folder = Path(spec.submodule_search_locations[0]) / "data"
    photos: dict[_Photo, Image.Image] = {}
    for photo in _PHOTOS:
        try:
            with Image.open(folder / photo.file) as image:
                image.load()
                photos[photo] = image.copy()
        except FileNotFoundError:
            raise UsageError(
                f"this scikit-image ({version('scikit-image')}) ships no {photo.file}: pip install -U 'shardify[demo]'"
            ) from None
    return photos


def _draw_roles(samples: int, rng: random.Random) -> list[_Role]:
    roles: list[_Role] = []
    for role, one_in in _ROLES:
        roles += [role] * max(samples // one_in, role in _ALWAYS)
    roles += ["caption"] * (samples - len(roles))
    rng.shuffle(roles)
    return roles


def _make_pictures(
    archive: Path, roles: list[_Role], photos: dict[_Photo, Image.Image], rng: random.Random
) -> dict[int, _Picture]:
    """Write images.zip; record number -> its own picture. Text-only records and those about others' pictures have none."""
    numbers = iter(sorted(rng.sample(range(3_000_000), len(roles))))
    pictures: dict[int, _Picture] = {}
    with zipfile.ZipFile(archive, "w") as images:
        for record, role in enumerate(tqdm(roles, desc="demo", unit=" records", disable=None)):
            number = next(numbers)
            if role in ("text-only", "again", "several"):
                continue
            picture, pixels = _crop(number, photos, rng, small=role == "png")
            pictures[record] = picture
            encoded = BytesIO()
            if role == "png":
                pixels.save(encoded, "PNG")
            else:
                pixels.save(encoded, "JPEG", quality=rng.choice(_QUALITIES))
            data = encoded.getvalue()
            if role == "truncated":
                data = data[: len(data) * 3 // 5]
            if role != "missing":
                entry = zipfile.ZipInfo(picture.file, _ZIP_DATE)
                entry.create_system, entry.external_attr = (
                    3,
                    0o644 << 16,
                )  # as written on Unix, wherever it is
                images.writestr(entry, data)
    return pictures


def _crop(
    number: int, photos: dict[_Photo, Image.Image], rng: random.Random, *, small: bool
) -> tuple[_Picture, Image.Image]:
    # black and white pictures are the exception, as they are on the web
    photo = rng.choices(_PHOTOS, [1 if photos[photo].mode == "L" else 3 for photo in _PHOTOS])[0]
    image = photos[photo]
    long_side = _LONG_SIDES[-1] if small else rng.choices(_LONG_SIDES, _LONG_SIDE_WEIGHTS)[0]
    aspect = rng.choices(_ASPECTS, _ASPECT_WEIGHTS)[0]
    width, height = (
        (long_side, round(long_side / aspect)) if aspect >= 1 else (round(long_side * aspect), long_side)
    )
    zoom = rng.uniform(0.7, 1.0) * min(image.width / width, image.height / height)
    left = rng.uniform(0, image.width - width * zoom)
    top = rng.uniform(0, image.height - height * zoom)
    box = (left, top, left + width * zoom, top + height * zoom)
    light = rng.choices(list(_LIGHTS), (1, 2, 1))[0]
    pixels = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if light != "normal":
        table = [min(255, round(value * _LIGHTS[light])) for value in range(256)]
        pixels = pixels.point(table * len(pixels.getbands()))
    x, y = (box[0] + box[2]) / 2 / image.width - 0.5, (box[1] + box[3]) / 2 / image.height - 0.5
    across = "left" if x < -0.06 else "right" if x > 0.06 else ""
    down = "upper" if y < -0.06 else "lower" if y > 0.06 else ""
    part = f"the {' '.join(filter(None, (down, across)))} part" if across or down else "the middle"
    return _Picture(number, photo, len(pixels.getbands()) > 1, part, light, width, height), pixels


def _make_records(
    roles: list[_Role], pictures: dict[int, _Picture], rng: random.Random
) -> list[dict[str, Any]]:
    sound = [pictures[record] for record, role in enumerate(roles) if role in ("caption", "dialogue", "png")]
    records: list[dict[str, Any]] = []
    made = dict.fromkeys(roles, 0)
    for number, role in enumerate(roles):
        if role == "text-only":
            record = _text_only(made[role], rng)
        elif role == "several":
            # every second list is of one
            record = _about_several(rng.sample(sound, 1 if made[role] % 2 else rng.randint(2, 3)), rng)
        elif role == "dialogue":
            picture = pictures[number]
            # some question sets number their records
            record_id = picture.number if made[role] % 6 == 0 else picture.id
            record = {"id": record_id, "image": picture.file, "conversations": _dialogue(picture, rng)}
        elif role == "again":
            picture = rng.choice(sound)
            record = {"id": picture.id, "image": picture.file, "conversations": _dialogue(picture, rng)}
        else:
            picture = pictures[number]
            record = {"id": picture.id, "image": picture.file, "conversations": _caption(picture, rng)}
        made[role] += 1
        records.append(record)
    return records


def _caption(picture: _Picture, rng: random.Random) -> list[dict[str, str]]:
    request = rng.choice(_CAPTION_REQUESTS)
    # mostly on the last line, as in CC3M; LLaVA-Pretrain has both
    asked = f"<image>\n{request}" if rng.random() < 0.25 else f"{request}\n<image>"
    return _turns([(asked, picture.caption)])


def _dialogue(picture: _Picture, rng: random.Random) -> list[dict[str, str]]:
    questions = picture.questions()
    pairs = rng.sample(questions, rng.randint(2, len(questions)))
    (first, answer), *rest = pairs
    return _turns([(f"<image>\n{first}", answer), *rest])


def _about_several(pictures: list[_Picture], rng: random.Random) -> dict[str, Any]:
    lines = "<image>\n" * len(pictures)
    request = "What do these pictures show?" if len(pictures) > 1 else rng.choice(_CAPTION_REQUESTS)
    answer = _sentence("; ".join(picture.photo.subject for picture in pictures))
    return {
        "id": f"several_{pictures[0].number}",
        "image": [picture.file for picture in pictures],
        "conversations": _turns([(lines + request, answer)]),
    }


def _text_only(number: int, rng: random.Random) -> dict[str, Any]:
    """As the ShareGPT records of mix665k: no field ``image``, a field ``model``."""
    pairs = [
        (f"Imagine a photograph of {photo.subject}. What else could be in it?", _sentence(photo.detail))
        for photo in rng.sample(_PHOTOS, rng.randint(1, 3))
    ]
    name = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz23456789", k=7))
    return {"id": f"{name}_{number}", "model": "", "conversations": _turns(pairs)}


def _turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"from": role, "value": value}
        for pair in pairs
        for role, value in zip(("human", "gpt"), pair, strict=True)
    ]


def _metadata(picture: _Picture, rng: random.Random) -> dict[str, Any]:
    entry = {
        "id": picture.id,
        "image": picture.file,
        "caption": picture.caption,
        "blip_caption": f"a photo of {picture.photo.subject}",
        "url": "https://scikit-image.org/docs/stable/api/skimage.data.html",
    }
    if rng.random() < _WITHOUT_BLIP:
        del entry["blip_caption"]
    return entry


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=None, ensure_ascii=False) + "\n", encoding="utf-8")
