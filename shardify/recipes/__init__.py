"""What published data sets are made of and where their files lie: one YAML file each, and what reads and checks them."""

import os

from shardify.recipes.layout import Resolved, resolve_recipe
from shardify.recipes.schema import load_recipe

__all__ = ["Resolved", "load_recipe", "resolve", "resolve_recipe"]


def resolve(
    name: str | os.PathLike[str], root: str | os.PathLike[str], *, caption: str | None = None
) -> Resolved:
    """All that a recipe, by name or file, needs of a folder; raises what `load_recipe` and `resolve_recipe` raise."""
    return resolve_recipe(load_recipe(name), root, caption)
