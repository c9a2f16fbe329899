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


class OnBad(StrEnum):
    """What to do with a record that cannot be packed."""

    SET_ASIDE = "set-aside"
    FAIL = "fail"


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
        list[Path], typer.Argument(metavar="RECORDS", help="LLaVA JSON arrays or JSONL files")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="where the shards go")],
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="a folder or a zip that holds the images; may be given several times"
        ),
    ] = None,
    shuffle: Annotated[
        bool, typer.Option("--shuffle/--no-shuffle", help="shuffle the records, keyed by --seed")
    ] = True,
    seed: Annotated[int, typer.Option(help="the shuffle's key")] = 0,
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="target size of a shard: 256MB (the default), 1GiB, ..."),
    ] = None,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="samples in each shard")
    ] = None,
    shards: Annotated[int | None, typer.Option(min=1, metavar="N", help="how many shards")] = None,
    multiple_of: Annotated[
        int, typer.Option(min=1, metavar="N", help="round the shard count up to a multiple of this")
    ] = 1,
    on_bad: Annotated[
        OnBad, typer.Option(help="what to do with a record that cannot be packed")
    ] = OnBad.SET_ASIDE,
    max_bad: Annotated[
        str, typer.Option(metavar="N|N%", help="stop when more records than this cannot be packed")
    ] = "1%",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="processes; the output does not depend on it", show_default="cores"
        ),
    ] = None,
) -> None:
    """Pack records and images into shards with index, manifest and quarantine.

    The same command again continues where an interrupted run stopped.
    """
    from shardify.convert import PackOptions, pack_dataset

    pack_dataset(
        PackOptions(
            records=records,
            images=images or [],
            out=out,
            shuffle=shuffle,
            seed=seed,
            shard_size=shard_size,
            samples_per_shard=samples_per_shard,
            shards=shards,
            multiple_of=multiple_of,
            on_bad=on_bad.value,
            max_bad=max_bad,
            workers=workers,
        )
    )


@app.command()
def index(shards: ShardsArgument) -> None:
    """Index shards made by others, so that they can be loaded; shards that have their index are passed over."""
    from shardify.format.shards import index_shards

    sidecars = index_shards(shards)
    print(f"{len(sidecars):,} shards are indexed: {sidecars[0]}{' ...' if len(sidecars) > 1 else ''}")


@app.command()
def verify(
    shards: ShardsArgument,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="processes", show_default="cores")
    ] = None,
) -> None:
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
