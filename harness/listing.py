"""What the command line shows about names, prompts and cells, as rows and as text.

It reads the registry and the results; it runs nothing and prints nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import cell as cell_module
from harness import store
from harness.prompts import Limits, prepare
from harness.rerank import METHODS
from harness.specs import Registry, limits_for
from harness.types import MissingResourceError, ModelSpec, Query, RegistryError, UsageError

Rows = list[dict[str, Any]]


def models(registry: Registry) -> Rows:
    """One row a model; a revision that is not a commit is shown as unpinned."""
    return [
        {
            "model": spec.name,
            "method": spec.method,
            "prompt": spec.prompt or None,
            "base": spec.base or None,
            "adapter": spec.adapter or None,
            "revision": _pinned(spec),
            "B": spec.parameters,
            "license": spec.license or None,
            "trained on": list(spec.trained_on) or None,
            "paper": spec.paper or None,
        }
        for spec in registry.models.values()
    ]


def models_in_brief(registry: Registry) -> Rows:
    """What fits a terminal's width: the weights that matter, the adapter where there is one."""
    return [
        {
            "model": spec.name,
            "method": spec.method,
            "weights": (spec.adapter or spec.base).removeprefix("wheel:") or None,
            "revision": _pinned(spec),
            "B": spec.parameters,
            "trained on": list(spec.trained_on) or None,
        }
        for spec in registry.models.values()
    ]


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
            "grades": spec.grades or None,
            "titles": "yes" if spec.titles else None,
            "measure": spec.measures[0],
            "first stage": f"{spec.first_stage}, top {spec.depth}",
            "source": spec.irds or spec.index or spec.source,
            "license": spec.license or None,
        }
        for spec in registry.datasets.values()
    ]


def suites(registry: Registry) -> Rows:
    return [
        {
            "suite": name,
            "models": table.get("models"),
            "datasets": table.get("datasets"),
            "description": table.get("description"),
        }
        for name, table in registry.suites.items()
    ]


def prompts(registry: Registry) -> Rows:
    return [
        {"prompt": p.name, "answer": p.answer, "unit": p.limits.unit, "source": p.source}
        for p in registry.prompts.values()
    ]


def methods(registry: Registry) -> Rows:
    """Every method with its options and their defaults."""
    import inspect

    return [
        {
            "method": name,
            "options": [
                f"{p.name}={p.default}"
                for p in inspect.signature(method.flow).parameters.values()
                if p.kind == p.KEYWORD_ONLY
            ]
            or None,
            "reads": list(method.answers) or None,
        }
        for name, method in METHODS.items()
    ]


LISTS: dict[str, Callable[[Registry], Rows]] = {
    "models": models,
    "datasets": datasets,
    "suites": suites,
    "prompts": prompts,
    "methods": methods,
}


def variants(registry: Registry) -> Rows:
    """The named variants: how each differs from the plain name, and where it was read."""
    return [
        {"variant": spec.name, "differs": spec.differs, "source": spec.source}
        for name, spec in registry.models.items()
        if "@" in name
    ]


def wire_formats(registry: Registry) -> Rows:
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
    if value is None:
        return None
    if not isinstance(value, dict):
        return f"{value} {limits.unit}"
    parts = [f"{family} {length or 'uncut'}" for family, length in value.items()]
    return f"{', '.join(parts)} {limits.unit}"


def models_page(registry: Registry) -> str:
    """docs/models.md: the registry as three tables."""
    plain = [row for row in models(registry) if "@" not in row["model"]]
    parts = [
        "# Models",
        "Made by `harness list models --format md`; a test holds it equal to the registry."
        " Unpinned: the revision is `main`, because no commit was known when the row was written."
        " A model trained on msmarco-passage is in-domain on TREC DL, and tables say so.",
        markdown(plain),
        "## Variants",
        "The plain name is the format a model was trained with; what others send has a name.",
        markdown(variants(registry)),
        "## Wire formats",
        "Lengths are in the unit of the protocol; every text is cut once and cuts are counted.",
        markdown(wire_formats(registry)),
    ]
    return "\n\n".join(parts)


def datasets_page(registry: Registry) -> str:
    """docs/datasets.md without its audits: facts, names, suites and what to know."""
    specs, heads = registry.datasets.values(), ("dataset", "also", "ir_datasets", "index", "topics")
    names = [dict(zip(heads, (s.name, s.aliases, s.irds, s.index, s.topics))) for s in specs]
    parts = [
        "# Datasets",
        "Made by `harness list datasets --format md`; a test holds it equal to the registry."
        " BM25 is always k1=0.9, b=0.4. Titles: whether documents have one; a prompt says how it is"
        " joined to the text. A mean is over all queries of the table; the first measure leads.",
        markdown(datasets(registry)),
        "## Names",
        "Every spelling finds its set; case, hyphens and underscores do not matter, and a glob"
        " (`bright/*`, `beir-v1.0.0-*.flat`) finds several. Index and topics are pyserini's.",
        markdown(names),
        "## Suites",
        markdown([row for row in suites(registry) if row["datasets"] and not row["models"]]),
        "## Notes",
        "\n".join(f"* `{spec.name}`: {spec.note}" for spec in specs if spec.note),
    ]
    return "\n\n".join(parts)


PAGES = {"models": models_page, "datasets": datasets_page}


def markdown(rows: Rows) -> str:
    """Equal-keyed rows as a GitHub table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([plain(v) for v in r.values()] for r in rows)]
    return "\n".join(
        "| " + " | ".join(c.replace("|", "\\|") for c in line) + " |" for line in lines
    )


def plain(value: Any) -> str:
    """One value as a reader wants it; nothing is an em-dash, never an empty cell."""
    if value is None or value in ("", (), []):
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def cells(results: Path) -> Rows:
    """One row a cell folder, with its state, headline measure and when it was finished."""
    rows = []
    for cell in store.iterate(results):
        name, value = next(iter(cell.measures.items()), (None, None))
        rows.append(
            {
                "dataset": cell.dataset,
                "first stage": cell.first_stage,
                "model": cell.model,
                "state": cell.record.get("state"),
                name or "measure": value,
                "calls": cell.record.get("efficiency", {}).get("calls"),
                "finished": cell.record.get("finished"),
            }
        )
    return rows


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


def rendered(
    job: cell_module.Job, qid: str | None, passages: int | None, tokenizer: Path | None
) -> str:
    """The first request about a query: its messages, or with a tokenizer the exact text.

    Without a tokenizer, limits in tokens are not applied.
    """
    if job.prompt is None:
        raise UsageError(f"{job.cell.model_name} asks no model")
    query = _query(job, qid)
    tools = _load(tokenizer) if tokenizer else None

    def clip(text: str, tokens: int) -> str:
        if tools is None:
            return text
        pieces = tools.tokenize(text)
        whole = len(pieces) <= tokens
        return text if whole else str(tools.convert_tokens_to_string(pieces[:tokens]))

    ready = prepare(
        query,
        job.prompt,
        job.limits,
        family=job.cell.dataset.family,
        clip=clip,
        raw_special_tokens=job.cell.model.raw_special_tokens,
        notes=Counter(),
    )
    count = passages or job.options.get("size") or job.options.get("num_child", 0) + 1
    request = job.prompt.render(ready, ready.candidates[:count])
    if tools is not None and request.text is None:
        turns = [{"role": m.role, "content": m.content} for m in request.messages]
        template = dict(job.cell.model.template)
        text = tools.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, **template
        )
        bos = (tools.bos_token or "") if request.bos else ""
        return f"{bos}{text}{request.prefill}"
    parts = [f"<{m.role}>\n{m.content}" for m in request.messages] or [request.text or ""]
    if request.prefill:
        parts.append(f"<prefill>\n{request.prefill}")
    if request.continuation is not None:
        parts.append(f"<scored>\n{request.continuation}")
    return "\n".join(parts)


def _query(job: cell_module.Job, qid: str | None) -> Query:
    known = {q.qid: q for q in job.queries}
    if qid is None:
        return job.queries[0]
    if qid not in known:
        raise RegistryError(f"unknown query {qid!r}", known=known, given=qid)
    return known[qid]


def _load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise MissingResourceError(f"{folder}: no such tokenizer folder")
    return AutoTokenizer.from_pretrained(folder)


def visible(text: str) -> str:
    """Spaces as middle dots, tabs as arrows, line ends marked: for comparing wire formats."""
    return text.replace(" ", "·").replace("\t", "→\t").replace("\n", "⏎\n").replace("\r", "␍")
