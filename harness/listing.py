"""What the command line shows about names, prompts and cells, as rows and as text.

It reads the registry and the results; it runs nothing and prints nothing.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from harness import cell as cell_module
from harness import store
from harness.prompts import Limits, prepare
from harness.rerank import METHODS
from harness.specs import Registry, limits_for
from harness.types import ModelSpec, Query, RegistryError, UsageError

Rows = list[dict[str, Any]]
Table = Sequence[Mapping[str, Any]]


def models(registry: Registry) -> Rows:
    """One row a model; a revision that is not a commit is shown as unpinned."""
    return [
        {
            "model": spec.name,
            "method": spec.method,
            "prompt": spec.prompt,
            "base": spec.base,
            "adapter": spec.adapter,
            "revision": _pinned(spec),
            "B": spec.parameters,
            "license": spec.license,
            "trained on": spec.trained_on,
            "paper": spec.paper,
        }
        for spec in registry.models.values()
    ]


def models_in_brief(registry: Registry) -> Rows:
    """What fits a terminal's width: the weights that matter, the adapter where there is one."""
    shown = ("model", "method", "weights", "revision", "B", "trained on")
    rows = (row | {"weights": row["adapter"] or row["base"]} for row in models(registry))
    return [{head: row[head] for head in shown} for row in rows]


def _pinned(spec: ModelSpec) -> str | None:
    if not spec.base:
        return None
    if spec.base.startswith("wheel:"):
        return "by hash"
    revisions = [spec.revision, *([spec.adapter_revision] if spec.adapter else [])]
    return "unpinned" if "main" in revisions else ", ".join(r[:8] for r in revisions)


def datasets(registry: Registry) -> Rows:
    return [
        {
            "dataset": spec.name,
            "family": spec.family,
            "queries": spec.queries,
            "documents": spec.documents,
            "grades": spec.grades,
            "titles": "yes" if spec.titles else None,
            "measure": spec.measures[0],
            "first stage": f"{spec.first_stage}, top {spec.depth}",
            "source": spec.irds or spec.index or spec.source,
            "license": spec.license,
        }
        for spec in registry.datasets.values()
    ]


def suites(registry: Registry) -> Rows:
    heads, tables = ("models", "datasets", "description"), registry.suites.items()
    return [{"suite": name} | {head: table.get(head) for head in heads} for name, table in tables]


def prompts(registry: Registry) -> Rows:
    """Every prompt with its lengths as the protocol states them, by family where it does."""
    return [
        {
            "prompt": p.name,
            "answer": p.answer,
            "passage": _limit(p.limits, "passage"),
            "query": _limit(p.limits, "query"),
            "generated": p.limits.max_tokens or None,
            "source": p.source,
        }
        for p in registry.prompts.values()
    ]


def _limit(limits: Limits, what: str) -> str | None:
    value = getattr(limits, what)
    if isinstance(value, dict):
        value = ", ".join(f"{family} {length or 'uncut'}" for family, length in value.items())
    return None if value is None else f"{value} {limits.unit}"


def methods(registry: Registry) -> Rows:
    """Every method with its options and their defaults."""
    rows = []
    for name, method in METHODS.items():
        parameters = inspect.signature(method.flow).parameters.values()
        options = [f"{p.name}={p.default}" for p in parameters if p.kind == p.KEYWORD_ONLY]
        rows.append({"method": name, "options": options, "reads": method.answers})
    return rows


LISTS = {rows.__name__: rows for rows in (models, datasets, suites, prompts, methods)}


def markdown(rows: Table) -> str:
    """Equal-keyed rows as a GitHub table."""
    head, *body = _texts(rows)
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def columns(rows: Table, width: int) -> str:
    """Equal-keyed rows as aligned columns; those beyond the width are on lines of their own."""
    texts = _texts(rows)
    lines, used = [""] * len(texts), 0
    for column in zip(*texts, strict=True):
        size = max(map(len, column))
        if 0 < used > width - size:
            lines, used = [f"{line.rstrip()}\n    " for line in lines], 4
        lines = [line + cell.ljust(size + 2) for line, cell in zip(lines, column)]
        used += size + 2
    return "\n".join(line.rstrip() for line in lines)


def _texts(rows: Table) -> list[list[str]]:
    """The heads, then every row's values, as a reader wants them."""
    return [list(rows[0]), *([plain(value) for value in row.values()] for row in rows)]


def plain(value: Any) -> str:
    """One value as a reader wants it; nothing is an em-dash, never an empty cell."""
    if value is None or value in ("", (), []):
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


CELL_COLUMNS = ("dataset", "first stage", "model", "state", "measure", "value", "calls", "finished")


def cells(results: Path) -> Rows:
    """One row a cell folder, with its state, headline measure and when it was finished; then one
    for each cell that a run on this machine has before it."""
    rows = []
    for cell in store.iterate(results):
        measure, value = next(iter(cell.measures.items()), (None, None))
        record = cell.record
        calls, place = record.get("efficiency", {}).get("calls"), (cell.dataset, cell.first_stage)
        end = (measure, value, calls, record.get("finished"))
        rows.append(dict(zip(CELL_COLUMNS, (*place, cell.model, record.get("state"), *end))))
    for run in store.read_progress(results):
        for cell in run["cells"]:
            if cell["state"] in ("planned", "running"):
                at = f" {cell['done']}/{cell['total']}" if cell["total"] else ""
                end = (None, None, cell["calls"], None)
                place = cell["cell"].split(" / ")
                rows.append(dict(zip(CELL_COLUMNS, (*place, cell["state"] + at, *end))))
    return rows


def going(results: Path) -> Rows:
    """One row for every run on this machine that fills a results folder now."""
    return [
        {"run": number, **Counter(cell["state"] for cell in run["cells"]), **run["crew"]}
        for number, run in enumerate(store.read_progress(results), 1)
    ]


def progress(run: Mapping[str, Any]) -> str:
    """A row of `going` as a sentence."""
    states = ("complete", "running", "planned", "failed")
    told = [", ".join(f"{run[state]} {state}" for state in states if run.get(state))]
    if "workers" in run:
        told.append(f"{run['shards']} shards to do, {run['workers']} workers")
    if run.get("calls_per_second") is not None:
        told.append(f"{run['calls_per_second']:g} calls a second")
    if run.get("seconds_left") is not None:
        ends = datetime.now() + timedelta(seconds=run["seconds_left"])
        told.append(f"ends about {ends:%Y-%m-%d %H:%M:%S}")
    return f"run {run['run']}: cells {'; '.join(told)}"


def describe(registry: Registry, name: str) -> str:
    """Everything known about a name, one `key: value` a line; variants with what differs."""
    if (Path(name) / "result.json").is_file():
        found = store.read(Path(name))
        return _lines(dict(found.record)) if found else ""
    if name in registry.models:
        return _describe_model(registry, registry.models[name])
    if name in registry.prompts:
        return _lines(asdict(registry.prompts[name]))
    if name in registry.suites:
        return _lines(registry.suites[name])
    try:
        return "\n\n".join(_lines(asdict(spec)) for spec in registry.find_datasets(name))
    except RegistryError:
        known = [*registry.models, *registry.prompts, *registry.suites, *registry.datasets]
        raise RegistryError(f"unknown name {name!r}", known=known, given=name) from None


def _describe_model(registry: Registry, spec: ModelSpec) -> str:
    parts = [_lines(asdict(spec))]
    if spec.prompt:
        prompt = registry.prompt(spec.prompt)
        limits = asdict(limits_for(spec, prompt))
        parts.append(f"prompt {prompt.name} (source: {prompt.source})\n" + _lines(limits, "  "))
    plain = spec.name.partition("@")[0]
    variants = [s for n, s in registry.models.items() if n.partition("@")[0] == plain and "@" in n]
    if variants:
        lines = [f"  {s.name}: {s.differs or 'as the plain name'} [{s.source}]" for s in variants]
        parts.append("variants\n" + "\n".join(lines))
    return "\n\n".join(parts)


def _lines(table: dict[str, Any], indent: str = "") -> str:
    kept = {k: v for k, v in table.items() if v not in ("", None, (), [], {})}
    return "\n".join(f"{indent}{key}: {value}" for key, value in kept.items())


# --- prompts ----------------------------------------------------------------------------------


def rendered(job: cell_module.Job, qid: str | None, tokenizer: str | None) -> str:
    """The first request about a query: its messages, or with a tokenizer the exact text.

    Without a tokenizer, limits in tokens are not applied.
    """
    if job.prompt is None:
        raise UsageError(f"{job.cell.model_name} asks no model")
    model, words = job.cell.model, None
    if tokenizer:
        from harness.engines.wording import Wording

        words = Wording(replace(model, base=tokenizer, revision="main", adapter=""))
    ready = prepare(
        _query(job, qid),
        job.prompt,
        job.limits,
        family=job.cell.dataset.family,
        clip=words.clip if words else lambda text, tokens: text,
        raw_special_tokens=model.raw_special_tokens,
        notes=Counter(),
    )
    count = job.options.get("size") or job.options.get("num_child", 0) + 1
    request = job.prompt.render(ready, ready.candidates[:count])
    if words:
        parts = [words.rendered(request)]
    else:
        parts = [f"<{m.role}>\n{m.content}" for m in request.messages] or [request.text or ""]
        parts += [f"<prefill>\n{request.prefill}"] if request.prefill else []
    if request.continuation is not None:
        parts.append(f"<scored>\n{request.continuation}")
    return "\n".join(parts)


def _query(job: cell_module.Job, qid: str | None) -> Query:
    known = {q.qid: q for q in job.queries}
    if qid is not None and qid not in known:
        raise RegistryError(f"unknown query {qid!r}", known=known, given=qid)
    return known[qid] if qid is not None else job.queries[0]


def visible(text: str) -> str:
    """Spaces as middle dots, tabs as arrows, line ends marked: for comparing wire formats."""
    return text.replace(" ", "·").replace("\t", "→\t").replace("\n", "⏎\n").replace("\r", "␍")
