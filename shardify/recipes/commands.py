"""`shardify recipes`: list, show and check."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from shardify.recipes.check import ImagesSeen, RecordsSeen, Report, Sight

recipes = typer.Typer(
    help="Published data sets that pack with one command.", no_args_is_help=True, rich_markup_mode=None
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="a recipe's name, or a YAML file of your own")
]


@recipes.command("list")
def list_recipes(
    *, as_json: Annotated[bool, typer.Option("--json", help="as one JSON array")] = False
) -> None:
    """Name the recipes that come with shardify."""
    from shardify.recipes.schema import load_recipe, recipe_names

    known = [load_recipe(name) for name in recipe_names()]
    if as_json:
        print(json.dumps([{"name": recipe.name, "title": recipe.title} for recipe in known]))
        return
    width = max(len(recipe.name) for recipe in known)
    for recipe in known:
        _print(f"{recipe.name:<{width}}  {recipe.title}")


@recipes.command("show")
def show_recipe(name: NameArgument) -> None:
    """Print a recipe as it is written, to read it or to make another of it."""
    from shardify.recipes.schema import load_recipe, recipe_text

    load_recipe(name)  # a file that is no recipe is said to be none
    _print(recipe_text(name).removesuffix("\n"))


@recipes.command("check")
def check(
    name: NameArgument,
    root: Annotated[str, typer.Option(metavar="DIR", help="the folder in which the data set's files lie")],
    caption: Annotated[
        str | None,
        typer.Option(metavar="raw|blip", help="check for these captions, where the recipe has a choice"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of the random records")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
) -> None:
    """See whether files, counts and images are as published; exit status 1 where they are not."""
    from shardify.recipes.check import check_recipe
    from shardify.recipes.schema import load_recipe

    report = check_recipe(load_recipe(name), root, caption=caption, seed=seed)
    if as_json:
        print(json.dumps(_as_json(report), indent=2))
    else:
        _print("\n".join(describe(report)))
    raise typer.Exit(0 if report.complete else 1)


def _print(text: str) -> None:
    """Print names of files and texts of recipes, whatever the terminal can show of them."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def describe(report: "Report") -> list[str]:
    """A report as lines of text."""
    lines = [f"recipe {report.recipe} in {report.root}", ""]
    lines += _table(
        ["records", "there", "count", "published", "first", "random"],
        [_records_row(seen) for seen in report.records],
    )
    roots: dict[str, list[int]] = {}
    for seen in report.records:
        for root, (found, looked) in seen.roots.items():
            counts = roots.setdefault(root, [0, 0])
            counts[0] += found
            counts[1] += looked
    if roots:
        lines += [
            "",
            *_table(["images in", "found"], [[r, f"{f:,} of {n:,}"] for r, (f, n) in roots.items()]),
        ]
    if report.images:
        rows = [_images_row(seen) for seen in report.images]
        lines += ["", *_table(["image stores", "there", "files", "published"], rows)]
    lines.append("")
    if report.complete:
        return [*lines, "complete"]
    lines += ["not complete:", *(f"  {fault}" for fault in report.faults)]
    if report.causes:
        lines += ["likely causes:", *(f"  {cause}" for cause in report.causes)]
    there = [bool(seen.paths) for seen in report.records] + [bool(seen.paths) for seen in report.images]
    if not all(there) and report.get:
        lines += ["where to get it:", *(f"  {origin.url}  {origin.gives}" for origin in report.get)]
    return lines


def _records_row(seen: "RecordsSeen") -> list[str]:
    from shardify.recipes.check import expectation, shorten

    if not seen.paths:
        return [seen.tried[0], "no", "", expectation(seen), "", ""]
    there = "damaged" if seen.fault else "yes"
    count = "" if seen.records is None else f"{seen.records:,}"
    return [shorten(seen.paths), there, count, expectation(seen), _sight(seen.first), _sight(seen.random)]


def _sight(sight: "Sight") -> str:
    parts = (
        []
        if sight.share is None
        else [f"{sight.found:,} of {sight.found + sight.missing:,} ({_percent(sight.share)})"]
    )
    if sight.text_only:
        parts.append(f"{sight.text_only:,} text-only")
    if sight.broken:
        parts.append(f"{sight.broken:,} broken")
    return ", ".join(parts)


def _percent(share: float) -> str:
    """Never 100 % of what is not all, nor 0 % of what is not nothing."""
    if 0 < share < 0.001:
        return "<0.1%"
    return f"{min(share, 0.999):.1%}" if share < 1 else "100%"


def _images_row(seen: "ImagesSeen") -> list[str]:
    from shardify.recipes.check import shorten

    published = "" if seen.expected is None else f"{seen.expected:,}"
    if not seen.paths:
        return [seen.tried[0], "no, optional" if seen.optional else "no", "", published]
    there = "damaged" if seen.fault else "yes"
    return [shorten(seen.paths), there, "" if seen.files is None else f"{seen.files:,}", published]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]


def _as_json(report: "Report") -> dict[str, object]:
    return {
        "recipe": report.recipe,
        "root": report.root,
        "complete": report.complete,
        "records": [dataclasses.asdict(seen) for seen in report.records],
        "images": [dataclasses.asdict(seen) for seen in report.images],
        "faults": report.faults,
        "causes": report.causes,
        "get": [{"url": origin.url, "gives": origin.gives} for origin in report.get],
    }
