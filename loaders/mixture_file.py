"""Mixtures as YAML files.

    parts:
      chat:
        shards: chat/{000..063}.tar    # from this file's folder; a list, a folder or a URL too
        repeat: 1
      captions:
        shards: [cc3m, laion/manifest.json]
        repeat: 1/3

With ``weight`` in the place of every ``repeat`` the numbers are weights of an endless stream, and ``samples`` beside ``parts`` may say
how many draws an epoch has.
"""

import os
from collections.abc import Iterator
from typing import Any

import yaml

from loaders.mixture import Repeat, Shards, rate_of
from shardify.errors import UsageError

_MAX_BYTES = 16 * 1024 * 1024


def read_mixture(
    path: str | os.PathLike[str],
) -> tuple[dict[str, tuple[Shards, Repeat]], bool, int | None]:
    """The arguments of `Mixture` from a file: parts, whether their numbers are weights, and samples.

    Raises:
        UsageError: it cannot be read, or is no mixture, with file, line and field.
    """
    where = os.fspath(path)
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UsageError(f"{where}: more than {_MAX_BYTES} bytes; a mixture is a short file")
        root = yaml.compose(content, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"{where}: cannot be read ({error.strerror or error})") from None
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if root is None:
        raise UsageError(f"{where}: an empty file; a mixture has 'parts'")
    return _Reader(where).mixture(root)


class _Reader:
    """Takes the tree of a file apart; `where` names the file."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._folder = os.path.dirname(where)

    def mixture(self, root: yaml.Node) -> tuple[dict[str, tuple[Shards, Repeat]], bool, int | None]:
        top = dict(self._pairs(root, "the file", ("parts", "samples")))
        if "parts" not in top:
            raise self._wrong(root, "the file", "has no 'parts'")
        parts: dict[str, tuple[Shards, Repeat]] = {}
        kinds: dict[str, yaml.Node] = {}
        for name, node in self._pairs(top["parts"], "parts"):
            field = f"parts.{name}"
            entry = dict(self._pairs(node, field, ("shards", "repeat", "weight")))
            if "shards" not in entry:
                raise self._wrong(node, field, "has no 'shards'")
            if ("repeat" in entry) == ("weight" in entry):
                raise self._wrong(node, field, "one of 'repeat' and 'weight' is needed")
            kind = "repeat" if "repeat" in entry else "weight"
            kinds.setdefault(kind, node)
            number = self._text(entry[kind], f"{field}.{kind}")
            rate_of(number, self._at(entry[kind], f"{field}.{kind}"))
            parts[name] = (self._shards(entry["shards"], f"{field}.shards"), number)
        if not parts:
            raise self._wrong(top["parts"], "parts", "is empty")
        if len(kinds) > 1:
            raise self._wrong(
                kinds["weight"], "parts", "some have 'repeat', others 'weight': one kind is needed"
            )
        samples = None
        if "samples" in top:
            if "weight" not in kinds:
                raise self._wrong(
                    top["samples"],
                    "samples",
                    "only with weights; repeats say themselves how long an epoch is",
                )
            text = self._text(top["samples"], "samples").replace("_", "")
            if not text.isdecimal() or not int(text):
                raise self._wrong(top["samples"], "samples", f"{text!r} is no number of draws")
            samples = int(text)
        return parts, "weight" in kinds, samples

    def _pairs(
        self, node: yaml.Node, field: str, known: tuple[str, ...] | None = None
    ) -> Iterator[tuple[str, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            raise self._wrong(node, field, "names and values are needed here ('name: value')")
        seen = set()
        for key, value in node.value:
            name = self._text(key, field)
            if name in seen:
                raise self._wrong(key, field, f"{name!r} stands here twice")
            if known is not None and name not in known:
                raise self._wrong(key, field, f"there is no {name!r}; there are {', '.join(known)}")
            if known is None and (not name or "/" in name):
                raise self._wrong(key, field, f"a part is called {name!r}: a text without '/' is needed")
            seen.add(name)
            yield name, value

    def _shards(self, node: yaml.Node, field: str) -> Shards:
        if isinstance(node, yaml.SequenceNode):
            if not node.value:
                raise self._wrong(node, field, "an empty list")
            return [self._place(item, f"{field}[{number}]") for number, item in enumerate(node.value)]
        return self._place(node, field)

    def _place(self, node: yaml.Node, field: str) -> str:
        text = self._text(node, field)
        if not text:
            raise self._wrong(node, field, "is empty")
        return text if "://" in text else os.path.join(self._folder, text)

    def _text(self, node: yaml.Node, field: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            raise self._wrong(node, field, "a single value is needed here")
        return str(node.value)

    def _wrong(self, node: yaml.Node, field: str, what: str) -> UsageError:
        return UsageError(f"{self._at(node, field)}: {what}")

    def _at(self, node: Any, field: str) -> str:
        return f"{self._where}: line {node.start_mark.line + 1}: {field}"
