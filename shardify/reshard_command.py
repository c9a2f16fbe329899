"""`shardify reshard`, as the command line knows it."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Compression(StrEnum):
    """How shards are compressed."""

    ZSTD = "zstd"


class EngineName(StrEnum):
    """Which processes make the shards."""

    LOCAL = "local"
    RAY = "ray"


def reshard(
    *,
    shards: Annotated[
        list[str],
        typer.Argument(
            metavar="SHARDS",
            help="tars, brace patterns ('data/{000..007}.tar'), folders or manifests of any number of data sets",
        ),
    ],
    out: Annotated[
        str, typer.Option(metavar="DIR|URL", help="where the new shards go: a folder, s3://, gs:// or az://")
    ],
    where: Annotated[
        str | None,
        typer.Option(
            metavar="EXPR",
            help='take only samples of which this is true: "words > 500 and images == 1"; columns are key, id, record, source, '
            "size, turns, words, images, width, height, format",
        ),
    ] = None,
    max_samples: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="take no more than N samples; shuffled, they are drawn at random"
        ),
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="leave out samples that a line of this file names: an id, a URL, or an image's xxh3_64 or sha256",
        ),
    ] = None,
    shuffle: Annotated[
        bool,
        typer.Option(
            "--shuffle/--no-shuffle", help="shuffle the samples, keyed by --seed, or keep their order"
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="the shuffle's key")] = 0,
    shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="target size of a shard: 256MB (the default), 1GiB, ..."),
    ] = None,
    samples_per_shard: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="samples in each shard")
    ] = None,
    shard_count: Annotated[
        int | None, typer.Option("--shards", min=1, metavar="N", help="how many shards")
    ] = None,
    multiple_of: Annotated[
        int, typer.Option(min=1, metavar="N", help="round the shard count up to a multiple of this")
    ] = 1,
    compress: Annotated[
        Compression | None,
        typer.Option(help="write .tar.zst: smaller where there is much text, and still randomly readable"),
    ] = None,
    shortest_edge: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="make pictures smaller whose shorter side has more than N pixels; all others keep their bytes",
        ),
    ] = None,
    quality: Annotated[
        int, typer.Option(min=1, max=100, help="of pictures made smaller, as JPEG and WebP count it")
    ] = 90,
    max_bad: Annotated[
        str,
        typer.Option(
            metavar="N|N%",
            help="stop when more samples than this are damaged; what is excluded does not count",
        ),
    ] = "1%",
    engine: Annotated[
        EngineName, typer.Option(help="processes of this machine, or of a Ray cluster")
    ] = EngineName.LOCAL,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="the Ray cluster", show_default="one on this machine"),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="processes; the output does not depend on it", show_default="cores"
        ),
    ] = None,
) -> None:
    """Make a new data set of the samples of others: other sizes, another order, joined, thinned out.

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
            shards_out=shard_count,
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
