"""URLs of data sets and objects, as text: nothing here reaches for them.

s3://BUCKET/KEY   gs://BUCKET/KEY   az://CONTAINER/KEY   https://HOST/PATH   hf://datasets/ORG/NAME[@REVISION]/PATH
"""

from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from shardify.errors import UsageError

WRITABLE = ("s3", "gs", "az")
"""Stores that can be written and listed."""
READABLE = (*WRITABLE, "https", "http", "hf")

MAIN_REVISION = "main"
"""Of a data set on the Hugging Face hub, when its URL names none."""

_WEB = ("https", "http")


def is_url(place: str) -> bool:
    """Whether a place is meant as a URL and not as a path."""
    return "://" in place


@dataclass(frozen=True, slots=True)
class Place:
    """A URL's parts: `scheme` of `READABLE`, `bucket` (of https:// the host), and `key` without slashes at its ends.

    Of ``hf://datasets/org/name@revision/a/b`` the bucket is ``datasets/org/name@revision``; the revision main goes without saying.
    """

    scheme: str
    bucket: str
    key: str


def split_url(url: str) -> Place:
    """The parts of a URL.

    Raises:
        UsageError: it is none of an object store, names no bucket, or its path cannot be a key.
    """
    scheme, separator, rest = url.partition("://")
    scheme = {"s3a": "s3", "azure": "az"}.get(scheme.lower(), scheme.lower())
    if not separator or scheme not in READABLE:
        raise UsageError(
            f"{shown(url)}: not a place that is known; s3://, gs://, az://, https:// and hf:// are"
        )
    if scheme in WRITABLE:
        bucket, _, key = rest.partition("/")
    elif scheme == "hf":
        bucket, key = _split_hub(url, rest)
    else:
        parts = urlsplit(url)
        bucket, key = parts.netloc.lower(), unquote(parts.path)
        if parts.query or "@" in bucket:
            raise UsageError(
                f"{shown(url)}: a password, signature or query in a URL would stand in files and messages; give one without"
            )
    if not bucket:
        raise UsageError(f"{shown(url)}: no bucket is named; {scheme}://BUCKET/PREFIX is needed")
    key = key.strip("/")
    if key and any(part in ("", ".", "..") for part in key.split("/")):
        raise UsageError(f"{shown(url)}: a path with an empty part, '.' or '..' is none of an object")
    return Place(scheme, bucket, key)


def _split_hub(url: str, rest: str) -> tuple[str, str]:
    kind, org, name, key = [*rest.split("/", 3), "", "", ""][:4]
    name, _, revision = name.partition("@")
    if kind != "datasets" or not org or not name:
        raise UsageError(
            f"{shown(url)}: hf://datasets/ORG/NAME/PATH or hf://datasets/ORG/NAME@REVISION/PATH is needed"
        )
    revision = unquote(revision) or MAIN_REVISION
    return f"{kind}/{org}/{name}" + (f"@{revision}" if revision != MAIN_REVISION else ""), key


def join_url(url: str, name: str) -> str:
    """The URL of what is called `name` below `url`."""
    is_web = url.partition("://")[0].lower() in _WEB
    return f"{url.rstrip('/')}/{quote(name) if is_web else name}"


def split_name(url: str) -> tuple[str, str]:
    """The URL above and the name that `join_url` made it of.

    Raises:
        UsageError: as `split_url`.
    """
    name = split_url(url).key.rpartition("/")[2]
    return (url.rstrip("/").rpartition("/")[0] if name else url), name


def shown(url: str) -> str:
    """A URL for messages, without what may be secret."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path.partition('?')[0]}"
