"""Finding the loader's state in a checkpoint file: JSON, or torch's, wherever in it the state is kept."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from loaders.state import State, is_state
from shardify.errors import FormatError, UsageError

_MAX_DEPTH = 32
_SHOWN = 5


def read_state(path: str | os.PathLike[str], at: str | None = None) -> State:
    """The loader's state in a file.

    Args:
        path: JSON, or what torch.save has written, of which no tensor is read.
        at: where in the file, such as ``train.loader``; needed when it holds several that differ.

    Raises:
        FormatError: the file cannot be read.
        UsageError: it holds no state, or several, with where.
    """
    where = os.fspath(path)
    found = dict(_states(_content(where)))
    if at is not None:
        if at not in found:
            raise UsageError(f"{where}: no loader state at {at!r}{_there(found)}")
        return found[at]
    if not found:
        raise UsageError(
            f"{where}: no loader state in it; a checkpoint keeps what loader.state_dict() or batch.state gave, as a dict"
        )
    state, *others = found.values()
    if any(other != state for other in others):
        raise UsageError(f"{where}: several loader states{_there(found)}; say which with --state")
    return state


def _there(found: Mapping[str, State]) -> str:
    names = [name or "the whole file" for name in found]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"; there are {', '.join(names[:_SHOWN])}{more}" if names else ""


def _states(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """Every state in a value, with the way to it."""
    if is_state(value):
        yield name, dict(value)
    elif depth < _MAX_DEPTH:  # what is nested deeper may hold itself
        items: Any = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple):
            items = enumerate(value)
        for key, inner in items:
            if isinstance(inner, Mapping | list | tuple):
                yield from _states(inner, f"{name}.{key}" if name else str(key), depth + 1)


def _content(path: str) -> Any:
    try:
        with open(path, "rb") as file:
            is_json = file.read(1024).lstrip()[:1] in {b"{", b"["}
            if is_json:
                file.seek(0)
                return msgspec.json.decode(file.read())
    except IsADirectoryError:
        raise UsageError(f"{path}: a folder; give the file in it that holds the loader's state") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise FormatError(f"{path}: not JSON ({error})") from None
    return _load(path)


def _load(path: str) -> Any:
    import torch

    def load(*, mmap: bool) -> Any:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)

    try:
        try:
            return load(mmap=True)
        except RuntimeError:  # written in the old format, which cannot be mapped
            return load(mmap=False)
    except Exception as error:  # noqa: BLE001 - torch raises what its parsers do
        first = str(error).strip().split("\n")[0]
        raise FormatError(
            f"{path}: neither JSON nor a torch checkpoint that weights_only=True can read ({type(error).__name__}: {first}); keep the loader's"
            " state as JSON beside it"
        ) from None
