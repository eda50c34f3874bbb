"""The pages to explore: their data against the model, and what a reader can do with
them in a real browser.
"""

import base64
import itertools
import json
import re
import sys

import pytest
import torch
from browser import ROOT, serious, watched

from mechtut import Edit, World, capture, load_model, trace
from mechtut.circuits.circuit import Circuit
from mechtut.circuits.drawing import arrows
from mechtut.experiments.smollm2 import stored
from mechtut.mini.corpus import corpus
from mechtut.models.loading import weight_fingerprint
from mechtut.neurons.statistics import excerpts
from mechtut.papers.causal_tracing import AverageTrace, window_layers
from mechtut.prompts.everyday import everyday_texts
from mechtut.prompts.subject_noise import Noise, corrupt

sys.path.insert(0, str(ROOT / "tools"))
import vendor

FOLDER = ROOT / "docs/_static/explore"
PAGES = ("traces", "circuits", "neurons")
CLOSE = {"rtol": 0, "atol": 1e-3}


def data(name: str) -> dict:
    """The file behind a page."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", device="cpu")


@pytest.fixture(scope="module")
def mini():
    return load_model("mini", device="cpu")


# ------------------------------------------------------------------ the numbers


def test_files_are_small_and_name_their_model(smollm2, mini):
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 3e6
    for name in (*PAGES, "examples"):
        model = mini if name == "examples" else smollm2
        found = data(name)
        assert found["model"] == model.name
        assert found["weights"] == weight_fingerprint(model)


def page_noise() -> Noise:
    """The noise of the page's averages."""
    average = stored("tracing/mlp_out", AverageTrace)
    return Noise(3.0, std=average.noise_std / 3)


def test_traces_use_the_noise_of_the_page():
    std = float(re.search(r"scale 3\.?0? x ([\d.]+)", data("traces")["noise"])[1])
    average = stored("tracing/mlp_out", AverageTrace)
    assert average.noise_std == pytest.approx(3 * std, rel=1e-4)


@pytest.mark.parametrize("component", ["resid_post", "mlp_out", "attn_out"])
def test_a_row_of_cells_is_what_trace_finds(smollm2, component):
    found, fact = data("traces"), data("traces")["facts"][2]
    pos, layers = fact["subject"][1] - 1, found["layers"]
    again = trace(
        smollm2,
        fact["prompt"],
        tuple(fact["subject"]),
        component=component,
        window=found["window"],
        noise=page_noise(),
        n_samples=found["n_samples"],
        seed=found["seed"],
        tokens=[pos],
    )
    row = fact["parts"][component]["p"][pos * layers : (pos + 1) * layers]
    torch.testing.assert_close(torch.tensor(row), again.scores[0], **CLOSE)
    assert again.answer == fact["answer"]
    assert again.clean_prob == pytest.approx(fact["clean"], abs=1e-3)
    assert again.corrupted_prob == pytest.approx(fact["corrupted"], abs=1e-3)


def test_likeliest_tokens_of_a_cell(smollm2):
    found, fact = data("traces"), data("traces")["facts"][5]
    pos, layer = fact["subject"][0], 4
    ids = smollm2.to_tokens(fact["prompt"])
    clean = capture(smollm2, ids[None], "mlp_out")["mlp_out"][:, 0]
    around = window_layers(layer, found["window"], found["layers"])
    edits = [Edit("mlp_out", i, clean[i, pos], pos=pos) for i in around]
    span = tuple(fact["subject"])
    drawn = corrupt(smollm2, page_noise(), found["n_samples"], span, found["seed"])
    batch = ids.repeat(found["n_samples"], 1)
    logits = capture(smollm2, batch, [], edits=[drawn.edit(), *edits]).logits
    top = logits[:, -1].softmax(-1).mean(0).topk(3)
    cell = 3 * (pos * found["layers"] + layer)
    part = fact["parts"]["mlp_out"]
    words = [found["words"][i] for i in part["top"][cell : cell + 3]]
    assert words == [smollm2.decode([t]) for t in top.indices.tolist()]
    shown = torch.tensor(part["top_p"][cell : cell + 3])
    torch.testing.assert_close(shown, top.values, **CLOSE)


def test_circuits_are_the_stored_ones(smollm2):
    found = data("circuits")
    for one in found["circuits"]:
        circuit = stored(f"circuits/threshold-{one['threshold']:g}", Circuit)
        expected = arrows(circuit.edges, circuit.graph)
        assert [tuple(a[:3]) for a in one["arrows"]] == [a[:3] for a in expected]
        shown = [a[3] for a in one["arrows"]]
        assert shown == pytest.approx([a[3] for a in expected], rel=1e-2)
        assert one["problems"] == circuit.problems
    assert (found["n_search"], found["n_held_out"]) == (16, 32), "the page says so"
    prompt = "".join(found["prompt"])
    assert f'"{prompt}"' in (ROOT / "docs/explore/circuits.md").read_text()
    ids = smollm2.to_tokens(prompt)
    pattern = capture(smollm2, ids[None], "pattern")["pattern"]
    lower = torch.ones(len(ids), len(ids)).tril().bool()
    for layer, head in ((0, 0), (23, 3), (29, 8)):
        shown = torch.tensor(found["patterns"][f"{layer}.{head}"]) / 1000
        torch.testing.assert_close(shown, pattern[layer, 0, head][lower], **CLOSE)


def test_excerpts_are_what_neurons_fire_on(smollm2):
    found = data("neurons")
    texts = [tuple(found["words"][i] for i in row) for row in found["excerpts"]]
    rows = torch.cat(list(excerpts(smollm2, everyday_texts(), 32, 64)))
    for number in (0, len(found["neurons"]) // 2):
        neuron = found["neurons"][number]
        layer, i, end = neuron["at"]
        which, *shown = neuron["examples"][0]
        (row,) = [r for r in rows if tuple(smollm2.to_str_tokens(r)) == texts[which]]
        activations = end * capture(smollm2, row[None], "mlp_act")["mlp_act"]
        activations = activations[layer, 0, :, i]
        assert float(activations.max()) == pytest.approx(neuron["max"], rel=1e-2)
        expected = (activations / activations.max()).clamp(min=0)
        torch.testing.assert_close(torch.tensor(shown) / 1000, expected, **CLOSE)


def test_scores_and_rules_are_the_stored_ones():
    table = stored("neurons/scores")
    table = table[table.sentence.notna()].reset_index(drop=True)
    shown = data("neurons")["neurons"]
    assert len(data("neurons")["layers"]) == 8, "the page says so, and the next line"
    assert all(n["at"][1] % 24 == 0 for n in shown)
    assert [n["rule"] for n in shown] == table.sentence.tolist()
    scores = [float("nan") if n["scores"][0] is None else n["scores"][0] for n in shown]
    assert scores == pytest.approx(table.rules.tolist(), abs=1e-3, nan_ok=True)


def test_examples_say_what_python_says(mini):
    for one in data("examples")["examples"]:
        logits = []
        for key in ("source", "target"):
            logits.append(mini.logits(mini.to_tokens(one[key]))[0, -1])
        source, target = (mini.to_tokens(one[k]) for k in ("source", "target"))
        layer = one["level"] - 1
        state = capture(mini, source[None], "resid_post")["resid_post", layer]
        edit = Edit("resid_post", layer, state[0, one["from"]], pos=one["to"])
        logits.append(capture(mini, target[None], [], edits=[edit]).logits[0, -1])
        for key, row in zip(("source", "target", "carried"), logits, strict=True):
            top = row.softmax(-1).topk(3)
            said = [(mini.decode([t]), p) for t, p in zip(*top[::-1], strict=True)]
            for (word, p), (token, q) in zip(one[f"{key}_says"], said, strict=True):
                assert p == pytest.approx(float(q), abs=1e-3)
                assert word == token or p < 1e-3  # of equals, any


def test_a_package_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    def pack(name, version, into):
        archive = into / f"{name}-{version}.tgz"
        archive.write_bytes(b"something else")
        return archive

    monkeypatch.setenv("MECHTUT_CACHE", str(tmp_path))
    monkeypatch.setattr(vendor, "pack", pack)
    with pytest.raises(ValueError, match="not the pinned file"):
        vendor.fetch("axe-core")
    assert not list((tmp_path / "vendor").iterdir())


# ------------------------------------------------------------------ saved results


def opened(visit, name: str, **how):
    page = visit(f"explore/{name}.html", **how)
    page.wait_for_selector("[data-ready]")
    return page


@pytest.mark.parametrize("name", [*PAGES, "try"])
def test_without_scripts_a_table_stands_in(browser, address, name):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{address}explore/{name}.html")
    assert page.locator(".explore table tbody tr").count() >= 4
    context.close()


def test_scripts_are_loaded_where_they_are_needed(visit):
    page = visit("nbs/papers/10_causal_tracing.html")
    loaded = page.evaluate("performance.getEntriesByType('resource').map(r => r.name)")
    assert not [url for url in loaded if "explore" in url or "/try/" in url]


def test_cells_are_walked_through_with_the_keyboard(visit):
    page, fact = opened(visit, "traces"), data("traces")["facts"][0]
    grid = page.get_by_role("grid")
    assert grid.locator("[tabindex='0']").count() == 1, "one stop of the Tab key"
    page.get_by_role("radio").first.focus()
    page.keyboard.press("Tab")
    row, column = map(int, page.evaluate("document.activeElement.dataset.at").split())
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    said = page.get_by_role("status").inner_text()
    p = fact["parts"]["resid_post"]["p"][(row + 1) * 30 + column + 1]
    assert f"after layer {column + 1}, at “{fact['tokens'][row + 1].strip()}”" in said
    assert f"probability of Paris {p:.3f}" in said
    page.keyboard.press("End")
    assert page.evaluate("document.activeElement.dataset.at") == f"{row + 1} 29"
    page.keyboard.press("Tab")
    assert not page.evaluate("!!document.activeElement.closest('.grid')")


def test_another_fact_and_component_are_drawn(visit):
    page, facts = opened(visit, "traces"), data("traces")["facts"]
    page.get_by_label("Fact").select_option("3")
    page.get_by_text("MLPs", exact=True).click()
    layers = data("traces")["layers"]
    assert page.locator(".cell").count() == len(facts[3]["tokens"]) * layers
    page.locator("[data-at='2 7']").hover()
    p = facts[3]["parts"]["mlp_out"]["p"][2 * layers + 7]
    assert page.locator(".panel .answer .value").first.inner_text() == f"{p:.3f}"
    assert "around layer 7" in page.locator(".panel h3").inner_text()


def test_the_slider_has_the_stored_thresholds(visit):
    page, found = opened(visit, "circuits"), data("circuits")["circuits"]
    slider = page.get_by_role("slider")
    slider.focus()
    page.keyboard.press("Home")
    for i, one in enumerate(found):
        if i:
            page.keyboard.press("ArrowRight")
        expected = f"threshold {one['threshold']:g}, {one['edges']} edges"
        assert slider.get_attribute("aria-valuetext") == expected
        assert page.locator("path.edge").count() == len(one["arrows"])
        worthless = page.get_by_text("This circuit is worthless").count()
        assert worthless == bool(one["problems"])


def test_a_head_is_inspected_with_the_keyboard(visit):
    page, found = opened(visit, "circuits"), data("circuits")
    page.locator("[data-node='a23.3']").click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert page.locator(".panel h3").inner_text().startswith("Head 22.2")
    assert page.get_by_role("status").inner_text().startswith("Head 22.2, ")
    last = len(found["prompt"]) - 1
    page.locator(f".attention [data-at='{last} 2']").focus()
    weight = found["patterns"]["22.2"][last * (last + 1) // 2 + 2] / 1000
    assert page.locator(".told").inner_text().endswith(f": {weight:.3f}")


def test_neurons_are_searched(visit):
    page = opened(visit, "neurons")
    page.get_by_label("Search in rules and excerpts").fill("paris")
    found = page.locator(".neurons > li")
    assert 0 < found.count() <= 10
    assert all("paris" in text.lower() for text in found.all_inner_texts())
    page.get_by_label("Layer").select_option("29")
    assert all(
        t.startswith("29.") for t in page.locator(".neurons h3").all_inner_texts()
    )
    page.get_by_label("Search in rules and excerpts").fill("no such word at all")
    assert found.count() == 0
    assert page.get_by_role("status").inner_text().startswith("0 of ")
    page.get_by_label("Search in rules and excerpts").fill("")
    page.get_by_role("button", name="Show ten more").focus()
    page.keyboard.press("Enter")
    assert found.count() == 20


@pytest.mark.parametrize("name", PAGES)
def test_a_page_fits_a_phone(phone, name):
    page, complaints = phone(f"explore/{name}.html")
    page.wait_for_selector("[data-ready]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not complaints


def test_colours_follow_the_scheme(visit):
    colour = "getComputedStyle(document.querySelector('.cell')).backgroundColor"
    shown = {s: opened(visit, "traces", scheme=s) for s in ("light", "dark")}
    assert shown["light"].evaluate(colour) != shown["dark"].evaluate(colour)


# ------------------------------------------------------------------ the model


@pytest.fixture(scope="module")
def tried(browser, address):
    """The page with the model loaded by its button, and all that it fetched."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    complaints, asked = [], []
    page = watched(context, address, complaints)
    page.on("request", lambda r: asked.append(r.url))
    page.goto(f"{address}explore/try.html")
    page.wait_for_selector("[data-ready='button']")
    before = list(asked)
    page.get_by_role("button", name="Load the model").click()
    page.wait_for_selector("[data-turn]", timeout=120_000)
    yield page, before, asked
    context.close()
    assert not complaints


def test_the_model_is_loaded_on_demand_and_from_here(tried, address, site):
    page, before, asked = tried
    files = {f.name: f.stat().st_size for f in (site / "_static/try").iterdir()}
    assert not [url for url in before if url.endswith((".wasm", ".onnx", ".mjs"))]
    assert all(url.startswith((address, "data:", "blob:")) for url in asked)
    fetched = {url.rsplit("/", 1)[1] for url in asked if "/_static/try/" in url}
    assert fetched == files.keys()
    assert sum(files.values()) <= 25e6
    assert not page.evaluate("crossOriginIsolated"), "no special headers are needed"


def test_the_bar_follows_the_bytes(tried, site):
    page = tried[0]
    sizes = json.loads((site / "_static/try/sizes.json").read_text())
    seen = page.evaluate("window.mechtutTry.progress")
    assert seen["total"] == sum(sizes.values()) == seen["loaded"]
    assert seen["steps"] > len(sizes), "it moves while a file comes"


def browser_run(page, text: str, patches: list[dict] | None = None) -> dict:
    """What the page's model computes, as tensors."""
    out = page.evaluate(
        """async ([text, patches]) => {
            const ids = window.mechtutTry.encode(text);
            for (const p of patches) p.value = Float32Array.from(p.value);
            const r = await window.mechtutTry.run(ids, patches), packed = {ids};
            for (const name of ["lens", "residual", "attention"]) {
                const raw = new Uint8Array(r[name].slice().buffer);
                let letters = "";
                for (let i = 0; i < raw.length; i += 8192)
                    letters += String.fromCharCode(...raw.subarray(i, i + 8192));
                packed[name] = btoa(letters);
            }
            return packed;
        }""",
        [text, patches or []],
    )
    n = len(out["ids"])
    shapes = {"lens": (9, n, -1), "residual": (9, n, 192), "attention": (8, 6, n, n)}
    for name, shape in shapes.items():
        raw = bytearray(base64.b64decode(out[name]))
        out[name] = torch.frombuffer(raw, dtype=torch.float32).view(shape)
    return out


PROMPTS = [e[k] for e in data("examples")["examples"] for k in ("source", "target")]
PROMPTS += ["A", "Q: hot\nA: cold\n\nQ: big\nA: small\n\nQ: tall\nA:"]


@pytest.mark.parametrize("text", PROMPTS)
def test_the_browser_computes_what_python_computes(tried, mini, text):
    found, ids = browser_run(tried[0], text), mini.to_tokens(text)
    assert found["ids"] == ids.tolist()
    acts = capture(mini, ids[None], ["resid_pre", "resid_post", "pattern"])
    streams = torch.cat([acts["resid_pre"][:1, 0], acts["resid_post"][:, 0]])
    torch.testing.assert_close(found["residual"], streams, **CLOSE)
    torch.testing.assert_close(found["lens"], mini.unembed(streams), **CLOSE)
    torch.testing.assert_close(found["lens"][-1], acts.logits[0], **CLOSE)
    torch.testing.assert_close(found["attention"], acts["pattern"][:, 0], **CLOSE)


def test_the_longest_prompt_fits(tried, mini):
    text = " ".join(["Everyone knows that"] * 42 + ["Riley works"])
    found = browser_run(tried[0], text)
    assert len(found["ids"]) == mini.n_ctx
    expected = mini.logits(mini.to_tokens(text))[0, -1]
    torch.testing.assert_close(found["lens"][-1, -1], expected, **CLOSE)


@pytest.mark.parametrize("level", [0, 1, 4, 8])
def test_a_patched_run_equals_python(tried, mini, level):
    one = data("examples")["examples"][0]
    source, target = (mini.to_tokens(one[k]) for k in ("source", "target"))
    acts = capture(mini, source[None], ["resid_pre", "resid_post"])
    streams = torch.cat([acts["resid_pre"][:1, 0], acts["resid_post"][:, 0]])
    value = streams[level, 4]
    site, layer = ("resid_post", level - 1) if level else ("resid_pre", 0)
    edits = [Edit(site, layer, value, pos=4)]
    expected = capture(mini, target[None], "pattern", edits=edits)
    patch = {"level": level, "pos": 4, "value": value.tolist()}
    found = browser_run(tried[0], one["target"], [patch])
    torch.testing.assert_close(found["lens"][-1], expected.logits[0], **CLOSE)
    torch.testing.assert_close(found["attention"], expected["pattern"][:, 0], **CLOSE)


def test_the_tokenizer_is_python_s(tried, mini):
    texts = [d.text for d in itertools.islice(corpus(World(), 5), 100)]
    texts += ["", " ", "Elephants, naïve ones!", "Q: 1732\nA:", "    list  x\n\n\n€"]
    found = tried[0].evaluate("ts => ts.map(t => window.mechtutTry.encode(t))", texts)
    assert found == [mini.tokenizer.encode(t) for t in texts]
    back = tried[0].evaluate("all => all.map(window.mechtutTry.decode)", found[:100])
    assert back == [mini.decode(ids) for ids in found[:100]]
    strange = "ts => ts.flatMap(t => window.mechtutTry.strangers(t).map(s => s.name))"
    assert tried[0].evaluate(strange, texts[:100]) == []


def changed(page, act) -> None:
    """Do something to the page and wait for what it computes then."""
    turn = page.get_attribute("[data-turn]", "data-turn")
    act()
    page.wait_for_selector(f"[data-turn]:not([data-turn='{turn}'])")


def test_a_reader_patches_an_example(tried):
    page = tried[0]
    for one in data("examples")["examples"]:
        button = page.get_by_role("button", name=one["name"])
        changed(page, button.click)
        (now, _), (was, _) = one["carried_says"][0], one["target_says"][0]
        said = page.locator(".outcome .big").inner_text()
        assert said == f"Prompt B now says “{now.strip()}” instead of “{was.strip()}”."
        assert "Control: B's own state" in page.locator(".control").inner_text()
        shown = page.locator("section").first.locator("li").first.inner_text()
        assert shown.split() == [
            one["source_says"][0][0].strip(),
            f"{one['source_says'][0][1]:.3f}",
        ]


def test_a_reader_types_and_walks_through_the_lens(tried):
    page = tried[0]
    box = page.get_by_label("Prompt B, where it is put")
    changed(page, lambda: box.fill("Everyone knows that Martin Rily speaks"))
    told = page.locator(".prompts .problem").inner_text()
    assert "never seen “Rily”" in told and "Riley" in told
    changed(page, lambda: box.fill("Everyone knows that Martin Riley speaks"))
    assert page.locator(".prompts .problem").count() == 0
    lens = page.locator(".grid.lens")
    lens.locator("[tabindex='0']").focus()
    assert "after layer 7, at “speaks”: “Irish” 0.99" in page.inner_text(
        "[role=status]"
    )
    page.keyboard.press("ArrowDown")
    assert "after layer 6, at “speaks”" in page.inner_text("[role=status]")
    page.keyboard.press("Enter")
    assert page.get_by_label("Which level").input_value() == "7"
    assert serious(page) == []


@pytest.mark.parametrize("which", ["A", "B"])
def test_a_reader_sees_where_a_head_looks_in_either_prompt(tried, mini, which):
    page, one = tried[0], data("examples")["examples"][0]
    changed(page, page.get_by_role("button", name=one["name"]).click)
    section = page.locator("section").last
    section.get_by_text(which, exact=True).click()
    section.get_by_label("Layer", exact=True).select_option("2")
    section.get_by_label("Head", exact=True).select_option("4")
    ids = mini.to_tokens(one["source" if which == "A" else "target"])
    weights = capture(mini, ids[None], "pattern.2")["pattern", 2][0, 4]
    words = [w.strip() for w in mini.to_str_tokens(ids)]
    last, at = len(ids) - 1, one["from"]
    cell = section.locator(f".attention [data-at='{last} {at}']")
    cell.focus()
    said = f"“{words[last]}” looks at “{words[at]}”: {weights[last, at]:.3f}"
    assert section.locator(".told").inner_text() == said
    label = section.get_by_role("grid").get_attribute("aria-label")
    assert label == f"Attention of head 2.4 in prompt {which}"


def test_the_loaded_page_fits_a_phone(tried):
    page = tried[0]
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1280, "height": 900})
