"""The documents name what the code has."""

from pathlib import Path

import pytest

from shardify.audit import NOTES, REASONS
from shardify.format.sidecar import SCHEMA

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("code", [*REASONS, *NOTES])
def test_every_reason_code_is_documented(code):
    meaning = {**REASONS, **NOTES}[code]
    assert f"| `{code}` | {meaning} |" in (ROOT / "docs" / "recipes.md").read_text()


def test_every_sidecar_column_is_documented():
    text = (ROOT / "docs" / "format.md").read_text()
    assert [name for name in SCHEMA.names if f"`{name}`" not in text] == []


def test_links_in_the_readme_lead_somewhere():
    import re

    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
