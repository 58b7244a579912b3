"use strict";
/* The leaderboard: filters, plots and the records behind each cell, over the data in the page.
   Everything from a dataset or a model goes in as text nodes; nothing here parses HTML. */
(() => {
  const byId = (id) => document.getElementById(id);
  const board = JSON.parse(byId("data").textContent);
  const cells = new Map();
  for (const row of board.rows) {
    for (const cell of Object.values(row.cells)) cells.set(cell.id, { ...cell, row, head: board.groups[cell.group] });
  }
  const BOARD_KEYS = ["q", "fs", "depth", "method", "size", "train", "kind", "cost", "sort", "dir", "plot", "x"];
  let state = {};

  // --- elements ------------------------------------------------------------------------------

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
    }
    node.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false).map((c) => (c instanceof Node ? c : String(c))));
    return node;
  }
  const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const svg = (tag, attributes, ...children) => fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  const own = (object, key) => (object && Object.hasOwn(object, key) ? object[key] : undefined);
  const known = (value) => value !== null && value !== undefined && !Number.isNaN(value);
  const scored = (value, head) => (known(value) ? (100 * value).toFixed(head.digits) : "–");
  const signed = (value, digits) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(digits);
  const whole = (value) => Math.round(value).toLocaleString("en-US");
  function number(value) {
    if (!known(value)) return "–";
    const size = Math.abs(value);
    return size >= 100 || size === 0 ? whole(value) : value.toFixed(size >= 10 ? 1 : 2);
  }
  const where = (head) => `${head.first_stage}, depth ${head.depth}`;
  const plural = (n, word, more = word + "s") => `${whole(n)} ${n === 1 ? word : more}`;

  // --- state in the address ------------------------------------------------------------------

  function read() {
    state = Object.fromEntries([...new URLSearchParams(location.hash.slice(1))].filter(([, value]) => value));
  }
  function address(changes) {
    const kept = Object.fromEntries(BOARD_KEYS.filter((key) => state[key]).map((key) => [key, state[key]]));
    const all = Object.entries({ ...kept, ...changes }).filter(([, value]) => value !== "" && known(value));
    return "#" + new URLSearchParams(all);
  }
  function keep(changes) {
    history.replaceState(null, "", address(changes));
    read();
    showBoard();
  }
  const link = (changes, ...children) => el("a", { href: address(changes) }, ...children);

  // --- data files ----------------------------------------------------------------------------

  const arrived = new Map();
  const asked = new Map();
  window.__shard = (name, content) => arrived.set(name, content);
  function load(name) {
    if (!asked.has(name)) asked.set(name, new Promise((resolve, reject) => {
      const missing = () => reject(new Error(`data/${name}.js does not lie beside this page`));
      const done = () => (arrived.has(name) ? resolve(arrived.get(name)) : missing());
      document.head.append(el("script", { src: `data/${name}.js`, onload: done, onerror: missing }));
    }));
    return asked.get(name);
  }
  const objects = (columns, rows) => rows.map((row) => Object.fromEntries(columns.map((name, i) => [name, row[i]])));
  async function cellData(id) {
    const shard = await load(id);
    return { ...shard, queries: new Map(objects(shard.columns, shard.rows).map((row) => [row.qid, row])) };
  }
  const beside = (name, reader = load) => (name ? reader(name).catch(() => null) : Promise.resolve(null));
  async function part(name, shard, qid) {
    const at = own(shard?.parts, qid);
    return known(at) ? own(await load(`${name}-${at}`), qid) : null;
  }

  // --- filters and sorting -------------------------------------------------------------------

  const SIZES = [["0-1", "under 1 B", 0, 1], ["1-4", "1–4 B", 1, 4], ["4-10", "4–10 B", 4, 10], ["10-40", "10–40 B", 10, 40], ["40-", "40 B and more", 40, Infinity]];
  const family = (row) => row.method.split(".")[0];
  const words = (row) => [row.model, row.base, row.method, ...row.trained_on].join(" ").toLowerCase();
  const models = board.rows.filter((row) => !row.baseline);

  function groupShown(head) {
    return (!state.fs || head.first_stage === state.fs) && (!state.depth || String(head.depth) === state.depth);
  }
  function cellShown(cell) {
    return cell && groupShown(board.groups[cell.group]) && (!state.train || cell.in_domain === (state.train === "in"));
  }
  function rowShown(row) {
    const size = SIZES.find(([key]) => key === state.size);
    const cellsOfRow = Object.values(row.cells);
    if (!cellsOfRow.some((c) => groupShown(board.groups[c.group]))) return false;
    if (state.kind && row.kind !== state.kind) return false;
    if (row.baseline) return true;
    return cellsOfRow.some(cellShown) && (!state.method || family(row) === state.method)
      && (!size || (known(row.parameters) && row.parameters >= size[2] && row.parameters < size[3]))
      && (state.q || "").toLowerCase().split(/\s+/).every((word) => words(row).includes(word));
  }
  function sortValue(row, key) {
    if (key === "model") return row.model.toLowerCase();
    if (key === "method") return row.method;
    if (key === "size") return row.parameters;
    const [group, field] = key.split(".");
    return cellShown(row.cells[group]) ? row.cells[group][field] : null;
  }
  function compareRows(key, direction) {
    return (a, b) => {
      const [x, y] = [sortValue(a, key), sortValue(b, key)];
      if (!known(x) || !known(y)) return known(y) - known(x) || a.number - b.number;
      return (x < y ? -1 : x > y ? 1 : 0) * direction || a.number - b.number;
    };
  }
  function options(select, pairs, chosen) {
    select.replaceChildren(...pairs.map(([value, text]) => el("option", { value, selected: String(value) === String(chosen ?? "") }, text)));
  }
  const distinct = (values) => [...new Set(values)];

  function setUpBoard() {
    const filters = byId("filters").elements;
    const present = SIZES.filter(([, , low, high]) => models.some((r) => known(r.parameters) && r.parameters >= low && r.parameters < high));
    const choices = {
      fs: distinct(board.groups.map((g) => g.first_stage)).map((v) => [v, v]),
      depth: distinct(board.groups.map((g) => String(g.depth))).map((v) => [v, v]),
      method: distinct(models.map(family)).sort().map((v) => [v, v]),
      size: present.map(([key, text]) => [key, text]),
      train: [["out", "not in-domain"], ["in", "in-domain"]],
      kind: distinct([...board.rows.map((r) => r.kind), "measured", "published"]).map((v) => [v, v]),
    };
    for (const [name, pairs] of Object.entries(choices)) options(filters[name], [["", "any"], ...pairs]);
    options(filters.cost, [["", "automatic"], ["no", "quality"], ["yes", "quality and cost"]]);
    byId("filters").addEventListener("input", (event) => keep({ [event.target.name]: event.target.value }));
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("filters").addEventListener("reset", (event) => {
      event.preventDefault();
      keep(Object.fromEntries(BOARD_KEYS.map((key) => [key, ""])));
    });
    for (const head of document.querySelectorAll("[data-sort]")) {
      const key = head.dataset.sort;
      head.replaceChildren(el("button", { type: "button", onclick: () => sortBy(key) }, head.textContent));
    }
    setUpPlots();
    setUpCompare();
    for (const id of ["filters", "plots", "compare"]) byId(id).hidden = !models.length;
  }
  const sorting = () => {
    const shown = board.groups.find(groupShown);
    const key = state.sort || `${shown ? shown.number : 0}.value`;
    const column = /^(\d+)\.(value|calls|tokens|seconds|faults)$/.exec(key);
    return ["model", "method", "size"].includes(key) || (column && board.groups[column[1]]) ? [key, state.dir === "up" ? 1 : -1] : ["model", 1];
  };
  function sortBy(key) {
    const [now, direction] = sorting();
    const first = ["model", "method"].includes(key) || /\.(calls|tokens|seconds|faults)$/.test(key) ? 1 : -1;
    keep({ sort: key, dir: (key === now ? -direction : first) === 1 ? "up" : "down" });
  }

  function showBoard() {
    const filters = byId("filters").elements;
    for (const name of ["q", "fs", "depth", "method", "size", "train", "kind", "cost"]) {
      if (filters[name].value !== (state[name] || "")) filters[name].value = state[name] || "";
    }
    const [key, direction] = sorting();
    const order = [...board.rows].sort(compareRows(key, direction));
    for (const row of order) {
      const line = document.querySelector(`tr[data-row="${row.number}"]`);
      line.parentNode.append(line);
      line.hidden = !rowShown(row);
      for (const box of line.querySelectorAll("td[data-g]")) {
        const cell = row.cells[box.dataset.g];
        box.classList.toggle("out", Boolean(cell) && !row.baseline && !cellShown(cell));
      }
    }
    for (const head of document.querySelectorAll("[data-sort]")) {
      if (head.dataset.sort === key) head.setAttribute("aria-sort", direction === 1 ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
    }
    showColumns();
    for (const a of document.querySelectorAll("a[data-cell]")) a.setAttribute("href", address({ view: "cell", cell: a.dataset.cell }));
    const count = models.filter(rowShown).length;
    byId("count").textContent = `${count} of ${plural(models.length, "row")}`;
    byId("nothing").hidden = count > 0 || !models.length;
    drawPlots();
  }
  function showColumns() {
    const shown = board.groups.filter(groupShown);
    const cost = state.cost ? state.cost === "yes" : shown.length <= 2;
    document.querySelector(".board").classList.toggle("no-cost", !cost);
    for (const box of document.querySelectorAll("[data-g]")) box.hidden = !groupShown(board.groups[box.dataset.g]);
    for (const head of document.querySelectorAll("[data-span]")) {
      const inside = head.dataset.span.split(" ").filter((n) => groupShown(board.groups[n])).length;
      head.hidden = !inside;
      head.colSpan = Math.max(1, inside * (cost ? 5 : 1));
    }
  }

  // --- plots ---------------------------------------------------------------------------------

  const AXES = { flops: "FLOPs per query", tokens: "generated tokens per query", calls: "calls per query", prompt: "prompt tokens per query", seconds: "engine seconds per query" };
  const SHAPES = {
    setwise: "M-5 -5H5V5H-5Z", listwise: "M0 -6L6 0L0 6L-6 0Z", pairwise: "M0 -6L6 5H-6Z", pointwise: "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0 -5 0Z",
    other: "M-5 -5L5 5M-5 5L5 -5",
  };

  const COSTS = ["tokens", "calls", "prompt", "flops"].filter((key) => key !== "flops" || [...cells.values()].some((c) => known(c.flops)));
  function setUpPlots() {
    options(byId("plot-group"), board.groups.map((g) => [g.number, `${g.short}, ${where(g)}`]));
    options(byId("plot-x"), COSTS.map((key) => [key, AXES[key]]));
    byId("plot-group").addEventListener("change", (event) => keep({ plot: event.target.value }));
    byId("plot-x").addEventListener("change", (event) => keep({ x: event.target.value }));
  }
  function drawPlots() {
    if (byId("plots").hidden) return;
    const head = board.groups.find((g) => String(g.number) === state.plot && groupShown(g)) || board.groups.find(groupShown) || board.groups[0];
    const x = COSTS.includes(state.x) ? state.x : "tokens";
    byId("plot-group").value = head.number;
    byId("plot-x").value = x;
    for (const [id, key] of [["plot-left", x], ["plot-right", "seconds"]]) byId(id).replaceChildren(plot(byId(id).clientWidth || 560, head, key));
  }
  function ticks(low, high, count) {
    const raw = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw);
    const out = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step / 1e6; v += step) out.push(Number(v.toPrecision(12)));
    return out;
  }
  const tick = (v) => (v >= 1e7 ? v.toExponential().replace("e+", "e") : v.toLocaleString("en-US"));
  function costAxis(values, left, right) {
    const some = values.filter((v) => v > 0);
    const [low, high] = [Math.min(...some, Infinity), Math.max(...some, 0)];
    if (!some.length || high / low <= 20) {
      const top = (high || 1) * 1.08;
      return { at: (v) => left + ((right - left) * v) / top, marks: ticks(0, top, 4) };
    }
    const start = left + (some.length < values.length ? 34 : 0); // zero has no logarithm: its own place at the left
    const [a, b] = [Math.log10(low) - 0.15, Math.log10(high) + 0.15];
    const marks = [];
    for (let p = Math.floor(a); p <= b; p++) for (const n of b - a < 2 ? [1, 2, 5] : [1]) if (Math.log10(n) + p >= a && Math.log10(n) + p <= b) marks.push(n * 10 ** p);
    if (start > left) marks.unshift(0);
    return { at: (v) => (v > 0 ? start + ((right - start) * (Math.log10(v) - a)) / (b - a) : left + 10), marks };
  }
  function front(points) {
    const out = [];
    for (const p of [...points].sort((a, b) => a.cost - b.cost || b.value - a.value)) if (!out.length || p.value > out[out.length - 1].value) out.push(p);
    return out;
  }
  function plot(width, head, key) {
    const points = models.filter(rowShown).map((row) => row.cells[head.number]).filter((c) => cellShown(c) && known(c[key]))
      .map((c) => ({ ...c, row: cells.get(c.id).row, cost: c[key] }));
    if (!points.length) return el("p", { class: "fine" }, "No model in this selection has this cost on record.");
    const base = head.first && cells.get(head.first);
    const [left, right, top, bottom] = [46, width - 12, 14, 300];
    const ends = points.flatMap((p) => [p.low ?? p.value, p.high ?? p.value]).concat(base ? [base.value] : []);
    const [low, high] = [Math.min(...ends), Math.max(...ends)];
    const pad = (high - low || 0.1) * 0.06;
    const y = (v) => bottom - ((bottom - top) * (v - low + pad)) / (high - low + 2 * pad);
    const axis = costAxis(points.map((p) => p.cost), left, right - 4);
    const x = axis.at;
    const best = front(points);
    const step = best.map((p, i) => (i ? `H${x(p.cost)}V${y(p.value)}` : `M${x(p.cost)} ${y(p.value)}`)).join("") + `H${right}`;
    const yTicks = ticks(100 * (low - pad), 100 * (high + pad), 5);
    return svg("svg", { width, height: 350, viewBox: `0 0 ${width} 350`, role: "group", "aria-label": `${head.measure} against ${AXES[key]}, ${head.short}` },
      yTicks.map((v) => [svg("path", { class: "grid", d: `M${left} ${y(v / 100)}H${right}` }), svg("text", { class: "soft", x: left - 8, y: y(v / 100) + 4, "text-anchor": "end" }, v)]),
      svg("path", { class: "axis", d: `M${left} ${bottom}H${right}` }),
      axis.marks.map((v) => [svg("path", { class: "axis", d: `M${x(v)} ${bottom}v5` }), svg("text", { class: "soft", x: x(v), y: bottom + 19, "text-anchor": "middle" }, tick(v))]),
      svg("text", { x: right, y: bottom + 40, "text-anchor": "end" }, AXES[key]),
      svg("text", { x: left - 38, y: 9 }, `${head.measure} ×100`),
      base && [svg("path", { class: "reference", d: `M${left} ${y(base.value)}H${right}` }), svg("text", { class: "soft", x: right, y: y(base.value) - 5, "text-anchor": "end" }, `first stage ${scored(base.value, head)}`)],
      svg("path", { class: "front", d: step }),
      labelled(points, best, head, x, y, left, right));
  }
  function labelled(points, best, head, x, y, left, right) {
    const taken = points.map((p) => [x(p.cost) - 6, y(p.value) - 6, x(p.cost) + 6, y(p.value) + 6]);
    return [...points].sort((a, b) => b.value - a.value).map((p) => {
      const [px, py] = [x(p.cost), y(p.value)];
      const name = p.row.model.length > 26 ? p.row.model.slice(0, 25) + "…" : p.row.model;
      const wide = name.length * 6.1;
      const places = [0, -13, 13, -26, 26, -39, 39, -52, 52].flatMap((dy) => [[px + 10, dy, "start", px + 10], [px - 10, dy, "end", px - 10 - wide]])
        .filter(([, , , from]) => from >= left && from + wide <= right);
      const box = ([, dy, , from]) => [from, py + dy - 8, from + wide, py + dy + 5];
      const free = (place) => taken.every((t) => { const b = box(place); return b[2] < t[0] || b[0] > t[2] || b[3] < t[1] || b[1] > t[3]; });
      const place = places.find(free); // without room a point keeps its title alone
      if (place) taken.push(box(place));
      return svg("a", { class: `point${best.includes(p) ? " on" : ""}`, href: address({ view: "cell", cell: p.id }) },
        svg("title", null, `${p.row.model}: ${scored(p.value, head)}${known(p.low) ? ` (${scored(p.low, head)}–${scored(p.high, head)})` : ""}, cost ${number(p.cost)}${best.includes(p) ? ", on the Pareto front" : ""}`),
        known(p.low) && svg("path", { class: "bar", d: `M${px} ${y(p.low)}V${y(p.high)}` }),
        svg("path", { d: own(SHAPES, family(p.row)) || SHAPES.other, transform: `translate(${px} ${py})` }),
        place && svg("text", { x: place[0], y: py + place[1] + 4, "text-anchor": place[2] }, name));
    });
  }

  // --- comparing -----------------------------------------------------------------------------

  const inGroup = (group) => [...models, ...board.rows.filter((row) => row.baseline)].filter((row) => row.cells[group] && row.kind === "measured").map((row) => [row.cells[group].id, row.model]);
  function setUpCompare() {
    const form = byId("compare-form").elements;
    const update = () => {
      const found = inGroup(form.group.value);
      options(form.a, found);
      options(form.b, found, found[1] && found[1][0]);
    };
    options(form.group, board.groups.filter((g) => inGroup(g.number).length > 1).map((g) => [g.number, `${g.short}, ${where(g)}`]));
    form.group.addEventListener("change", update);
    byId("compare-form").addEventListener("submit", (event) => {
      event.preventDefault();
      location.hash = address({ view: "compare", a: form.a.value, b: form.b.value });
    });
    update();
  }
  function studentT(df) { // 97.5 % point, Cornish-Fisher expansion; within 0.01 from 5 degrees of freedom
    const z = 1.959964;
    return z + (z ** 3 + z) / (4 * df) + (5 * z ** 5 + 16 * z ** 3 + 3 * z) / (96 * df ** 2);
  }
  async function compareView() {
    const [a, b] = [cells.get(state.a), cells.get(state.b)];
    if (!a || !b || a.sources || b.sources) return notFound();
    if (a.group !== b.group) return [crumbs(), el("p", { class: "notice" }, "These two cells rank different candidates; a comparison would say nothing about the models.")];
    const [one, two, first, dataset] = await Promise.all([cellData(a.id), cellData(b.id), beside(a.head.first, cellData), beside(a.head.data)]);
    const measure = a.head.measure;
    const pairs = [...one.queries.keys()].filter((qid) => two.queries.has(qid))
      .map((qid) => ({ qid, a: one.queries.get(qid)[measure] ?? 0, b: two.queries.get(qid)[measure] ?? 0 }))
      .map((p) => ({ ...p, by: p.a - p.b })).sort((p, q) => q.by - p.by || (p.qid < q.qid ? -1 : 1));
    const chosen = pairs.find((p) => p.qid === state.query);
    return [
      crumbs(`${a.row.model} and ${b.row.model}`),
      el("h2", null, `${a.row.model} (A) against ${b.row.model} (B)`),
      el("p", { class: "lead" }, `${a.head.dataset}, ${where(a.head)}. ${verdict(pairs, a.head)}`),
      bars(pairs, state),
      chosen && await sideBySide(chosen, a, b, one, two, first, dataset),
      el("h3", null, "All queries"),
      sortable(["query", ...(dataset ? ["text"] : []), "A", "B", "A − B", "shared in top 10"], pairs.map((p) => [
        [p.qid, link({ view: "compare", a: a.id, b: b.id, query: p.qid }, p.qid)], ...(dataset ? [[queryText(dataset, p.qid), queryText(dataset, p.qid)]] : []),
        [p.a, scored(p.a, a.head)], [p.b, scored(p.b, a.head)], [p.by, signed(100 * p.by, 1)],
        ...[shared(own(one.run, p.qid), own(two.run, p.qid))].map((n) => [n, n])]), dataset ? 1 : 0),
    ];
  }
  const shared = (a = [], b = []) => a.slice(0, 10).filter((docid) => b.slice(0, 10).includes(docid)).length;
  function verdict(pairs, head) {
    const n = pairs.length;
    const mean = pairs.reduce((sum, p) => sum + p.by, 0) / n;
    const half = n > 1 ? studentT(n - 1) * Math.sqrt(pairs.reduce((sum, p) => sum + (p.by - mean) ** 2, 0) / (n - 1) / n) : NaN;
    const wins = pairs.filter((p) => p.by > 1e-9).length;
    const losses = pairs.filter((p) => p.by < -1e-9).length;
    const range = n > 5 ? `, 95 % t interval ${signed(100 * (mean - half), 1)} to ${signed(100 * (mean + half), 1)}${(mean - half) * (mean + half) < 0 ? ", which holds zero" : ""}` : "";
    return `Mean difference in ${head.measure} ×100, A − B: ${signed(100 * mean, 1)}${range}. A is better on ${wins}, equal on ${n - wins - losses}, worse on ${losses} of ${plural(n, "query", "queries")}.`;
  }
  function bars(pairs, { a, b, query }) {
    const width = Math.max(300, byId("detail").clientWidth);
    const most = Math.max(...pairs.map((p) => Math.abs(p.by)), 0.01);
    const [left, middle, half] = [40, 110, 88];
    const step = (width - left - 4) / pairs.length;
    return el("figure", null, svg("svg", { width, height: 226, viewBox: `0 0 ${width} 226`, role: "img", "aria-label": "Difference of every query, sorted; the same values are in the table below" },
      [-most, 0, most].map((v) => svg("text", { class: "soft", x: left - 6, y: middle - (half * v) / most + 4, "text-anchor": "end" }, v ? signed(100 * v, 0) : 0)),
      pairs.map((p, i) => {
        const high = Math.max(0.8, (half * Math.abs(p.by)) / most);
        const box = { x: left + i * step + step * 0.12, width: Math.max(0.6, step * 0.76), y: p.by < 0 ? middle : middle - high, height: high, class: p.by < 0 ? "down" : "up" };
        const go = () => { location.hash = address({ view: "compare", a, b, query: p.qid }); };
        return [svg("rect", box), svg("rect", { class: "hit", x: left + i * step, width: step, y: middle - half, height: 2 * half, onclick: go }, svg("title", null, `query ${p.qid}: ${signed(100 * p.by, 1)}`)),
          p.qid === query && svg("path", { class: "axis", d: `M${left + (i + 0.5) * step} 222l-5 8h10z`, transform: "translate(0 -6)" })];
      }),
      svg("path", { class: "axis", d: `M${left} ${middle}H${width}` }),
      svg("text", { x: left + 4, y: 12 }, "▲ A better (filled)"), svg("text", { x: width, y: 222, "text-anchor": "end" }, "▼ B better (outlined)")));
  }
  async function sideBySide(pair, a, b, one, two, first, dataset) {
    const passages = await part(a.head.data, dataset, pair.qid).catch(() => null);
    const lists = [[a, one, two, "A", "B", pair.a], [b, two, one, "B", "A", pair.b]];
    return el("section", { "aria-label": `Query ${pair.qid}` },
      el("h3", null, `Query ${pair.qid}`), queryLine(dataset, pair.qid),
      el("div", { class: "two" }, lists.map(([cell, mine, other, name, rival, value]) => {
        const places = own(other.run, pair.qid) || [];
        return el("div", null, el("p", null, el("b", null, `${name}: ${cell.row.model} `), `${scored(value, a.head)} · `, link({ view: "query", cell: cell.id, query: pair.qid }, "calls")),
          topTen(pair.qid, mine, first, dataset, passages, [`against ${rival}`, (docid, rank) => {
            const at = places.indexOf(docid) + 1;
            return at ? move(at, rank, at > 10 ? "only here" : "") : "–";
          }]));
      })));
  }

  // --- one cell ------------------------------------------------------------------------------

  const queryText = (dataset, qid) => own(dataset?.queries, qid) || "";
  const queryLine = (dataset, qid) => (queryText(dataset, qid) ? el("p", { class: "quote" }, queryText(dataset, qid)) : null);
  const notFound = () => [crumbs(), el("p", { class: "notice" }, "This address names nothing on this page.")];
  function crumbs(...rest) {
    return el("nav", { class: "crumbs", "aria-label": "Where you are" }, link({}, "All results"), rest.map((item) => (item instanceof Node ? item : el("span", null, item))));
  }
  const cellLink = (cell) => link({ view: "cell", cell: cell.id }, `${cell.row.model}, ${cell.head.short}`);

  function publishedView({ row, head, sources }) {
    return [
      crumbs(`${row.model}, ${head.short}`),
      el("h2", null, row.model),
      el("p", { class: "lead" }, `${head.measure} on ${head.dataset}, ${where(head)}: ${row.kind}, not measured here. The first stage has the same name and depth; whether the candidates are the same is not known.`),
      sortable(["value", "source", "confidence"], sources.map((line) => line.map((v) => [v, v])), 1),
      el("p", null, row.base),
    ];
  }
  async function cellView() {
    const cell = cells.get(state.cell);
    if (!cell) return notFound();
    if (cell.sources) return publishedView(cell);
    const [shard, first, dataset] = await Promise.all([cellData(cell.id), beside(cell.head.first, cellData), beside(cell.head.data)]);
    const others = inGroup(cell.group).filter(([id]) => id !== cell.id);
    const { head } = cell;
    return [
      crumbs(`${cell.row.model}, ${head.short}`),
      el("h2", null, cell.row.model),
      el("p", { class: "lead" }, `on ${head.dataset}, ${where(head)}, ${plural(cell.queries, "query", "queries")}${cell.in_domain ? "; in-domain: trained on this collection's own queries" : ""}${cell.state === "complete" ? "" : `; ${cell.state}`}`),
      el("p", null, el("span", { class: "big" }, scored(cell.value, head)), ` ${head.measure} ×100`, known(cell.low) && `, 95 % interval ${scored(cell.low, head)}–${scored(cell.high, head)}`),
      el("h3", null, "Reproduce"),
      shard.record.command ? copyable(shard.record.command) : el("p", null, "No command is on record: this ranking was imported."),
      el("div", { class: "row" },
        el("button", { type: "button", onclick: () => save(cell, "run.trec", runText(shard)) }, "Run (TREC)"),
        el("button", { type: "button", onclick: () => save(cell, "per_query.csv", csvText(shard)) }, "Per-query CSV"),
        Object.keys(shard.parts).length > 0 && el("button", { type: "button", onclick: () => saveTrace(cell, shard) }, "Trace (JSONL)"),
        others.length > 0 && compareWith(cell, others)),
      provenance(shard.record),
      el("h3", null, "Queries"), queryTable(cell, shard, first, dataset),
    ];
  }
  function compareWith(cell, others) {
    const select = el("select", { onchange: (event) => { location.hash = address({ view: "compare", a: cell.id, b: event.target.value }); }, "aria-label": "Compare with" });
    options(select, [["", "Compare with …"], ...others]);
    return select;
  }
  function copyable(text) {
    const button = el("button", { type: "button", onclick: async () => {
      button.textContent = (await copy(text)) ? "Copied" : "Press Ctrl+C";
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    }, "aria-live": "polite" }, "Copy");
    return el("div", { class: "copy" }, el("pre", null, text), button);
  }
  async function copy(text) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch { // not available or not allowed, as on some pages opened from disk
      const box = el("textarea", { readonly: true, "aria-label": "Command" });
      box.value = text;
      document.body.append(box);
      box.select();
      const done = document.execCommand("copy");
      box.remove();
      return done;
    }
  }
  function save(cell, name, text) {
    const url = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
    const label = [cell.head.dataset, cell.head.first_stage, cell.row.model, name].join("-").replace(/[^\w.+=@-]/g, "_");
    el("a", { href: url, download: label }).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
  }
  const encoded = (docid) => docid.replace(/\s|%(?=[0-9A-Fa-f]{2})/g, encodeURIComponent);
  const runText = (shard) => Object.entries(shard.run).flatMap(([qid, docids]) => docids.map((d, i) => `${qid} Q0 ${encoded(d)} ${i + 1} ${docids.length - i} rerank-harness\n`)).join("");
  const csvText = (shard) => [shard.columns, ...shard.rows].map((row) => row.map((v) => (/[",\n]/.test(v ?? "") ? `"${String(v).replace(/"/g, '""')}"` : v ?? "")).join(",") + "\n").join("");
  async function saveTrace(cell, shard) {
    const lines = [];
    for (const qid of Object.keys(shard.parts)) {
      for (const call of objects(shard.calls, (await part(cell.id, shard, qid)).calls)) lines.push(JSON.stringify({ qid, ...call }) + "\n");
    }
    save(cell, "trace.jsonl", lines.join(""));
  }

  function plain(value) {
    if (!known(value) || value === "") return "–";
    if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(6)));
    if (typeof value === "number") return value.toLocaleString("en-US");
    if (Array.isArray(value)) return value.length ? value.map(plain).join(", ") : "–";
    if (typeof value === "object") return Object.entries(value).map(([k, v]) => `${k}: ${typeof v === "object" && v && !Array.isArray(v) ? `{${plain(v)}}` : plain(v)}`).join("; ") || "–";
    return String(value);
  }
  const listing = (pairs) => el("dl", null, pairs.filter(([, value]) => value !== undefined).map(([name, value, mono]) => [el("dt", null, name), el("dd", { class: mono ? "mono" : null }, value instanceof Node ? value : plain(value))]));
  function provenance(r) {
    const m = r.model || {};
    const at = (repo, revision) => (repo ? `${repo} at ${revision || "?"}` : "–");
    const { engine, ...machine } = r.environment || {};
    const { latency, ...costs } = r.efficiency || {};
    const faults = Object.entries(r.faults || {}).filter(([name, n]) => n && !["calls", "no_op_rate"].includes(name));
    return el("div", { class: "two" },
      el("div", null, el("h3", null, "Provenance"), listing([
        ["Key", r.key, true], ["First stage", r.first_stage.name], ["Its SHA-256", r.first_stage.sha256, true], ["Data SHA-256", r.dataset.sha256, true],
        ["Base model", at(m.base, m.revision)], ["Adapter", m.adapter ? `${at(m.adapter, m.adapter_revision)}, ${m.adapter_mode}` : undefined],
        ["Method", `${m.method}${some(m.options) ? ` (${plain(m.options)})` : ""}`], ["Changed", some(m.overrides) ? m.overrides : undefined],
        ["Prompt", r.prompt ? `${r.prompt.name}; ${r.prompt.source}` : "none"], ["Sampling", some(m.sampling) ? m.sampling : undefined], ["Limits", r.prompt ? r.prompt.limits : undefined],
        ["Clipped, inputs", some(r.inputs) ? r.inputs : "nothing was clipped or changed"],
        ["Trained on", some(m.trained_on) ? m.trained_on : "nothing declared"], ["Differs", m.differs || undefined], ["Paper", m.paper || undefined],
        ["Licence", m.license || undefined], ["Protocol", r.protocol], ["Started", r.started], ["Finished", r.finished]]),
        r.prompt && el("details", null, el("summary", null, "Prompt template"), el("div", null, el("pre", null, promptText(r.prompt))))),
      el("div", null, el("h3", null, "Measures"), listing([...Object.entries(r.measures || {}).map(([name, v]) => [name, v.toFixed(4)]), ["Kendall's τ to first stage", known(r.kendall_tau) ? r.kendall_tau.toFixed(3) : undefined]]),
        el("h3", null, "Faults"),
        el("p", null, !r.faults?.calls ? "No model was asked." : faults.length ? `In ${plural(r.faults.calls, "call")}: ${faults.map(([name, n]) => `${name.replaceAll("_", " ")} ${whole(n)}`).join(", ")}.` : `None in ${plural(r.faults.calls, "call")}.`, known(r.faults?.no_op_rate) && ` ${(100 * r.faults.no_op_rate).toFixed(1)} % of answers left the order as it was.`),
        el("h3", null, "Cost of the whole cell"), listing([...Object.entries(costs).map(([name, v]) => [name.replaceAll("_", " "), known(v) ? v : undefined]), ["latency", latency || undefined]]),
        el("h3", null, "Environment"), listing([...Object.entries(machine), ["engine", engine || "none"]])));
  }
  const some = (value) => Boolean(value) && Object.keys(value).length > 0;
  const promptText = (p) => (p.messages || []).map((m) => `[${m.role ?? m[0]}]\n${m.content ?? m[1]}`).join("\n\n") + (p.text || "") + (p.prefill ? `\n\n[prefill]\n${p.prefill}` : "") + `\n\n[passage]\n${p.passage}`;

  function sortable(heads, rows, grow = -1) {
    const body = el("tbody", null, rows.map((row) => el("tr", null, row.map(([, shown], i) => el("td", { class: i === grow ? "grow" : i === 0 ? "left" : null }, shown)))));
    const lines = [...body.children].map((line, i) => ({ line, row: rows[i] }));
    const sort = (i, head) => {
      const up = head.getAttribute("aria-sort") === "descending" ? 1 : -1;
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up === 1 ? "ascending" : "descending");
      lines.sort((a, b) => { const [x, y] = [a.row[i][0], b.row[i][0]]; return !known(x) || !known(y) ? known(y) - known(x) : up * (x < y ? -1 : x > y ? 1 : 0); });
      body.append(...lines.map(({ line }) => line));
    };
    const head = el("tr", null, heads.map((name, i) => el("th", { scope: "col", class: i === grow ? "grow" : i === 0 ? "left" : null }, el("button", { type: "button", onclick: (event) => sort(i, event.target.parentNode) }, name))));
    return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": heads.join(", ") }, el("table", { class: "list" }, el("thead", null, head), body));
  }
  function queryTable(cell, shard, first, dataset) {
    const { head } = cell;
    const rival = first && cell.id !== head.first ? first : null;
    const rows = [...shard.queries.values()].map((row) => {
      const value = row[head.measure];
      const by = rival ? (value ?? 0) - (rival.queries.get(row.qid)?.[head.measure] ?? 0) : null;
      return [[row.qid, link({ view: "query", cell: cell.id, query: row.qid }, row.qid)], ...(dataset ? [[queryText(dataset, row.qid), queryText(dataset, row.qid)]] : []),
        [value, scored(value, head)], ...(rival ? [[by, signed(100 * by, 1)]] : []), [row.calls, number(row.calls)], [row.generated_tokens, number(row.generated_tokens)],
        [row.seconds, number(row.seconds)], [row.faults, row.faults ? row.faults.replaceAll(";", ", ") : "–"]];
    });
    return sortable(["query", ...(dataset ? ["text"] : []), head.measure, ...(rival ? ["against first stage"] : []), "calls", "tokens", "seconds", "faults"], rows, dataset ? 1 : -1);
  }

  // --- one query -----------------------------------------------------------------------------

  function move(from, to, note) {
    const by = from - to;
    const [sign, says, way] = by > 0 ? ["▲", "up", "up"] : by < 0 ? ["▼", "down", "down"] : ["=", "unmoved", ""];
    return [el("span", { class: way, role: "img", "aria-label": `${says}${by ? ` ${Math.abs(by)}` : ""}` }, `${sign}${by ? ` ${Math.abs(by)}` : ""}`), by ? ` from ${from}` : "", note && el("span", { class: "note" }, note)];
  }
  function passage(passages, docid) {
    const [title, text] = own(passages, docid) || [];
    const named = title && [el("b", null, title), " "];
    if (!text || text.length <= 700) return text ? el("p", { class: "passage" }, named, text) : null;
    return el("details", { class: "passage" }, el("summary", null, named, text.slice(0, 600) + " …"), el("div", null, "… " + text.slice(600)));
  }
  function topTen(qid, shard, first, dataset, passages, [name, extra] = []) {
    const grades = own(dataset?.grades, qid);
    const before = own(first?.run, qid);
    const head = ["rank", "document", ...(grades ? ["grade"] : []), ...(before ? ["first stage"] : []), ...(extra ? [name] : [])];
    const line = (docid, i) => {
      const from = before ? before.indexOf(docid) + 1 : 0;
      const other = extra && extra(docid, i + 1);
      const shown = passage(passages, docid);
      return [el("tr", null, el("td", { class: "left" }, i + 1), el("td", { class: "grow" }, el("span", { class: "mono" }, docid)),
        grades && el("td", null, known(own(grades, docid)) ? grades[docid] : el("span", { title: "not judged" }, "–")),
        before && el("td", null, from ? move(from, i + 1) : "–"), extra && el("td", null, other)),
        shown && el("tr", { class: "under" }, el("td"), el("td", { class: "grow", colspan: head.length - 1 }, shown))];
    };
    return el("div", { class: "scroll" }, el("table", { class: passages ? "list" : "list fit" },
      el("thead", null, el("tr", null, head.map((text, i) => el("th", { scope: "col", class: i === 1 ? "grow" : i === 0 ? "left" : null }, text)))),
      el("tbody", null, (own(shard.run, qid) || []).slice(0, 10).map(line))));
  }
  async function queryView() {
    const cell = cells.get(state.cell);
    if (!cell) return notFound();
    const [shard, first, dataset] = await Promise.all([cellData(cell.id), beside(cell.head.first, cellData), beside(cell.head.data)]);
    const { query: qid } = state;
    const row = shard.queries.get(qid);
    if (!row) return notFound();
    const [mine, passages] = await Promise.all([part(cell.id, shard, qid), part(cell.head.data, dataset, qid).catch(() => null)]);
    const asking = mine?.asked !== undefined && passages ? { ...mine, passages, prompt: shard.record.prompt } : null;
    const ids = [...shard.queries.keys()];
    const near = [["previous", ids[ids.indexOf(qid) - 1]], ["next", ids[ids.indexOf(qid) + 1]]].filter(([, id]) => id);
    return [
      crumbs(cellLink(cell), `query ${qid}`),
      el("h2", null, `Query ${qid}`), queryLine(dataset, qid),
      el("p", { class: "lead" }, `${cell.row.model}: ${cell.head.measure} ×100 ${scored(row[cell.head.measure], cell.head)}`, first && cell.id !== cell.head.first && `, first stage ${scored(first.queries.get(qid)?.[cell.head.measure], cell.head)}`, `; ${plural(row.calls || 0, "call")} in ${plural(row.rounds || 0, "round")}, ${plural(row.generated_tokens || 0, "generated token")}.`),
      el("p", { class: "row" }, near.map(([name, id]) => link({ view: "query", cell: cell.id, query: id }, `${name} query`))),
      el("h3", null, "Top 10"), topTen(qid, shard, first, dataset, passages),
      dataset && !passages && el("p", { class: "fine" }, "Passages are not part of this page: the collection's licence does not say that they may be."),
      el("h3", null, "Calls"), callList(objects(shard.calls, mine?.calls || []), passages, asking),
    ];
  }
  function callList(calls, passages, asking) {
    if (!calls.length) return el("p", null, "No call is on record for this query.");
    const box = el("div");
    const more = el("button", { type: "button" });
    const show = () => {
      const from = box.childElementCount;
      box.append(...calls.slice(from, from + 50).map((call, i) => callItem(call, from + i + 1, passages, asking)));
      more.hidden = box.childElementCount >= calls.length;
      more.textContent = `Show more of ${plural(calls.length, "call")}`;
    };
    more.addEventListener("click", show);
    show();
    return [box, more];
  }
  function decision(call) {
    const listed = call.order.map((i) => `[${i + 1}]`);
    if (listed.length > 1) return listed.length > 6 ? `${listed.slice(0, 6).join(" > ")} > …` : listed.join(" > ");
    if (listed.length) return `chose ${listed[0]}`;
    return known(call.score) ? `score ${number(call.score)}` : "no choice understood";
  }
  function callItem(call, n, passages, asking) {
    const facts = [`round ${call.round}`, plural(call.docids.length, "passage"), decision(call), plural(call.generated_tokens, "token"), `finish: ${call.finish}`, call.from_cache && "from cache", call.changed === false && "order unchanged"].filter(Boolean);
    const body = el("div");
    const item = el("details", { ontoggle: () => { if (!body.childElementCount) body.append(...callBody(call, passages, asking)); } },
      el("summary", null, el("b", null, `Call ${n}`), ` · ${facts.join(" · ")}`, call.faults.length > 0 && el("span", { class: "warn" }, ` · fault: ${call.faults.map((f) => f.replaceAll("_", " ")).join(", ")}`)), body);
    return item;
  }
  const PLACE = /\{(query|docs|count|n|letter|text|title)\}/g;
  const fillIn = (template, values) => template.replace(PLACE, (whole, name) => own(values, name) ?? whole);
  function rendered({ prompt, asked, texts, passages }, docids) { // as Prompt.render does it; [heading, text] pairs
    const shown = docids.map((docid, i) => ({ n: i + 1, letter: "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i] ?? `A${i + 1}`, title: own(passages, docid)?.[0] ?? "", text: own(texts, docid) ?? own(passages, docid)?.[1] ?? "" }));
    const values = { query: asked, docs: shown.map((c) => fillIn(prompt.passage, c)).join(prompt.separator), count: docids.length, text: shown[0]?.text ?? "" };
    const out = [];
    for (let i = 0, j; i < prompt.messages.length; i = j) {
      const each = prompt.messages[i].each;
      for (j = i + 1; each && prompt.messages[j]?.each;) j++;
      for (const c of each ? shown : [{}]) for (const turn of prompt.messages.slice(i, j)) out.push([turn.role, fillIn(turn.content, { ...values, ...c })]);
    }
    const rest = { prompt: prompt.text, "answer starts with": prompt.prefill, "scored continuation": prompt.continuation };
    return [...out, ...Object.entries(rest).filter(([, text]) => text).map(([name, text]) => [name, name === "answer starts with" ? text : fillIn(text, values)])];
  }
  function promptAsked(asking, call) {
    const { limits, answer, text } = asking.prompt;
    const notes = [`Rebuilt from the wire format and the passages${text ? "" : ", before the model's chat template"}.`,
      limits.unit === "tokens" && (limits.passage || limits.query) && "Cuts in the model's own tokens are not made here.",
      limits.shrink && "A window that did not fit was asked again with fewer words; that is not shown.",
      answer === "reasoning" && call.round > 1 && "The second time, the model's own thought followed, cut at its last sentence and closed."];
    const body = el("div");
    const show = () => { if (!body.childElementCount) body.append(el("p", { class: "fine" }, notes.filter(Boolean).join(" ")), ...rendered(asking, call.docids).flatMap(([name, text]) => [el("p", { class: "role" }, name), el("pre", null, text)])); };
    return el("details", { class: "asked", ontoggle: show }, el("summary", null, "The prompt as it was asked"), body);
  }
  function callBody(call, passages, asking) {
    const split = call.text.lastIndexOf("</think>");
    const texts = split < 0 ? [["The model's text", call.text]] : [["Reasoning", call.text.slice(0, split).replace(/^\s*<think>\s*/, "")], ["Answer", call.text.slice(split + 8).trim()]];
    const rank = new Map(call.order.map((position, i) => [position, i + 1]));
    return [
      call.left_out > 0 && el("p", { class: "fine" }, `${plural(call.left_out, "character")} left out here: a longer answer is shown with its first and last ${whole(board.cut / 2)} characters. The cell's trace has it whole.`),
      texts.filter(([, text]) => text).map(([name, text]) => [el("h3", null, name), el("pre", null, text)]),
      asking && promptAsked(asking, call),
      el("h3", null, call.order.length > 1 ? "Shown, with the place each was given" : "Shown"),
      el("div", { class: "scroll" }, el("table", { class: passages ? "list" : "list fit" }, el("tbody", null, call.docids.map((docid, i) => el("tr", null, el("td", { class: "left" }, `[${i + 1}]`), el("td", { class: "grow" }, el("span", { class: "mono" }, docid), passage(passages, docid)),
        el("td", null, rank.has(i) ? (call.order.length > 1 ? `→ ${rank.get(i)}` : el("b", null, "◂ chosen")) : "")))))),
      el("p", { class: "fine" }, `Parsed: ${call.order.length ? call.order.map((i) => `[${i + 1}]`).join(" > ") : decision(call)}. ${whole(call.prompt_tokens)} prompt, ${whole(call.generated_tokens)} generated, ${whole(call.reasoning_tokens)} reasoning tokens; ${number(call.seconds)} s. Request key `, el("span", { class: "mono" }, call.key), "."),
    ].flat(Infinity).filter(Boolean);
  }

  // --- a served page follows the results folder ----------------------------------------------

  function follow() {
    const script = el("script", { src: `data/progress.js?${Date.now()}`, onerror: () => { script.remove(); showRuns(null); }, onload: () => {
      script.remove();
      const { live, cells: going } = arrived.get("progress");
      if (live !== board.live && !state.view) return location.reload();
      showRuns(going);
      setTimeout(follow, 2000);
      return undefined;
    } });
    document.head.append(script);
  }
  function showRuns(going) {
    const box = byId("live");
    box.hidden = going?.length === 0;
    if (!going) return box.replaceChildren(el("p", null, "The server has ended; this page follows the results no longer."));
    const count = (name) => going.filter((c) => c.state === name).length;
    const counts = ["running", "planned", "complete", "failed"].filter(count).map((name) => `${count(name)} ${name}`);
    const bar = (c) => c.state === "running" && c.total > 0 && [el("progress", { value: c.done, max: c.total, "aria-label": c.cell }), ` ${c.done} of ${plural(c.total, "query", "queries")}, ${plural(c.calls, "call")}`];
    return box.replaceChildren(el("h2", null, `A run is going: ${counts.join(", ")}`),
      el("div", { class: "scroll" }, el("table", { class: "list fit" }, el("tbody", null, going.map((c) => el("tr", null, el("td", { class: "left" }, c.cell), el("td", { class: c.state === "failed" ? "left warn" : "left" }, c.state), el("td", { class: "left" }, bar(c))))))));
  }

  // --- which view ----------------------------------------------------------------------------

  const VIEWS = { cell: cellView, query: queryView, compare: compareView };
  let turn = 0;
  let back = 0;
  async function show() {
    const mine = ++turn;
    if (byId("board").hidden === false) back = scrollY;
    read();
    const view = own(VIEWS, state.view);
    byId("home").setAttribute("href", address({}));
    document.querySelector("header").classList.toggle("small", Boolean(view));
    if (!view) {
      byId("detail").hidden = true;
      byId("detail").replaceChildren();
      byId("board").hidden = false;
      showBoard();
      scrollTo(0, back);
      return;
    }
    const content = await view().catch((error) => [crumbs(), el("p", { class: "notice" }, String(error.message))]);
    if (mine !== turn) return;
    const anchored = state.view === "compare" && !byId("detail").hidden && byId("detail").dataset.view === "compare" ? scrollY : 0;
    byId("board").hidden = true;
    byId("detail").hidden = false;
    byId("detail").dataset.view = state.view;
    byId("detail").replaceChildren(...content.flat(Infinity).filter(Boolean));
    byId("detail").focus({ preventScroll: true });
    scrollTo(0, anchored);
  }

  read();
  setUpBoard();
  addEventListener("hashchange", show);
  let waiting = 0;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => (byId("board").hidden ? state.view === "compare" && show() : drawPlots()), 150);
  });
  show();
  if (board.live) follow();
})();
