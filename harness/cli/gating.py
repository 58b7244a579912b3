"""`check`, `noise`, `compare` and `audit`: is it as good as it was, how far do runs and answers
differ, and which model is better."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from harness import store
from harness.cli import base
from harness.cli.running import Matrix, run_matrix, with_matrix
from harness.types import MissingResourceError, UsageError

EXIT = {"pass": 0, "fail": 1}  # what is not decided: 7
JUNIT = {"fail": "failure", "inconclusive": "error", "not checked": "skipped"}


@base.app.command()
def check(
    baseline: Annotated[Path, typer.Argument(help="A folder of committed cells, or one cell.")],
    results: Annotated[Path | None, typer.Option(help="Fresh cells, to be as good.")] = None,
    replay_only: Annotated[bool, typer.Option("--replay-only", help="No fresh cells.")] = False,
    margin: Annotated[float, typer.Option(help="What the first measure may lose.")] = 0.01,
    tokens: Annotated[str, typer.Option(help="How many more tokens may be used.")] = "+10%",
    latency: Annotated[str, typer.Option(help="How much longer latency runs may be.")] = "+20%",
    noise: Annotated[Path | None, typer.Option(help="Repeated cells, for more margin.")] = None,
    junit: Annotated[Path | None, typer.Option(help="JUnit XML to write.", dir_okay=False)] = None,
    github: Annotated[bool, typer.Option("--github", help="Print annotations.")] = False,
    registry: base.RegistryDir = None,
    data: base.DataDir = None,
    format: base.Format = "text",
) -> None:
    """Did anything get worse? Committed cells against this code and against fresh cells.

    Their stored answers are put to the methods again, which needs no engine. Exit code 0: nothing
    got worse. 1: something did. 7: it cannot be told.
    """
    from harness import gate, plan
    from harness.report.writers import write_file

    base.use_data(data)
    if not margin > 0:
        raise UsageError(f"--margin {margin}: expected a number above 0")
    limits = gate.Limits(margin, _share("--tokens", tokens), _share("--latency", latency))
    bases, loader = list(store.iterate(baseline)), plan.Loader(base.open_registry(registry))
    if not bases:
        raise MissingResourceError(f"{baseline}: holds no cell")
    checks = [gate.replay(c, loader, lambda text: matrix_of(text).selection()) for c in bases]
    if results is not None and not replay_only:
        repeats = list(store.iterate(noise)) if noise else []
        checks += gate.statistical(bases, store.iterate(results), limits, repeats)
    verdict = gate.overall(g for c in checks for g in c.gates)
    if format == "json":
        print(json.dumps({"verdict": verdict, "checks": [_plain(c) for c in checks]}, indent=1))
    else:
        base.print_rows([row for c in checks for row in _rows(c)], "text")
        for line in (line for c in checks for line in _problem(c)):
            print(line)
        counts = Counter(gate.overall(c.gates) for c in checks)
        print(f"{verdict}: {', '.join(f'{n} {what}' for what, n in counts.items())}")
    if junit:
        write_file(junit, _junit(checks))
    if github:
        for line in (_annotation(c) for c in checks if any(_problem(c))):
            print(line)
    raise typer.Exit(EXIT.get(verdict, 7))


def _share(flag: str, text: str) -> float:
    """+10% as 0.1."""
    if match := re.fullmatch(r"\+?(\d+(?:\.\d+)?) ?%", text.strip()):
        return float(match[1]) / 100
    raise UsageError(f"{flag} {text!r}: expected a percentage like +10%")


def matrix_of(command: str) -> Matrix:
    """The flags of a `harness run` command in a record."""
    run = get_command(base.app).commands["run"]  # type: ignore[attr-defined]
    try:
        flags = run.make_context("run", shlex.split(command)[2:]).params
    except Exception as error:  # whatever the parser of flags raises
        raise UsageError(f"the command {command!r} cannot be read: {error}") from error
    return Matrix(**{field.name: flags[field.name] for field in fields(Matrix)})


def _name(check: Any) -> str:
    return f"{check.base.dataset} / {check.base.first_stage} / {check.base.model}"


def _plain(check: Any) -> dict[str, Any]:
    place = {"cell": _name(check), "baseline": str(check.base.folder), "against": check.other}
    return place | {"gates": [asdict(g) for g in check.gates], "differs": check.why}


def _rows(check: Any) -> Iterator[dict[str, str]]:
    """A line for each gate; those that are equal share one."""
    same = [g.what for g in check.gates if (g.limit, g.verdict) == ("equal", "pass")]
    folded = [(", ".join(same), "as recorded", "equal", "pass")] if same else []
    others = [(g.what, g.value, g.limit, g.verdict) for g in check.gates if g.what not in same]
    for line in folded + others:
        yield {"cell": _name(check)} | dict(zip(("what", "value", "limit", "verdict"), line))


def _problem(check: Any) -> Iterator[str]:
    """What went wrong, on which queries, and what differs between the two."""
    bad = [g for g in check.gates if g.verdict in ("fail", "inconclusive")]
    if bad:
        yield f"{_name(check)}, against {check.other}:"
        for g in bad:
            more = f" and {len(g.queries) - 5} more" if len(g.queries) > 5 else ""
            where = f"; on {', '.join(g.queries[:5])}{more}" if g.queries else ""
            yield f"  {g.what}: {g.verdict}, {g.value} (limit: {g.limit}){where}"
        yield from (f"  differs: {text}" for text in check.why)


def _junit(checks: Sequence[Any]) -> str:
    from xml.etree import ElementTree as xml

    root = xml.Element("testsuites")
    for check in checks:
        suite = xml.SubElement(root, "testsuite", name=f"{_name(check)} against {check.other}")
        for g in check.gates:
            case = xml.SubElement(suite, "testcase", classname=_name(check), name=g.what)
            if g.verdict in JUNIT:
                found = xml.SubElement(case, JUNIT[g.verdict], message=f"{g.value} ({g.limit})")
                found.text = "\n".join(_problem(check))
    return xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _annotation(check: Any) -> str:
    """GitHub's workflow command; what would end a field is percent-encoded."""
    level = "error" if any(g.verdict == "fail" for g in check.gates) else "warning"
    place = _escaped(str(check.base.folder / "result.json"), "%:,")
    return f"::{level} file={place}::{_escaped(chr(10).join(_problem(check)), '%')}"


def _escaped(text: str, reserved: str) -> str:
    return re.sub(rf"[{reserved}\r\n]", lambda m: f"%{ord(m[0]):02X}", text)


@base.app.command()
@with_matrix
def noise(
    matrix: Matrix,
    *,
    repeats: Annotated[int, typer.Option(min=2, help="How often every cell is run.")] = 3,
    format: base.TableFormat = "text",
    quiet: base.Quiet = False,
) -> None:
    """Run a model (named first, or by -m) several times anew: how far do its runs differ?"""
    from harness import gate

    matrix = _named_first(matrix)
    done = [run_matrix(replace(matrix, replicate=n), False, quiet) for n in range(repeats)]
    rows = gate.noise(cell for one in done for cell in one.results)
    base.print_rows(rows, format)
    if rows and not any(row["sd"] for row in rows):
        base.say(quiet, "the runs do not differ: greedy decoding draws nothing at random")
    if failures := [failure for one in done for failure in one.failures]:
        raise typer.Exit(failures[0][1].exit_code)


@base.app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A cell's folder.")],
    b: Annotated[Path, typer.Argument(help="Another's, over the same queries.")],
    format: base.TableFormat = "text",
) -> None:
    """Compare two cells: measures and costs with tests, the queries that differ most."""
    from harness import gate

    first, second = store.read(a), store.read(b)
    if not (first and first.measures and second and second.measures):
        raise MissingResourceError(f"{a} and {b}: not two finished cells")
    found: dict[str, Any] = gate.compared(first, second)
    differs = gate.differences(second.record, first.record)
    if format == "json":
        print(json.dumps({"a": str(a), "b": str(b), **found, "b -> a": differs}, indent=1))
        return
    print(f"a: {a}\nb: {b}")
    for rows in found.values():
        print()
        base.print_rows(rows, format)
    print("\nb -> a:", *differs, sep="\n- ")


@base.app.command()
@with_matrix
def audit(
    matrix: Matrix,
    *,
    sample: Annotated[int, typer.Option(min=1, help="Stored calls to ask again.")] = 200,
    format: base.TableFormat = "text",
) -> None:
    """Ask a model's stored calls again, alone and in batches: which answers flip?"""
    from harness import flips, plan
    from harness.matrix import open_for

    matrix, rows = _named_first(matrix), []
    if not (matrix.cache or matrix.results / ".cache.sqlite").is_file():
        raise MissingResourceError(f"{matrix.results}: no stored calls; run the cell first")
    selection = matrix.selection()
    with closing(matrix.open_cache()) as cache:
        for job in plan.jobs(base.open_registry(matrix.registry), selection):
            if (engine := open_for(job, selection.serving)) is not None:
                with closing(engine):
                    found = flips.Audit(job, engine, cache).rows(sample, selection.seed)
                rows += [{"cell": str(job.cell)} | row for row in found]
    if not rows:
        raise UsageError("no engine answers for these models")
    base.print_rows(rows, format)


def _named_first(matrix: Matrix) -> Matrix:
    """What stands first is a model's name unless it is a suite file."""
    if matrix.suite is None or matrix.suite.is_file():
        return matrix
    return replace(matrix, suite=None, model=[*(matrix.model or ()), str(matrix.suite)])
