"""How shards, sidecars and keys are named.

000.tar  000.parquet  001.tar  001.parquet ...  index.npy  manifest.json  quarantine.jsonl
"""

from pathlib import PurePath

TAR = ".tar"
TAR_ZST = ".tar.zst"
SHARD_ENDINGS = (TAR, TAR_ZST)
ZSTD = "zstd"
"""The one compression of shards, as options and settings name it; ``""`` is none."""
SIDECAR = ".parquet"
INDEX = "index.npy"
MANIFEST = "manifest.json"
QUARANTINE = "quarantine.jsonl"
WORK_FOLDER = ".packing"
"""Holds unfinished files while a data set is written; gone when it is done."""
PLAN = f"{WORK_FOLDER}/plan.json"
"""What is being written; there before the first shard is."""

RECORD_FIELD = "json"
"""The member that holds the record."""

IMAGE_FORMATS = {
    **{
        name: name for name in ("jpg", "png", "gif", "webp", "bmp", "tif", "avif", "jp2", "ppm", "ico", "qoi")
    },
    **dict.fromkeys(("jpeg", "jpe", "jfif", "mpo"), "jpg"),
    **dict.fromkeys(("j2k", "j2c", "jpx", "jpf"), "jp2"),
    **dict.fromkeys(("pgm", "pbm", "pnm"), "ppm"),
    "tiff": "tif",
    "apng": "png",
    "dib": "bmp",
}
"""Extensions that images go by, in lower case -> the name of their format."""

_MIN_SHARD_DIGITS = 3
_MIN_KEY_DIGITS = 9


def shard_name(number: int, count: int, compress: str = "") -> str:
    """The name of shard `number` of `count`, zero-padded to at least three digits: ``007.tar``, compressed ``007.tar.zst``."""
    return f"{number:0{max(_MIN_SHARD_DIGITS, len(str(count - 1)))}d}{TAR_ZST if compress else TAR}"


def shard_stem(shard: str) -> str:
    """A shard's name or path without its ending: ``data/007`` of ``data/007.tar`` and of ``data/007.tar.zst``; ``data/x`` of ``data/x.y``."""
    for ending in (TAR_ZST, TAR):
        if shard.endswith(ending):
            return shard.removesuffix(ending)
    return str(PurePath(shard).with_suffix(""))


def sidecar_name(shard: str) -> str:
    """The sidecar's name beside a shard: ``007.tar`` -> ``007.parquet``, as of ``007.tar.zst``."""
    return shard_stem(shard) + SIDECAR


def key_digits(records: int) -> int:
    """How many digits a key has in a plan of `records` records: nine, or those of the largest position."""
    return max(_MIN_KEY_DIGITS, len(str(records - 1)))


def sample_key(position: int, digits: int) -> str:
    """The key of the sample at `position` of the planned order: ``000000042``."""
    return f"{position:0{digits}d}"


def image_field(number: int, image_format: str, *, is_list: bool) -> str:
    """The member field of an image: ``jpg``, or ``0.jpg`` when the record's ``image`` is a list."""
    return f"{number}.{image_format}" if is_list else image_format


def is_image_field(field: str) -> bool:
    """Whether a member is an image by its name: ``jpg``, ``0.png``, ``image.JPEG``, in shards of any origin."""
    return field.rpartition(".")[2].lower() in IMAGE_FORMATS
