"""Which object store a URL names, how it is reached, and what its errors mean to a person.

Credentials, endpoint and region come from where the store's own tools have them (docs/remote.md). Requests are repeated with growing,
jittered pauses when the store or the way to it fails. Of an answer a message holds the status and the code only: bodies may hold signatures.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from obstore.exceptions import BaseError, NotSupportedError
from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

from shardify.errors import PackError, UsageError
from shardify.format.files import user_cache
from shardify.format.urls import MAIN_REVISION, WRITABLE, shown, split_url

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig, S3Credential

_DEFAULT_HUB = "https://huggingface.co"

_RETRIES = 8
_DEADLINE = timedelta(minutes=3)  # of one request with all its repetitions
_TIMEOUT = timedelta(minutes=1)  # of one try, its body included
_CONNECT_TIMEOUT = timedelta(seconds=10)
_CREDENTIALS_KEPT = timedelta(minutes=5)  # then they are asked for again: they may have been renewed

_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
_TRUE = ("1", "true", "yes", "on")
_STATUS = re.compile(r"status code: ([0-9]{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")
_ADDRESS = re.compile(r"[a-z]+://\S+")
_NAMED = re.compile(r'[Pp]ath "([^"\n]{1,200})')
_MACHINE = (
    "//169.254.169.254/",
    "//metadata.google.internal/",
)  # where cloud machines find their credentials
_UNREACHABLE = ("error sending request", "HTTP error", "timed out", "error decoding response body")
_NO_CREDENTIALS = {
    "s3": "no AWS credentials were found: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (which needs boto3: pip install "
    "'shardify[aws]'), or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gs": "no Google credentials were found: set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "no Azure credentials were found: set AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true for a "
    "public container",
}

_started = False  # this process has made a client
_lost = False  # this process was forked from one that had


def require_writable(url: str) -> None:
    """Raises UsageError for a place that can only be read."""
    if split_url(url).scheme not in WRITABLE:
        raise UsageError(f"{shown(url)}: can be read, not written; s3://, gs:// and az:// can")


def open_bucket(url: str, *, once: timedelta | None = None) -> "tuple[ObjectStore, str]":
    """The client for a URL's bucket, one for each process, and the key. Only for processes that fork no more (`child.in_child`).

    Args:
        url: of an object or a prefix.
        once: try a request once, and let it take as long as this; None repeats it when it fails.

    Raises:
        UsageError: no such URL.
        PackError: there are no credentials, or they cannot be used.
    """
    global _started  # noqa: PLW0603 - what this process has done
    if _lost:
        raise RuntimeError("forked from a process that had called an object store: calls would never return")
    place = split_url(url)
    _started = True
    return _client(place.scheme, place.bucket, once), place.key


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what obstore raises into one clear PackError."""
    try:
        yield
    except (BaseError, ValueError, OSError) as error:
        raise PackError(f"{shown(url)}: {_meaning(error, split_url(url).scheme)}") from None


def error_code(error: Exception) -> str:
    """The store's own code in an error, such as ``NoSuchKey``; empty when there is none."""
    return next(iter(_CODE.findall(str(error))), "")


def is_missing_bucket(error: Exception) -> bool:
    """Whether it is not the object that is missing but its whole bucket."""
    return error_code(error) in ("NoSuchBucket", "ContainerNotFound")


def _meaning(error: Exception, scheme: str) -> str:
    text = str(error)
    status, code = next(iter(_STATUS.findall(text)), ""), error_code(error)
    told = " ".join(filter(None, (status, code)))
    if scheme in _NO_CREDENTIALS and any(address in text for address in _MACHINE):
        return f"{_NO_CREDENTIALS[scheme]}; docs/remote.md lists what else there is"
    if is_missing_bucket(error):
        return "there is no such bucket; create it, or check its name and the endpoint"
    if status in ("401", "403") and scheme == "hf":
        return (
            f"access is denied ({told}): no such data set, or a private or gated one; set HF_TOKEN or run `hf auth login`, and accept the "
            "conditions on the data set's page if it has any"
        )
    if status in ("401", "403"):
        return (
            f"access is denied ({told}); check the credentials, and that they may read, list and write there"
        )
    if "Received redirect" in text or status in ("301", "307") or code == "AuthorizationHeaderMalformed":
        return "the bucket is in another region; set AWS_REGION"
    if status == "412":
        return "has changed while it was read; run the same command again"
    if status == "416":
        return "is shorter than it was; run the same command again"
    if isinstance(error, NotSupportedError) and "Range" in text:
        return "the server gives no byte ranges, only whole files"
    if "invalid path" in text:
        name = next(iter(_NAMED.findall(text)), "?")
        return f"holds an object whose name is no path ({name!r}: an empty part, '.', '..' or a control character); rename it"
    if status:
        return f"the store answered {told}, after several tries; once it is well, the same command again continues"
    if any(word in text for word in _UNREACHABLE):
        return "cannot be reached, after several tries; check the network and the endpoint. Once it can, the same command again continues"
    first = _ADDRESS.sub("(address)", text.partition("\n")[0])[:200]
    return f"{type(error).__name__}: {first}"


@functools.cache
def _client(scheme: str, bucket: str, once: timedelta | None) -> "ObjectStore":
    retry: RetryConfig = {
        "max_retries": 0 if once else _retries(scheme),
        "retry_timeout": _DEADLINE,
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=10),
            "base": 2,
        },
    }
    client: ClientConfig = {"timeout": once or _TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT}
    endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS.get(scheme, ()))), "")
    settings: Any = {}
    provide = None
    if scheme == "s3":
        settings, provide = _aws_settings(endpoint)
    # without TLS only where the user's own settings say so
    if (
        scheme == "http"
        or settings.get("endpoint", endpoint).lower().startswith("http://")
        or (scheme == "az" and _is_set("AZURE_STORAGE_USE_EMULATOR"))
    ):
        client["allow_http"] = True
    if scheme == "s3":
        return S3Store(
            bucket,
            config=settings,
            credential_provider=provide,
            client_options=client,
            retry_config=retry,
        )
    if scheme == "gs":
        return GCSStore(bucket, client_options=client, retry_config=retry)
    if scheme == "az":
        return AzureStore(bucket, client_options=client, retry_config=retry)
    if scheme == "hf":
        address, headers = _hub(bucket)
        client["allow_http"] = address.startswith("http://")
        # the client passes it on to no other host, and a redirect leads to one
        client["default_headers"] = headers
        return HTTPStore(address, client_options=client, retry_config=retry)
    return HTTPStore(f"{scheme}://{bucket}", client_options=client, retry_config=retry)


def _hub(bucket: str) -> tuple[str, dict[str, str]]:
    """Where the Hugging Face hub has a data set's files, and the headers to send there."""
    name, _, revision = bucket.partition("@")
    endpoint = (os.environ.get("HF_ENDPOINT") or _DEFAULT_HUB).rstrip("/")
    address = f"{endpoint}/{name}/resolve/{quote(revision or MAIN_REVISION, safe='')}"
    token = _hub_token()
    if not token:
        return address, {}
    if not (token.isascii() and token.isprintable()):
        raise PackError(
            "the Hugging Face token (HF_TOKEN, or the file of `hf auth login`) has characters that no token has"
        )
    return address, {"Authorization": f"Bearer {token}"}


def _hub_token() -> str:
    """As huggingface_hub finds it: from the environment, else from the file that `hf auth login` writes."""
    if _is_set("HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        return ""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            return token
    home = os.environ.get("HF_HOME") or os.path.join(user_cache(), "huggingface")
    path = os.path.expanduser(os.environ.get("HF_TOKEN_PATH") or os.path.join(home, "token"))
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeError):
        raise PackError(f"{path}: the Hugging Face token cannot be read; set HF_TOKEN") from None


def _retries(scheme: str) -> int:
    attempts = os.environ.get("AWS_MAX_ATTEMPTS", "") if scheme == "s3" else ""
    return max(0, int(attempts) - 1) if attempts.isdecimal() else _RETRIES


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in _TRUE


def _aws_settings(endpoint: str) -> "tuple[Any, Callable[[], S3Credential] | None]":
    """What obstore does not find in the environment by itself: profiles, SSO and all else that botocore knows."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or _is_set("AWS_SKIP_SIGNATURE"):
        return {}, None
    if not importlib.util.find_spec("botocore"):
        if os.environ.get("AWS_PROFILE"):
            raise PackError("AWS_PROFILE is set, but profiles are read by boto3: pip install 'shardify[aws]'")
        return {}, None
    import botocore.session  # type: ignore[import-untyped]
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]

    try:
        session = botocore.session.Session()
        found = session.get_credentials()
        region = session.get_config_variable("region")
        endpoint = endpoint or session.get_scoped_config().get("endpoint_url", "")
    except BotoCoreError as error:
        raise PackError(f"the AWS profile cannot be used: {error}") from None
    if found is None:
        raise PackError(_NO_CREDENTIALS["s3"])

    def provide() -> "S3Credential":
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _CREDENTIALS_KEPT,
        }

    settings = {"region": region, "endpoint": endpoint}
    return {name: value for name, value in settings.items() if value}, provide


def _forked() -> None:
    global _lost  # noqa: PLW0603
    _lost = _started


os.register_at_fork(after_in_child=_forked)
