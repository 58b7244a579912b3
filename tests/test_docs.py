"""The documents say what the code does and what the results hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from harness import listing, store
from harness.report import tables, writers
from harness.specs import Registry

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_models_page_is_the_registry() -> None:
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == listing.models_page(Registry()) + "\n"


def table_of(dataset: str) -> str:
    """The committed cells of a dataset as the README shows them."""
    cells = [c for c in store.iterate(ROOT / "results") if c.dataset == dataset]
    assert cells, f"no committed cell of {dataset}"
    return writers.to_markdown(tables.summary(cells)).strip()


@pytest.mark.parametrize("dataset", ["pocket", "dl19"])
def test_the_readme_shows_the_committed_results(dataset: str) -> None:
    begin, end = f"<!-- {dataset}: begin -->", f"<!-- {dataset}: end -->"
    shown = README.partition(begin)[2].partition(end)[0].strip()
    assert shown == table_of(dataset)


def test_every_file_the_readme_links_to_exists() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_every_command_in_the_readme_is_one_of_the_program() -> None:
    from typer.main import get_command

    from harness.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"\$ harness ([a-z-]+)", README))
    assert used
    assert used <= known
