// The pages to explore: traces, circuits and neurons, from saved JSON (tools/explorer_data.py).
//
// A page has a container `<div class="explore" data-explore="traces" data-from="file.json">`
// that holds a static table. If the data arrive, this script puts its own content there;
// if not (no script, no server), the table stays. Nothing is asked of another host.
//
// Every map of cells is one `grid`: one stop of the Tab key, arrow keys within, Home and End
// for the ends of a row. What is focused is also said in words in a live region.

/** An element: `el("p", {class: "note"}, "text", child)`; attributes that are null are left out. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** A token as one reads it: line breaks visible, no space in front. */
export const word = (token) => token.replace(/\n/g, "⏎").trim() || "␣";

/** A probability or an effect with three digits. */
export const number = (x) => (Math.abs(x) < 0.0005 ? "0.000" : x.toFixed(3)).replace("-", "−");

let fields = 0;

/** A labelled control: `field("Fact", select)`. */
export function field(label, control) {
  control.id ||= `explore-${++fields}`;
  return el("div", { class: "field" }, el("label", { for: control.id }, label), control);
}

/** A `<select>` of [value, text] pairs. */
export function choice(options, onchange, value = null) {
  const node = el("select", { onchange: () => onchange(node.value) });
  node.append(...options.map(([key, text]) => el("option", { value: key }, text)));
  if (value !== null) node.value = value;
  return node;
}

/** Radio buttons in a row, for a few options that one wants to see side by side. */
export function radios(label, options, onchange, chosen = options[0][0]) {
  const name = `explore-${++fields}`;
  const box = el("fieldset", { class: "field radios" }, el("legend", {}, label));
  for (const [key, text] of options) {
    const input = el("input", { type: "radio", name, value: key, onchange: () => onchange(key) });
    input.checked = key === chosen;
    box.append(el("label", {}, input, el("span", {}, text)));
  }
  return box;
}

/** Bars from 0 to 1: rows of {text, value, kind}; `kind` is a class for the colour. */
export function bars(rows, label) {
  const items = rows.map(({ text, value, kind }) =>
    el("li", { class: kind ?? null },
      el("span", { class: "what" }, text),
      el("span", { class: "bar", "aria-hidden": "true" },
        el("i", { style: `--v:${Math.max(0, Math.min(1, value)).toFixed(4)}` })),
      el("span", { class: "value" }, number(value))));
  return el("ol", { class: "bars", "aria-label": label }, ...items);
}

/** Where what is focused is said in words, for screen readers. */
export const spoken = () => el("p", { class: "spoken", role: "status", "aria-live": "polite" });

/**
 * A map of cells that can be pointed at and walked through.
 *
 * `cell(r, c)` gives {value: 0..1, text, says} or null for no cell; `pick(r, c, how)` is called
 * with "hover", "focus" or "start"; `at` is the cell to begin with; `enter(r, c)` is called for
 * Enter and double clicks. Returns the element; its `go(r, c)` moves the choice.
 */
export function grid({ label, rows, columns, cell, pick, at = [0, 0], enter = null, kind = "" }) {
  const cells = rows.map(() => []);
  let chosen = at;
  const node = el("div", { class: `grid ${kind}`, role: "grid", "aria-label": label,
    style: `--columns:${columns.length}` });
  const head = columns.map((text) => el("span", { role: "columnheader", class: "over" }, el("b", {}, text)));
  node.append(el("div", { role: "row" }, el("span", { role: "columnheader", class: "corner" },
    el("span", { class: "spoken" }, label)), ...head));
  rows.forEach((name, r) => {
    const line = el("div", { role: "row" }, el("span", { role: "rowheader", class: "before" }, name));
    columns.forEach((_, c) => {
      const what = cell(r, c);
      const box = el("span", { role: "gridcell", "aria-label": what?.says ?? null, class: what ? "cell" : "none",
        style: what ? `--v:${Math.max(0, Math.min(1, what.value)).toFixed(3)}` : null,
        tabindex: what ? -1 : null, "data-at": what ? `${r} ${c}` : null }, what?.text ?? "");
      if (what && what.value > 0.55) box.classList.add("full");
      cells[r][c] = what ? box : null;
      line.append(box);
    });
    node.append(line);
  });
  const mark = (r, c) => {
    const old = cells[chosen[0]]?.[chosen[1]];
    old?.removeAttribute("aria-selected");
    old?.setAttribute("tabindex", "-1");
    chosen = [r, c];
    cells[r][c].setAttribute("aria-selected", "true");
    cells[r][c].setAttribute("tabindex", "0");
  };
  const where = (event) => event.target.closest?.("[data-at]")?.dataset.at.split(" ").map(Number);
  node.addEventListener("pointerover", (event) => { const p = where(event); if (p) pick(...p, "hover"); });
  node.addEventListener("pointerleave", () => pick(...chosen, "hover"));
  node.addEventListener("focusin", (event) => { const p = where(event); if (p) { mark(...p); pick(...p, "focus"); } });
  node.addEventListener("click", (event) => { const p = where(event); if (p) cells[p[0]][p[1]].focus(); });
  node.addEventListener("dblclick", (event) => { const p = where(event); if (p) enter?.(...p); });
  node.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && enter) return enter(...chosen);
    const [r, c] = chosen;
    const there = cells[r].map((x, i) => [x, i]).filter(([x]) => x).map(([, i]) => i);
    const to = { ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1],
      Home: [r, there[0]], End: [r, there.at(-1)] }[event.key];
    if (!to) return;
    event.preventDefault();
    cells[to[0]]?.[to[1]]?.focus();
  });
  node.go = (r, c) => { mark(r, c); pick(r, c, "start"); };
  if (cells[at[0]]?.[at[1]]) node.go(...at);
  return node;
}

/** Attention of one head as a grid; `weight(query, key)` is a number from 0 to 1. */
export function attention(label, tokens, weight, says) {
  const last = tokens.length - 1, most = tokens.reduce((best, _, k) => (weight(last, k) > weight(last, best) ? k : best), 0);
  return grid({ label, kind: "attention", rows: tokens.map(word), columns: tokens.map(word), at: [last, most],
    cell: (q, k) => (k > q ? null : { value: weight(q, k), says:
      `from ${word(tokens[q])} to ${word(tokens[k])}: ${number(weight(q, k))}` }),
    pick: (q, k, how) => says(`“${word(tokens[q])}” looks at “${word(tokens[k])}”: ${number(weight(q, k))}`, how) });
}

const scroller = (...children) => el("div", { class: "scroll" }, ...children);

// ---------------------------------------------------------------- traces

const PARTS = [["resid_post", "residual stream"], ["mlp_out", "MLPs"], ["attn_out", "attention"]];

function traces(box, data) {
  let fact = data.facts[0], part = "resid_post", at = null;
  const map = el("div"), panel = el("div", { class: "panel" }), live = spoken();
  const words = (numbers, p) => numbers.map((n, i) => ({ text: word(data.words[n]), value: p[i],
    kind: data.words[n] === fact.answer ? "answer" : null }));

  function show(r, c, how) {
    const cell = r * data.layers + c, found = fact.parts[part], p = found.p[cell];
    const inside = r >= fact.subject[0] && r < fact.subject[1];
    const layers = part === "resid_post" ? `after layer ${c}` : `${data.window} layers around layer ${c}`;
    const what = { resid_post: "The residual stream", mlp_out: "What the MLPs add", attn_out: "What attention adds" }[part];
    const title = `${what} ${layers}, at “${word(fact.tokens[r])}”`;
    const top = words(found.top.slice(3 * cell, 3 * cell + 3), found.top_p.slice(3 * cell, 3 * cell + 3));
    panel.replaceChildren(
      el("h3", {}, title, inside ? el("span", { class: "tag" }, "subject") : null),
      el("div", { class: "two" },
        el("div", {}, el("h4", {}, `Probability of “${word(fact.answer)}”`),
          bars([{ text: "without noise", value: fact.clean }, { text: "noise on the subject", value: fact.corrupted },
            { text: "this state restored", value: p, kind: "answer" }], "Probability of the answer"),
          el("p", { class: "note" }, `Indirect effect ${number(p - fact.corrupted)}, of a total of ${number(fact.clean - fact.corrupted)}.`)),
        el("div", {}, el("h4", {}, "Likeliest next tokens, this state restored"), bars(top, "Likeliest tokens"))));
    if (how === "focus") {
      at = [r, c];
      live.textContent = `${title}: probability of ${word(fact.answer)} ${number(p)}; likeliest ${top.map((t) => `${t.text} ${number(t.value)}`).join(", ")}`;
    }
  }

  /** The state on the subject that brings most back. */
  function strongest() {
    const { p } = fact.parts[part], [from, to] = fact.subject.map((i) => i * data.layers);
    const best = p.indexOf(Math.max(...p.slice(from, to)), from);
    return [Math.floor(best / data.layers), best % data.layers];
  }

  function draw() {
    const found = fact.parts[part], most = Math.max(fact.clean, ...found.p);
    const start = at ?? strongest();
    map.replaceChildren(
      el("p", { class: "prompt" }, ...fact.tokens.map((t, i) =>
        i >= fact.subject[0] && i < fact.subject[1] ? el("mark", {}, t) : t), " ", el("b", {}, word(fact.answer))),
      scroller(grid({ label: "Layers by tokens", at: start, pick: show, kind: "fine",
        rows: fact.tokens.map((t, i) => word(t) + (i >= fact.subject[0] && i < fact.subject[1] ? " *" : "")),
        columns: Array.from({ length: data.layers }, (_, i) => (i % 5 ? "" : String(i))),
        cell: (r, c) => ({ value: found.p[r * data.layers + c] / most, says:
          `${word(fact.tokens[r])}, layer ${c}: ${number(found.p[r * data.layers + c])}` }) })),
      el("p", { class: "legend" }, "p = 0", el("i", { class: "ramp" }), `${number(most)} · * subject token · columns are layers`));
  }

  box.append(el("div", { class: "controls" },
    field("Fact", choice(data.facts.map((f, i) => [i, `${f.prompt} … ${word(f.answer)}`]),
      (i) => { fact = data.facts[i]; at = null; draw(); })),
    radios("Restore", PARTS, (key) => { part = key; draw(); })), map, panel, live);
  draw();
}

// ---------------------------------------------------------------- circuits

const READS = { q: "queries", k: "keys", v: "values", "": "sum" };

function circuits(box, data) {
  const { layers, heads } = data, [dx, dy, left, top] = [40, 19, 52, 66];
  const x = (node) => (node[0] === "a" ? left + dx * Number(node.split(".")[1]) : node[0] === "m" ? left + dx * heads
    : left + (dx * heads) / 2);
  const y = (node) => (node === "out" ? top - 32 : node === "embed" ? top + dy * layers + 6
    : top + dy * (layers - 1 - Number(/\d+/.exec(node)[0])) - (node[0] === "m" ? 5 : 0));
  const size = [left + dx * heads + 30, top + dy * layers + 24];
  const telling = Object.entries(data.effects).sort((a, b) => b[1].effect - a[1].effect)[0][0];
  let step = 2, chosen = `a${telling}`;
  const picture = svg("svg", { viewBox: `0 0 ${size[0]} ${size[1]}`, class: "circuit", role: "grid", "aria-label":
    `Heads of ${layers} layers, the last layer on top` });
  const said = el("div", { class: "said" }), panel = el("div", { class: "panel" }), live = spoken();
  const circuit = () => data.circuits[step];
  const full = (node) => ({ a: `head ${node.slice(1)}`, m: `MLP ${node.slice(1)}`, e: "embedding", o: "output" })[node[0]];

  function lines() {
    const most = Math.max(...circuit().arrows.map((a) => a[3]));
    return circuit().arrows.map(([from, to, part, effect]) => {
      const bend = (x(to) - x(from)) * 0.15 + 14, own = from === chosen || to === chosen;
      const middle = `${(x(from) + x(to)) / 2 + bend} ${(y(from) + y(to)) / 2}`;
      return svg("path", { d: `M${x(from)} ${y(from)}Q${middle} ${x(to)} ${y(to)}`, class: `edge ${part || "sum"} ${own ? "own" : ""}`,
        "stroke-width": (0.8 + 3 * Math.sqrt(effect / most)).toFixed(2) });
    });
  }

  function draw() {
    const inside = new Set(circuit().arrows.flatMap((a) => a.slice(0, 2)));
    const focused = picture.contains(document.activeElement);
    const names = [...Array(heads).keys()].map((h) => svg("text", { x: left + dx * h, y: 12, class: "name" }, h ? String(h) : "head 0"));
    names.push(svg("text", { x: left + dx * heads, y: 12, class: "name" }, "MLP"));
    const ends = ["out", "embed"].map((node) => svg("g", { class: "end" },
      svg("rect", { x: x(node) - 40, y: y(node) - 8, width: 80, height: 16, rx: 8 }),
      svg("text", { x: x(node), y: y(node) + 4 }, node === "out" ? "output" : "embedding")));
    const rows = [];
    for (let layer = layers - 1; layer >= 0; layer--) {
      const row = svg("g", { role: "row" });
      if (layer % 5 === 0 || layer === layers - 1)
        rows.push(svg("text", { x: 22, y: y(`a${layer}.0`) + 4, class: "name" }, layer % 5 ? `${layer}` : `layer ${layer}`));
      for (let head = 0; head < heads; head++) {
        const node = `a${layer}.${head}`, live = inside.has(node);
        row.append(svg("g", { role: "gridcell", tabindex: node === chosen ? 0 : -1, "data-node": node, "aria-selected": String(node === chosen),
          class: `node ${live ? "live" : ""}`, "aria-label": `head ${layer}.${head}${live ? ", in the circuit" : ""}` },
        svg("circle", { cx: x(node), cy: y(node), r: 9, class: "reach" }), svg("circle", { cx: x(node), cy: y(node), r: live ? 6 : 2.5 })));
      }
      rows.push(svg("rect", { x: x(`m${layer}`) - 8, y: y(`m${layer}`) - 3.5, width: 16, height: 7, rx: 2,
        class: `mlp ${inside.has(`m${layer}`) ? "live" : ""}` }), row);
    }
    picture.replaceChildren(svg("g", { "aria-hidden": "true" }, ...names, ...lines(), ...ends), ...rows);
    if (focused) picture.querySelector(`[data-node="${chosen}"]`).focus();
    const c = circuit();
    said.replaceChildren(
      el("p", { class: "big" }, `Threshold ${c.threshold}: ${c.edges} of ${data.n_edges.toLocaleString("en")} edges`),
      bars([{ text: "KL on the prompts of the search", value: c.KL }, { text: "KL on prompts it has not seen", value: c["KL held out"] },
        { text: "KL of the empty circuit, unseen prompts", value: c["KL empty"] },
        { text: "logit difference kept, unseen prompts", value: c["logit difference"], kind: "answer" }], "How good the circuit is"),
      ...(c.problems.length ? [el("p", { class: "problem" }, `This circuit is worthless: ${c.problems.join("; ")}.`)] : []));
    inspect("start");
  }

  function inspect(how) {
    const name = chosen.slice(1), about = data.effects[name], known = circuit().arrows;
    const list = (all, side) => {
      if (!all.length) return el("p", { class: "note" }, "nothing at this threshold");
      const items = all.sort((a, b) => b[3] - a[3]).slice(0, 8).map((a) => el("li", {},
        `${full(a[side])}${a[2] ? ` (${READS[a[2]]})` : ""} `, el("span", {}, number(a[3]))));
      return el("ul", { class: "edges" }, ...items, all.length > 8 ? el("li", {}, `and ${all.length - 8} weaker ones`) : null);
    };
    const into = known.filter((a) => a[1] === chosen), out = known.filter((a) => a[0] === chosen);
    const inside = into.length + out.length > 0;
    const told = el("p", { class: "note told", "aria-live": "off" });
    const pattern = data.patterns[name], at = (q, k) => pattern[(q * (q + 1)) / 2 + k] / 1000;
    panel.replaceChildren(
      el("h3", {}, `Head ${name}`, inside ? el("span", { class: "tag" }, "in the circuit") : null),
      about ? el("p", { class: "note" }, `Cutting its output ${about.effect < 0 ? "raises" : "lowers"} the logit difference by ${number(Math.abs(about.effect))} (mean of ${data.n_held_out} prompts that the search has not seen). ` +
        `From the last token it looks at the right name ${number(about.IO)}, at the other name ${number(about.S1)} and ${number(about.S2)}.`)
        : el("p", { class: "note" }, "In none of the four circuits: its effect alone was not measured."),
      el("div", { class: "two" }, el("div", {}, el("h4", {}, "Reads from"), list(into, 0)), el("div", {}, el("h4", {}, "Writes to"), list(out, 1))),
      el("h4", {}, "Where it looks (rows look at columns)"),
      scroller(attention(`Attention of head ${name}`, data.prompt, at, (text, why) => {
        told.textContent = text;
        if (why === "focus") live.textContent = text;
      })), told);
    if (how === "focus") live.textContent = `Head ${name}, ${inside ? `in the circuit, reads from ${into.length}, writes to ${out.length}` : "not in the circuit"}`;
  }

  const choose = (node) => {
    chosen = node;
    draw();
    picture.querySelector(`[data-node="${node}"]`).focus();
    inspect("focus");
  };
  picture.addEventListener("click", (event) => { const node = event.target.closest("[data-node]"); if (node) choose(node.dataset.node); });
  picture.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    const [l, h] = chosen.slice(1).split(".").map((n, i) => Number(n) + move[i]);
    if (l >= 0 && l < layers && h >= 0 && h < heads) choose(`a${l}.${h}`);
  });
  const label = () => `threshold ${circuit().threshold}, ${circuit().edges} edges`;
  const slider = el("input", { type: "range", min: 0, max: data.circuits.length - 1, step: 1, value: step,
    "aria-valuetext": label(), oninput: () => { step = Number(slider.value); slider.setAttribute("aria-valuetext", label()); draw(); } });
  const ticks = el("div", { class: "ticks", "aria-hidden": "true" }, ...data.circuits.map((c) => el("span", {}, String(c.threshold))));
  const key = el("p", { class: "legend" }, ...Object.entries(READS).map(([part, text]) => el("span", {}, el("i", { class: `line ${part || "sum"}` }), text)));
  const slide = field("Threshold of the search (nats of KL)", slider);
  slide.append(ticks);
  box.append(el("div", { class: "controls" }, slide), said,
    el("div", { class: "beside" }, el("div", {}, picture, key), panel), live);
  draw();
}

// ---------------------------------------------------------------- neurons

const SORTS = {
  score: ["score of the rule", (n) => -(n.scores[0] ?? -9)],
  gap: ["score above the neighbour's rule", (n) => -((n.scores[0] ?? -9) - (n.scores[2] ?? 0))],
  place: ["layer and number", (n) => n.at[0] * 1e5 + n.at[1] * 2 + (n.at[2] < 0)],
};

function neurons(box, data) {
  const text = data.excerpts.map((ids) => ids.map((i) => data.words[i]).join("").toLowerCase());
  let shown = 10;
  const list = el("ol", { class: "neurons" }), count = el("p", { class: "count", role: "status", "aria-live": "polite" });
  const more = el("button", { type: "button", class: "more", onclick: () => {
    const first = shown;
    shown += 10;
    draw();
    list.children[first]?.querySelector("h3").focus();
  } }, "Show ten more");
  const redraw = () => { shown = 10; draw(); };
  const search = el("input", { type: "search", placeholder: "such as: city", oninput: redraw });
  const layer = choice([["", "all"], ...data.layers.map((l) => [l, String(l)])], redraw);
  const end = choice([["", "both"], ["1", "positive"], ["-1", "negative"]], redraw);
  const sort = choice(Object.entries(SORTS).map(([key, [name]]) => [key, name]), redraw);
  const score = (s) => (s === null ? "–" : number(s));

  function card(n) {
    const [at, i, sign] = n.at;
    const examples = n.examples.map(([excerpt, ...activations]) => el("p", { class: "excerpt" },
      ...data.excerpts[excerpt].map((id, k) => {
        const v = activations[k] / 1000, token = data.words[id].replace(/\n/g, "⏎ ").slice(k === 0 && data.words[id][0] === " " ? 1 : 0);
        return v < 0.05 ? token : el("span", { style: `--v:${v}`, class: v > 0.55 ? "full" : null, title: `${(v * n.max).toPrecision(3)}` }, token);
      })));
    return el("li", {}, el("article", {},
      el("h3", { tabindex: -1 }, `${at}.${i}`, el("span", { class: "tag" }, sign > 0 ? "positive end" : "negative end")),
      el("p", { class: "rule" }, n.rule),
      el("p", { class: "note" }, `Score ${score(n.scores[0])} · table of tokens ${score(n.scores[1])} · another neuron's rule ${score(n.scores[2])} · largest activation ${n.max}`),
      ...examples));
  }

  function draw() {
    const wanted = search.value.toLowerCase().replace(/[“”"]/g, "");
    const found = data.neurons.filter((n) => (layer.value === "" || n.at[0] === Number(layer.value)) &&
      (end.value === "" || n.at[2] === Number(end.value)) && (!wanted || n.rule.toLowerCase().includes(wanted) ||
        n.examples.some(([e]) => text[e].includes(wanted)))).sort((a, b) => SORTS[sort.value][1](a) - SORTS[sort.value][1](b));
    const scores = found.map((n) => n.scores[0]).filter((x) => x !== null).sort((a, b) => a - b);
    count.textContent = `${found.length} of ${data.neurons.length} neuron ends` +
      (scores.length ? `, median score of the rule ${number(scores[scores.length >> 1])}` : "");
    list.replaceChildren(...found.slice(0, shown).map(card));
    more.hidden = found.length <= shown;
  }

  box.append(el("div", { class: "controls" }, field("Search in rules and excerpts", search), field("Layer", layer), field("End", end),
    field("Sorted by", sort)), count, list, more);
  draw();
}

// ---------------------------------------------------------------- start

const VIEWS = { traces, circuits, neurons };

for (const box of document.querySelectorAll("[data-explore]")) {
  const view = VIEWS[box.dataset.explore];
  if (!view) continue; // such as "try", which has its own script
  try {
    const answer = await fetch(new URL(box.dataset.from, document.baseURI));
    const data = await answer.json();
    box.replaceChildren();
    view(box, data);
    box.dataset.ready = "yes";
  } catch (error) {
    console.error(error);
    box.prepend(el("p", { class: "problem" }, "The interactive part could not be loaded; this table stands in for it."));
  }
}
