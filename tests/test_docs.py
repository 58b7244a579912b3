"""The documents say what the code does."""

from __future__ import annotations

from pathlib import Path

from harness import listing
from harness.specs import Registry

ROOT = Path(__file__).resolve().parent.parent


def test_the_models_page_is_the_registry() -> None:
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == listing.models_page(Registry()) + "\n"
