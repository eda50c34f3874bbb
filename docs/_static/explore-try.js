// The page "Try it": the embedded model in the reader's browser, by ONNX Runtime Web on one
// thread. The site's builder puts the runtime, the model and the tokenizer into `try/`
// (tools/browser_pages.py); they are fetched when the button is pressed, from this site only.
//
// `window.mechtutTry` has what the page uses, for consoles and tests:
//   await load()                 fetches and starts the model
//   encode(text)                 token ids, as Python's tokenizer gives them
//   decode(ids)                  text
//   await run(ids, patches)      {n, lens, residual, attention}, flat Float32Arrays of
//                                [level, n, vocabulary], [level, n, width], [layer, head, n, n];
//                                level 0 is the embedding, level i + 1 the output of layer i,
//                                lens[last level] the model's own logits; `patches` is a list
//                                of {level, pos, value}, which replace residual streams
//   strangers(text)              words that the model has never seen, with near ones
//   progress                     {loaded, total, steps}: bytes, and how often the bar moved
import { attention, bars, choice, el, field, grid, number, radios, spoken, word } from "./explore.js";

const box = document.querySelector('[data-explore="try"]');
const place = new URL(box.dataset.from, document.baseURI);
const at = (file) => new URL(file, place);
const [LAYERS, HEADS, WIDTH, CONTEXT] = [8, 6, 192, 128], LEVELS = LAYERS + 1;
let session, ort, tokenizer, world;

// ---------------------------------------------------------------- fetching

/** The bytes of a file; `got` is told how many arrived, each time some do. */
async function bytes(file, got) {
  const answer = await fetch(at(file));
  if (!answer.ok) throw new Error(`${file}: ${answer.status}`);
  const reader = answer.body.getReader(), parts = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    got(value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

const json = (data) => JSON.parse(new TextDecoder().decode(data));
let loading = null;
const moved = { loaded: 0, total: 0, steps: 0 };

/** Fetch and start everything, once; `progress(loaded, total)` is told how far it is. */
function load(progress = () => {}) {
  loading ??= start(progress).catch((error) => { loading = null; throw error; });
  return loading;
}

async function start(progress) {
  const sizes = await manifest, total = Object.values(sizes).reduce((a, b) => a + b);
  Object.assign(moved, { loaded: 0, total, steps: 0 });
  const got = (n) => {
    moved.loaded += n;
    moved.steps += 1;
    progress(moved.loaded, total);
  };
  const get = (file) => bytes(file, got);
  const script = "ort.wasm.bundle.min.mjs";
  const [wasm, model, words, examples] = await Promise.all(
    ["ort-wasm-simd-threaded.wasm", "mini.onnx", "tokenizer.json", "examples.json"].map(get));
  ort = await import(at(script));
  got(sizes[script]);
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmBinary = wasm.buffer;
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  tokenizer = new Tokenizer(json(words));
  world = json(examples);
}

const manifest = fetch(at("sizes.json")).then((answer) => answer.json());
manifest.catch(() => {});

// ---------------------------------------------------------------- tokens

/** Byte-level BPE as in mechtut/data/mini/tokenizer.json: whole words first, merges for the rest. */
class Tokenizer {
  constructor({ model }) {
    this.ids = new Map(Object.entries(model.vocab));
    this.texts = [...this.ids].sort((a, b) => a[1] - b[1]).map(([text]) => text);
    this.ranks = new Map(model.merges.map((pair, i) => [pair.join(" "), i]));
    // printable bytes stand for themselves, the others for letters from Ā on
    const own = (b) => (b > 32 && b < 127) || (b > 160 && b < 173) || b > 173;
    let next = 256;
    this.letters = Array.from({ length: 256 }, (_, b) => String.fromCharCode(own(b) ? b : next++));
    this.bytes = new Map(this.letters.map((letter, b) => [letter, b]));
  }

  /** The text in pieces, none of which shares a token with another. */
  pieces(text) {
    if (!text) return [];
    const spaced = ` ${text}`.replace(/^ (?=\s|Q:|A:|[^A-Za-z0-9])/, "");
    return spaced.match(/Q:|A:| ?[A-Za-z]+| ?[0-9]{1,2}|\n\n|\n| {3}(?= [A-Za-z])| {4}|[^\sA-Za-z0-9]|\s/gu) ?? [];
  }

  piece(text) {
    let parts = [...new TextEncoder().encode(text)].map((b) => this.letters[b]);
    const whole = this.ids.get(parts.join(""));
    if (whole !== undefined) return [whole];
    for (;;) {
      let best = Infinity, where = -1;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < best) [best, where] = [rank, i];
      }
      if (where < 0) return parts.map((part) => this.ids.get(part));
      parts.splice(where, 2, parts[where] + parts[where + 1]);
    }
  }

  encode(text) { return this.pieces(text).flatMap((piece) => this.piece(piece)); }

  decode(ids) {
    const letters = [...ids].map((id) => this.texts[id]).join("");
    return new TextDecoder().decode(Uint8Array.from([...letters].map((l) => this.bytes.get(l))));
  }
}

/** Words of a text that the model has never seen, each with words that look like it. */
function strangers(text) {
  const words = new Set(world.words), endings = new Set(world.endings), found = [];
  for (const piece of tokenizer.pieces(text)) {
    const name = piece.trim();
    if (!/^[A-Za-z]/.test(name) || words.has(name) || /^[QA]:$/.test(name)) continue;
    const parts = tokenizer.piece(piece).map((id) => tokenizer.decode([id]).trim());
    if (parts.length === 2 && words.has(parts[0]) && endings.has(parts[1])) continue;
    if (found.some((f) => f.name === name)) continue;
    const near = world.words.map((w) => [distance(name.toLowerCase(), w.toLowerCase()), w]);
    found.push({ name, near: near.sort((a, b) => a[0] - b[0]).slice(0, 4).map(([, w]) => w) });
  }
  return found;
}

/** How many letters one has to insert, delete or replace to turn one word into another. */
function distance(a, b) {
  let row = Array.from({ length: b.length + 1 }, (_, i) => i);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++)
      next[j] = Math.min(next[j - 1] + 1, row[j] + 1, row[j - 1] + (a[i - 1] !== b[j - 1]));
    row = next;
  }
  return row[b.length];
}

// ---------------------------------------------------------------- running

async function run(ids, patches = []) {
  const n = ids.length, mask = new Float32Array(LEVELS * n), value = new Float32Array(LEVELS * n * WIDTH);
  for (const patch of patches) {
    mask[patch.level * n + patch.pos] = 1;
    value.set(patch.value, (patch.level * n + patch.pos) * WIDTH);
  }
  const out = await session.run({
    ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, n]),
    patch_mask: new ort.Tensor("float32", mask, [LEVELS, n, 1]),
    patch_value: new ort.Tensor("float32", value, [LEVELS, n, WIDTH]),
  });
  return { n, lens: out.lens.data, residual: out.residual.data, attention: out.attention.data };
}

/** Probabilities of the next token, read from a level of the stream at a position. */
function probabilities({ n, lens }, level = LEVELS - 1, pos = n - 1) {
  const size = tokenizer.texts.length, logits = lens.subarray((level * n + pos) * size, (level * n + pos + 1) * size);
  let most = -Infinity, sum = 0;
  for (const x of logits) if (x > most) most = x;
  const out = new Float32Array(size);
  for (let i = 0; i < size; i++) sum += out[i] = Math.exp(logits[i] - most);
  return out.map((x) => x / sum);
}

/** The k likeliest tokens as [id, probability]. */
function likeliest(p, k) {
  return [...p.keys()].sort((a, b) => p[b] - p[a]).slice(0, k).map((id) => [id, p[id]]);
}

/** The id of the likeliest token. */
const best = (p) => p.reduce((top, x, id) => (x > p[top] ? id : top), 0);

const state = ({ n, residual }, level, pos) => residual.slice((level * n + pos) * WIDTH, (level * n + pos + 1) * WIDTH);

// ---------------------------------------------------------------- the page

const levelName = (level) => (level ? `after layer ${level - 1}` : "embedding");

function page() {
  const texts = {}, tokens = {}, runs = {}, notes = {};
  const live = spoken(), results = el("div"), prompts = el("div", { class: "two prompts" });
  let lensOf = "target", looksOf = "target", layer = 0, head = 0, how = { level: 4, from: 0, to: 0 }, turn = 0;

  for (const [key, label] of [["source", "Prompt A, where a state is taken from"], ["target", "Prompt B, where it is put"]]) {
    texts[key] = el("textarea", { rows: 2, spellcheck: "false", autocapitalize: "off", oninput: () => soon() });
    notes[key] = el("div", { "aria-live": "polite" });
    prompts.append(el("div", {}, field(label, texts[key]), notes[key]));
  }

  const examples = el("div", { class: "buttons", role: "group", "aria-label": "Examples" }, el("span", {}, "Examples:"),
    ...world.examples.map((e) => el("button", { type: "button", onclick: () => take(e) }, e.name)));

  function take(example) {
    texts.source.value = example.source;
    texts.target.value = example.target;
    how = { level: example.level, from: example.from, to: example.to };
    return all();
  }

  let waiting;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(all, 300); };

  async function all() {
    const mine = ++turn, found = {};
    results.classList.add("stale"); // until the new numbers are there
    for (const key of ["source", "target"]) {
      const ids = tokenizer.encode(texts[key].value.trimEnd());
      tokens[key] = ids.map((id) => tokenizer.decode([id]));
      notes[key].replaceChildren(...remarks(key, ids));
      if (!ids.length || ids.length > CONTEXT) return;
      found[key] = await run(ids);
      if (mine !== turn) return; // the reader has typed on
    }
    Object.assign(runs, found);
    how.from = Math.min(how.from, runs.source.n - 1);
    how.to = Math.min(how.to, runs.target.n - 1);
    draw();
    await patch(mine);
    results.classList.remove("stale");
    box.dataset.turn = String(mine);
  }

  function remarks(key, ids) {
    if (!ids.length) return [el("p", { class: "problem" }, "Type something.")];
    if (ids.length > CONTEXT) return [el("p", { class: "problem" }, `${ids.length} tokens, but the model reads ${CONTEXT} at most.`)];
    return strangers(texts[key].value).map(({ name, near }) => el("p", { class: "problem" },
      `The model has never seen “${name}”. Near words of its world: ${near.join(", ")}.`));
  }

  const words = (p, k, kind) => likeliest(p, k).map(([id, value]) => ({ text: word(tokenizer.decode([id])), value, kind }));

  function nextTokens() {
    return el("section", {}, el("h3", {}, "What comes next"), el("div", { class: "two" }, ...["source", "target"].map((key) =>
      el("div", {}, el("h4", {}, key === "source" ? "Prompt A" : "Prompt B"),
        bars(words(probabilities(runs[key]), 6), `Likeliest next tokens of prompt ${key === "source" ? "A" : "B"}`)))));
  }

  const ofPrompt = (chosen, change) => radios("Prompt", [["target", "B"], ["source", "A"]], change, chosen);

  function lens() {
    const told = el("p", { class: "note told" }), hold = el("div", { class: "scroll" });
    const which = ofPrompt(lensOf, (key) => { lensOf = key; fill(); });
    const fill = () => {
      const names = tokens[lensOf], ran = runs[lensOf];
      const cells = Array.from({ length: LEVELS }, (_, row) => names.map((_, pos) => {
        const p = probabilities(ran, LEVELS - 1 - row, pos), id = best(p);
        return [word(tokenizer.decode([id])), p[id]];
      }));
      const says = (row, pos) => `${levelName(LEVELS - 1 - row)}, at “${word(names[pos])}”: “${cells[row][pos][0]}” ${number(cells[row][pos][1])}`;
      hold.replaceChildren(grid({ label: "Logit lens", kind: "lens", at: [0, names.length - 1], columns: names.map(word),
        rows: Array.from({ length: LEVELS }, (_, row) => (row === LEVELS - 1 ? "emb." : `L${LEVELS - 2 - row}`)),
        cell: (row, pos) => ({ value: cells[row][pos][1], text: cells[row][pos][0], says: says(row, pos) }),
        pick: (row, pos, why) => { told.textContent = says(row, pos); if (why === "focus") live.textContent = says(row, pos); },
        enter: (row, pos) => { how = { ...how, level: LEVELS - 1 - row, [lensOf === "source" ? "from" : "to"]: pos }; draw(); patch(turn); } }));
    };
    fill();
    return el("section", {}, el("h3", {}, "Logit lens"), el("p", { class: "note" },
      "The likeliest next token if one reads it off the stream after each layer, through the final norm and the unembedding. ",
      "Enter or a double click on a cell chooses it for the patch above."), which, hold, told);
  }

  function looks() {
    const told = el("p", { class: "note told" }), hold = el("div", { class: "scroll" });
    const fill = () => {
      const { n, attention: all } = runs[looksOf], start = (layer * HEADS + head) * n * n;
      hold.replaceChildren(attention(`Attention of head ${layer}.${head} in prompt ${looksOf === "source" ? "A" : "B"}`, tokens[looksOf], (q, k) => all[start + q * n + k],
        (text, why) => { told.textContent = text; if (why === "focus") live.textContent = text; }));
    };
    const counted = (n) => Array.from({ length: n }, (_, i) => [i, String(i)]);
    const controls = el("div", { class: "controls" },
      ofPrompt(looksOf, (key) => { looksOf = key; fill(); }),
      field("Layer", choice(counted(LAYERS), (v) => { layer = Number(v); fill(); }, layer)),
      field("Head", choice(counted(HEADS), (v) => { head = Number(v); fill(); }, head)));
    fill();
    return el("section", {}, el("h3", {}, "Where a head looks"), controls, hold, told);
  }

  const outcome = el("div", { class: "outcome" });

  function carry() {
    const options = (key) => tokens[key].map((t, i) => [i, `${i}: ${word(t)}`]);
    const set = (name) => (v) => { how = { ...how, [name]: Number(v) }; patch(turn); };
    return el("section", {}, el("h3", {}, "Carry a state from A to B"), el("p", { class: "note" },
      "The residual stream at one token of prompt A replaces that at one token of prompt B; every later layer of B then computes with it."),
    el("div", { class: "controls" },
      field("Which level", choice(Array.from({ length: LEVELS }, (_, i) => [i, levelName(i)]), set("level"), how.level)),
      field("From token of A", choice(options("source"), set("from"), how.from)),
      field("To token of B", choice(options("target"), set("to"), how.to))), outcome);
  }

  async function patch(mine) {
    const ids = tokenizer.encode(texts.target.value.trimEnd()), { level, from, to } = how;
    const value = state(runs.source, level, from), own = state(runs.target, level, to);
    const before = probabilities(runs.target);
    const after = probabilities(await run(ids, [{ level, pos: to, value }]));
    const same = probabilities(await run(ids, [{ level, pos: to, value: own }]));
    if (mine !== turn || how.level !== level || how.from !== from || how.to !== to) return;
    const most = same.reduce((m, p, i) => Math.max(m, Math.abs(p - before[i])), 0);
    const shown = [...new Set([...likeliest(before, 4), ...likeliest(after, 4)].map(([id]) => id))];
    const side = (p, kind) => bars(shown.map((id) => ({ text: word(tokenizer.decode([id])), value: p[id], kind })), "Next tokens of prompt B");
    const [was, is] = [before, after].map((p) => word(tokenizer.decode([best(p)])));
    outcome.replaceChildren(
      el("p", { class: "big" }, was === is ? `Prompt B still says “${is}”.` : `Prompt B now says “${is}” instead of “${was}”.`),
      el("div", { class: "two" }, el("div", {}, el("h4", {}, "Before"), side(before)), el("div", {}, el("h4", {}, "With the state of A"), side(after, "answer"))),
      el("p", { class: "note control" }, `Control: B's own state put back where it was changes ${most ? `no probability by more than ${most.toPrecision(1)}` : "nothing at all"}.`));
    live.textContent = outcome.querySelector(".big").textContent;
  }

  function draw() {
    results.replaceChildren(nextTokens(), carry(), lens(), looks());
  }

  box.replaceChildren(examples, prompts, results, live);
  return take(world.examples[0]);
}

async function begin() {
  const sizes = await manifest, total = Object.values(sizes).reduce((a, b) => a + b);
  const mega = (n) => (n / 1e6).toFixed(1);
  const bar = el("progress", { max: total, value: 0, "aria-label": "Loading" }), said = el("p", { class: "note", role: "status" });
  const button = el("button", { type: "button", class: "load", onclick: async () => {
    button.disabled = true;
    bar.hidden = false;
    said.textContent = "Loading…";
    try {
      await load((n) => { bar.value = n; said.textContent = `${mega(n)} of ${mega(total)} MB${n < total ? "" : ", starting…"}`; });
      await page();
      box.dataset.ready = "yes";
    } catch (error) {
      console.error(error);
      said.textContent = `The model could not be loaded: ${error.message}`;
      button.disabled = false;
    }
  } }, `Load the model (${mega(total)} MB)`);
  bar.hidden = true;
  box.prepend(el("div", { class: "start" }, button, bar, said));
  box.dataset.ready = "button";
}

window.mechtutTry = { load, run, encode: (text) => tokenizer.encode(text), decode: (ids) => tokenizer.decode(ids), strangers, progress: moved };
begin().catch(() => box.prepend(el("p", { class: "problem" },
  "This copy of the site was built without the model, or it is opened without a server; the table below stands in for it.")));
