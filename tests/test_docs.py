"""The documents say what the code does and what the results hold."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A `$ harness` line of a page; a remark that begins with `needs` keeps it from being run."""

    words: list[str]
    remark: str


def steps(page: Path) -> Iterator[Command | tuple[Path, str]]:
    """Commands, and files whose path stands in a block's first line, in the order of the page."""
    for kind, block in FENCED.findall(page.read_text(encoding="utf-8")):
        named = re.match(r"# ([\w./-]+/[\w.-]+)\n", block)
        if kind in ("console", "sh"):
            for line in re.findall(r"^\$ harness (.*)$", block, re.MULTILINE):
                words, _, remark = line.partition("  #")
                yield Command(shlex.split(words), remark.strip())
        elif named:
            yield Path(named[1]), block[named.end() :]


def test_every_command_on_a_page_is_one_of_the_program_with_its_flags() -> None:
    from typer.main import get_command

    from harness import cli

    program = get_command(cli.app)
    used = [step for page in PAGES for step in steps(page) if isinstance(step, Command)]
    assert len(used) > 30
    for command in used:
        name, *rest = [cli._flag(word) for word in command.words]
        found = program.commands[name]  # type: ignore[attr-defined]
        found.make_context(name, rest)  # raises for an unknown flag or a missing argument


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_commands_on_a_page_work(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness import cli

    for folder in ("results", "registry"):
        ignored = shutil.ignore_patterns(".*")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    monkeypatch.chdir(tmp_path)
    for step in steps(page):
        if isinstance(step, tuple):
            path, text = step
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not step.remark.startswith("needs"):
            with pytest.raises(SystemExit) as ended:
                cli.main(step.words)
            assert ended.value.code in (None, 0), step.words


def test_the_command_line_page_names_every_command() -> None:
    from typer.main import get_command

    from harness.cli import app

    page = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`harness ([\w-]+)`", page.partition("## ")[0]))
    assert told == set(get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_a_page_links_to_exists(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target
