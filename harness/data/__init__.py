"""Datasets: a DatasetSpec and a first stage -> a Collection, checked and hashed.

formats knows the files, sources knows where they lie. Nothing here knows models or methods.
"""

from __future__ import annotations

from harness.data.sources import Collection, load

__all__ = ["Collection", "load"]
