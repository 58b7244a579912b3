"""The documents say what the code does and what the results hold."""

from __future__ import annotations

import re
import runpy
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


TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
NOTES = re.compile(r"(?:^\* `.*\n)+", re.MULTILINE)


def models_page(text: str) -> str:
    """docs/models.md with its three tables as the registry has them."""
    registry = Registry()
    plain = [row for row in listing.models(registry) if "@" not in row["model"]]
    specs = [spec for name, spec in registry.models.items() if "@" in name]
    variants = [{"variant": s.name, "differs": s.differs, "source": s.source} for s in specs]
    return with_tables(text, [plain, variants, listing.prompts(registry)])


def datasets_page(text: str) -> str:
    """docs/datasets.md with tables and notes as the registry has them; its audits as they are."""
    registry, (text, *audits) = Registry(), text.partition("\n## Audits\n")
    specs, heads = registry.datasets.values(), ("dataset", "also", "ir_datasets", "index", "topics")
    names = [dict(zip(heads, (s.name, s.aliases, s.irds, s.index, s.topics))) for s in specs]
    suites = [s for s in listing.suites(registry) if s["datasets"] and not s["models"]]
    notes = "".join(f"* `{spec.name}`: {spec.note}\n" for spec in specs if spec.note)
    told = with_tables(text, [listing.datasets(registry), names, suites])
    return NOTES.sub(lambda _: notes, told) + "".join(audits)


def with_tables(text: str, tables: list[listing.Rows]) -> str:
    assert len(TABLE.findall(text)) == len(tables)
    rows = iter(tables)
    return TABLE.sub(lambda _: listing.markdown(next(rows)) + "\n", text)


OF_THE_REGISTRY = {"models.md": models_page, "datasets.md": datasets_page}


@pytest.mark.parametrize("name", OF_THE_REGISTRY)
def test_the_tables_of_a_page_are_the_registry(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text == OF_THE_REGISTRY[name](text)


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


def test_the_table_of_the_simulation_is_what_it_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """One line of it: all of them take a minute."""
    simulation = runpy.run_path(str(ROOT / "docs" / "scale.py"))
    simulation["main"](["8"])
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    table = page.partition("<!-- scale: begin -->")[2].partition("<!-- scale: end -->")[0]
    assert set(capsys.readouterr().out.splitlines()) <= set(table.splitlines())


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


if __name__ == "__main__":
    for name, page in OF_THE_REGISTRY.items():
        path = ROOT / "docs" / name
        path.write_text(page(path.read_text(encoding="utf-8")), encoding="utf-8")
