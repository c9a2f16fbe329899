"""The command line: every command is one call into the package.

Exit status: 0 done, 1 the data or the run failed, 2 wrong usage, 130 interrupted by Ctrl-C, 143 terminated by SIGTERM (as batch systems
do). Both end a command cleanly; of a pack, finished shards stay and the same command again continues.
"""

import os
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shardify._version import __version__
from shardify.errors import ShardifyError, UsageError
from shardify.recipes.commands import recipes

_EXIT_INTERRUPTED = 128 + signal.SIGINT
_EXIT_TERMINATED = 128 + signal.SIGTERM


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


class _Commands(TyperGroup):
    """What went wrong is one clear message; a traceback only under ``--debug``."""

    debug = False

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ShardifyError as error:
            if self.debug:
                raise
            kind = "usage error" if isinstance(error, UsageError) else "error"
            print(f"shardify: {kind}: {error}", file=sys.stderr)
            sys.exit(error.exit_status)
        except _Terminated:
            print("\nshardify: terminated", file=sys.stderr)
            sys.exit(_EXIT_TERMINATED)
        except KeyboardInterrupt:
            print("\nshardify: interrupted", file=sys.stderr)
            sys.exit(_EXIT_INTERRUPTED)


app = typer.Typer(
    cls=_Commands,
    help="Image + conversation data sets become WebDataset tar shards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # "[...]" in a help text means itself
)
app.add_typer(recipes, name="recipes")


class OnBad(StrEnum):
    """What to do with a record that cannot be packed."""

    SET_ASIDE = "set-aside"
    FAIL = "fail"


class Check(StrEnum):
    """How images are checked while they are packed."""

    HEADER = "header"
    DECODE = "decode"
    NONE = "none"


class Compression(StrEnum):
    """How shards are compressed."""

    ZSTD = "zstd"


class IndexFormat(StrEnum):
    """Whose index files are written."""

    PARQUET = "parquet"
    ENERGON = "energon"
    DALI = "dali"


class EngineName(StrEnum):
    """Which processes make the shards."""

    LOCAL = "local"
    RAY = "ray"


ShardSize = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="target size of a shard: 256MB (the default), 1GiB, ..."),
]
SamplesPerShard = Annotated[int | None, typer.Option(min=1, metavar="N", help="samples in each shard")]
ShardCount = Annotated[int | None, typer.Option(min=1, metavar="N", help="how many shards")]
MultipleOf = Annotated[
    int, typer.Option(min=1, metavar="N", help="round the shard count up to a multiple of this")
]
Compress = Annotated[
    Compression | None,
    typer.Option(help="write .tar.zst: smaller where there is much text, and still randomly readable"),
]
ShortestEdge = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="make pictures smaller whose shorter side has more than N pixels"),
]
Quality = Annotated[
    int, typer.Option(min=1, max=100, help="of pictures made smaller, as JPEG and WebP count it")
]
EngineOption = Annotated[EngineName, typer.Option(help="processes of this machine, or of a Ray cluster")]
RayAddress = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="the Ray cluster", show_default="one on this machine")
]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="processes; the output does not depend on it", show_default="cores"
    ),
]

ShardsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SHARDS", help="tars, a brace pattern ('data/{000..007}.tar'), a folder, or a manifest.json"
    ),
]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks; may stand anywhere")] = False,  # noqa: ARG001
) -> None:
    if version:
        print(f"shardify {__version__}")
        raise typer.Exit


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="where chat.json, metadata.json and images.zip go")
    ],
    samples: Annotated[int, typer.Option(min=16, help="records to make")] = 512,
    seed: Annotated[int, typer.Option(help="crops, scales and qualities are drawn with this")] = 0,
) -> None:
    """Make a small real LLaVA data set from the photographs that scikit-image ships."""
    from shardify.demo import make_demo

    make_demo(folder, samples=samples, seed=seed)


@app.command()
def pack(
    *,
    records: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RECORDS",
            help="LLaVA JSON or JSONL (also .zst), Parquet, WebDataset tars, prompt folders; paths or URLs",
        ),
    ] = None,
    out: Annotated[
        str, typer.Option(metavar="DIR|URL", help="where the shards go: a folder, s3://, gs:// or az://")
    ],
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH|URL",
            help="a folder, zip, tar or object-store prefix that holds images; may be given several times",
        ),
    ] = None,
    prefix: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW",
            help="image paths that begin with OLD are looked up with NEW instead; may be given several times",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="a published data set (`shardify recipes list`), or a YAML file of your own"
        ),
    ] = None,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="where the recipe's files lie")] = None,
    caption: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="which captions, where the recipe has several: raw, blip"),
    ] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle/--no-shuffle", help="shuffle the records, keyed by --seed")
    ] = True,
    seed: Annotated[int, typer.Option(help="the shuffle's key")] = 0,
    shard_size: ShardSize = None,
    samples_per_shard: SamplesPerShard = None,
    shards: ShardCount = None,
    multiple_of: MultipleOf = 1,
    compress: Compress = None,
    check: Annotated[
        Check,
        typer.Option(
            help="of images: format, size and cheap truncation checks; every pixel; or nothing but format and size"
        ),
    ] = Check.HEADER,
    shortest_edge: ShortestEdge = None,
    quality: Quality = 90,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODE=keep|set-aside|fail",
            help="what to do about one reason or note; may be given several times",
        ),
    ] = None,
    on_bad: Annotated[
        OnBad, typer.Option(help="what to do with a record that cannot be packed")
    ] = OnBad.SET_ASIDE,
    max_bad: Annotated[
        str | None,
        typer.Option(
            metavar="N|N%",
            help="stop when more records than this cannot be packed",
            show_default="1%, or what the recipe says",
        ),
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="add the records to the finished data set, as new shards")
    ] = False,
    read_order: Annotated[
        bool,
        typer.Option(
            "--read-order",
            help="read images front to back first, for slow disks; takes their room on disk once more meanwhile",
        ),
    ] = False,
    engine: EngineOption = EngineName.LOCAL,
    ray_address: RayAddress = None,
    workers: Workers = None,
) -> None:
    """Pack records and images into shards with index, manifest and quarantine.

    The same command again continues where an interrupted run stopped.
    """
    from shardify.convert import PackOptions, pack_dataset
    from shardify.recipes import resolve

    if recipe is not None:
        if root is None:
            raise UsageError("--recipe needs --root DIR, the folder with its files")
        if records or images:
            raise UsageError("--recipe brings its own records and images; give one or the other")
        chosen = resolve(recipe, root, caption=caption)
        sources, stores, limit = chosen.sources, chosen.stores, max_bad or chosen.max_bad
    else:
        if root is not None or caption is not None:
            raise UsageError("--root and --caption belong to --recipe NAME")
        sources, stores, limit = (), (), max_bad or "1%"
    pack_dataset(
        PackOptions(
            records=records or [],
            images=images or [],
            sources=sources,
            stores=stores,
            prefixes=[_pair(text) for text in prefix or []],
            out=out,
            shuffle=shuffle,
            seed=seed,
            shard_size=shard_size,
            samples_per_shard=samples_per_shard,
            shards=shards,
            multiple_of=multiple_of,
            compress=compress.value if compress else None,
            check=check.value,
            shortest_edge=shortest_edge,
            quality=quality,
            policies=policy or [],
            on_bad=on_bad.value,
            max_bad=limit,
            append=append,
            read_order=read_order,
            engine=engine.value,
            ray_address=ray_address,
            workers=workers,
        )
    )


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not equals:
        raise UsageError(f"--prefix {text}: OLD=NEW is needed, such as coco/train2017/=train2017/")
    return old, new


@app.command()
def index(
    shards: ShardsArgument,
    format_: Annotated[
        IndexFormat,
        typer.Option("--format", help="sidecars alone, or the index of Energon or DALI as well"),
    ] = IndexFormat.PARQUET,
    workers: Workers = None,
) -> None:
    """Index shards made by others, so that they can be loaded; shards that have their index are passed over."""
    from shardify.indexing import index_shards

    files = index_shards(shards, workers=workers, format=format_.value)
    print(f"indexed: {files[0]}{f' and {len(files) - 1:,} more files' if len(files) > 1 else ''}")


@app.command()
def reshard(
    *,
    shards: ShardsArgument,
    out: Annotated[
        str, typer.Option(metavar="DIR|URL", help="where the new shards go: a folder, s3://, gs:// or az://")
    ],
    where: Annotated[
        str | None,
        typer.Option(
            metavar="EXPR", help="only samples that this means, such as 'words > 500 and images == 1'"
        ),
    ] = None,
    max_samples: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="no more samples than this")
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="ids, URLs and image hashes (xxh3_64, sha256) that must not be taken, a line each",
        ),
    ] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle/--no-shuffle", help="shuffle the samples, keyed by --seed")
    ] = True,
    seed: Annotated[int, typer.Option(help="the shuffle's key")] = 0,
    shard_size: ShardSize = None,
    samples_per_shard: SamplesPerShard = None,
    count: Annotated[int | None, typer.Option("--shards", min=1, metavar="N", help="how many shards")] = None,
    multiple_of: MultipleOf = 1,
    compress: Compress = None,
    shortest_edge: ShortestEdge = None,
    quality: Quality = 90,
    max_bad: Annotated[
        str, typer.Option(metavar="N|N%", help="stop when more samples than this cannot be copied")
    ] = "1%",
    engine: EngineOption = EngineName.LOCAL,
    ray_address: RayAddress = None,
    workers: Workers = None,
) -> None:
    """Make a new data set of finished shards: other sizes, another order, several sets in one, a part of them.

    The same command again continues where an interrupted run stopped.
    """
    from shardify.reshard import ReshardOptions, reshard_dataset

    reshard_dataset(
        ReshardOptions(
            shards=shards,
            out=out,
            where=where,
            max_samples=max_samples,
            exclude=exclude,
            shuffle=shuffle,
            seed=seed,
            shard_size=shard_size,
            samples_per_shard=samples_per_shard,
            shards_out=count,
            multiple_of=multiple_of,
            compress=compress.value if compress else None,
            shortest_edge=shortest_edge,
            quality=quality,
            max_bad=max_bad,
            engine=engine.value,
            ray_address=ray_address,
            workers=workers,
        )
    )


@app.command()
def verify(shards: ShardsArgument, workers: Workers = None) -> None:
    """Read everything again and name whatever differs; exit status 1 if anything does."""
    from shardify.verify import verify_shards

    raise typer.Exit(0 if verify_shards(shards, workers=workers) else 1)


@app.command()
def info(
    shards: ShardsArgument,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """Counts, sizes, image sizes and formats, turns, words, sources."""
    from shardify.info import print_info

    print_info(shards, as_json=as_json)


def _terminate(*_: object) -> None:
    raise _Terminated


def _fill_closed_streams() -> None:
    """After `2>&-` or the like, the file opened next would get the stream's number, and the messages meant for it."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - open until the end


def main() -> None:
    """The console script."""
    _fill_closed_streams()
    signal.signal(signal.SIGTERM, _terminate)
    # wherever it stands: people add it behind the command that failed
    _Commands.debug = "--debug" in sys.argv
    app([argument for argument in sys.argv[1:] if argument != "--debug"], prog_name="shardify")


if __name__ == "__main__":
    main()
