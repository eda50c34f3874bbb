"""Draw the ideas of the papers as SVG files: `python tools/drawings.py`.

They take the colour of the text around them (`currentColor`); where one stands alone,
as an image in a notebook, the style `alone` follows the reader's colour scheme. Colours
only mark shapes, never text, so that they can be read on white and on black.
"""

import math
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "docs/_static/drawings"
KNOWN, GIVEN, NEW, LOST = "#8464c9", "#2a9d8f", "#e08a2e", "#8a8f98"
ALONE = """<style class="alone">svg { color: #222; }
@media (prefers-color-scheme: dark) { svg { color: #e6e6e6; } }</style>"""


class Drawing:
    """Shapes on a canvas of 720 units, the width of a page's column."""

    def __init__(self, name: str, height: int) -> None:
        self.name, self.height, self.parts = name, height, []

    def text(self, x, y, words, *, size=14, anchor="middle", weight="normal", **more):
        style = "".join(f' {k}="{v}"' for k, v in more.items())
        self.parts.append(
            f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"'
            f' font-weight="{weight}" fill="currentColor"{style}>{escape(words)}</text>'
        )

    def dot(self, x, y, colour, r=8, **more):
        style = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in more.items())
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="{r}" fill="{colour}"{style}/>')

    def box(self, x, y, w, h, colour="none", *, line="currentColor", opacity=1.0, r=4):
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{r}" fill="{colour}"'
            f' fill-opacity="{opacity}" stroke="{line}" stroke-opacity="0.5"/>'
        )

    def line(self, x1, y1, x2, y2, *, colour="currentColor", width=1.5, bend=0.0, **k):
        """A line, bent upwards by `bend`; with `arrow=True` it has a head."""
        head = f' marker-end="url(#{self.name}-head)"' if k.pop("arrow", False) else ""
        style = "".join(f' {n.replace("_", "-")}="{v}"' for n, v in k.items())
        mx, my = (x1 + x2) / 2, (y1 + y2) / 2 - bend
        self.parts.append(
            f'<path d="M{x1} {y1} Q{mx} {my} {x2} {y2}" fill="none" stroke="{colour}"'
            f' stroke-width="{width}"{head}{style}/>'
        )

    def cells(self, x, y, values, colour, *, across=True, size=14):
        """A vector: its cells, darker for larger values."""
        for i, v in enumerate(values):
            dx, dy = (i * size, 0) if across else (0, i * size)
            self.box(x + dx, y + dy, size, size, colour, opacity=v, r=1)

    def save(self) -> None:
        head = (
            f'<svg viewBox="0 0 720 {self.height}" xmlns="http://www.w3.org/2000/svg"'
            ' font-family="system-ui, sans-serif">'
        )
        marker = (
            f'<defs><marker id="{self.name}-head" viewBox="0 0 10 10" refX="9" refY="5"'
            ' markerWidth="7" markerHeight="7" orient="auto-start-reverse">'
            '<path d="M0 0 L10 5 L0 10 z" fill="currentColor"/></marker></defs>'
        )
        text = "\n".join([head, ALONE, marker, *self.parts, "</svg>"]) + "\n"
        (FOLDER / f"{self.name}.svg").write_text(text, encoding="utf-8")


def activation_patching() -> None:
    """Two prompts; one state of the first is written into the run of the second."""
    d = Drawing("activation_patching", 236)
    words = ["Mary", "John", "…", "gave", "to"]
    runs = (
        (20, "clean", "John", KNOWN, "Mary"),
        (380, "corrupted, with one clean state", "Ann", LOST, "Mary?"),
    )
    for x, title, giver, colour, answer in runs:
        d.text(x + 132, 22, title, weight="600")
        for i, word in enumerate([*words[:3], giver, *words[3:]]):
            cx = x + 24 + 46 * i
            d.text(cx, 226, word, size=13, weight="600" if i == 3 else "normal")
            for layer in range(4):
                moved = i == 3 or (i == 5 and layer > 1)
                back = KNOWN if (i == 3 and layer) or layer > 1 else colour
                d.dot(cx, 196 - 42 * layer, back if moved else LOST, 9,
                      fill_opacity=0.9 if moved else 0.3)  # fmt: skip
                if layer:
                    d.line(cx, 185 - 42 * (layer - 1), cx, 166 - 42 * (layer - 1),
                           opacity=0.4)  # fmt: skip
        d.text(x + 254, 50, answer, size=14, weight="600")
    x, y = 20 + 24 + 46 * 3, 196 - 42
    d.dot(x + 360, y, KNOWN, 9, stroke="currentColor", stroke_width=2)
    d.line(x + 12, y - 6, x + 348, y - 6, colour=NEW, width=3, bend=70, arrow=True)
    d.text(350, 92, "one state", size=13)
    d.save()


def causal_tracing() -> None:
    """Clean, corrupted, patched: one state is carried over."""
    d = Drawing("causal_tracing", 270)
    words, first = ["The", "Eiffel", "Tower", "is", "in"], 1
    runs = {"clean run": 40, "corrupted run": 280, "patched run": 520}
    bars = {"clean run": 60, "corrupted run": 6, "patched run": 44}
    for run, x in runs.items():
        d.text(x + 80, 20, run, weight="600")
        for i, word in enumerate(words):
            d.text(x + 40 * i, 250, word, size=12)
            for layer in range(4):
                y = 200 - 36 * layer
                broken = run != "clean run" and i >= first
                healed = run == "patched run" and (
                    (i == 2 and layer >= 1) or (i == 4 and layer >= 2)
                )
                colour = LOST if broken and not healed else KNOWN
                fade = 0.45 if colour == LOST else 0.9
                d.dot(x + 40 * i, y, colour, fill_opacity=fade)
                if layer:
                    d.line(x + 40 * i, y + 27, x + 40 * i, y + 9, opacity=0.4)
        if run != "clean run":
            d.text(x + 60, 230, "+ noise", size=12)
        d.line(x + 160, 84, x + 160, 66, opacity=0.4)
        d.text(x + 74, 58, "Paris", size=13, anchor="end")
        d.box(x + 80, 47, 80, 13, r=2)
        d.box(x + 80, 47, bars[run], 13, KNOWN, opacity=0.9, r=2, line="none")
    x, y = 40 + 80, 200 - 36
    d.dot(x, y, KNOWN, 12, stroke="currentColor", stroke_width=2)
    d.dot(520 + 80, y, KNOWN, 12, stroke="currentColor", stroke_width=2)
    d.line(x + 13, y - 3, 520 + 66, y - 3, bend=56, width=2, arrow=True)
    d.save()


def rome() -> None:
    """A key picks a value out of a matrix; a rank-one change gives it another one."""
    d = Drawing("rome", 230)
    key, value = [0.9, 0.15, 0.6, 0.1, 0.75, 0.3], [0.7, 0.2, 0.85, 0.4, 0.55]
    table = [[((3 * i + 5 * j) % 7) / 12 + 0.08 for j in range(5)] for i in range(6)]
    d.text(92, 24, "key", weight="600")
    d.text(92, 214, "“… Eiffel Tower”", size=12)
    d.cells(82, 50, key, GIVEN, across=False, size=22)
    for x, title in ((190, "memory W"), (470, "W + u vᵀ")):
        d.text(x + 55, 24, title, weight="600")
        for i, row in enumerate(table):
            d.cells(x, 50 + 22 * i, row, KNOWN, size=22)
    for i, k in enumerate(key):
        d.cells(470, 50 + 22 * i, [k * v for v in value], NEW, size=22)
    d.line(112, 116, 182, 116, arrow=True)
    d.cells(190, 188, [0.5, 0.7, 0.3, 0.8, 0.2], KNOWN, size=22)
    d.line(310, 116, 462, 116, width=2, arrow=True)
    d.text(386, 104, "one fact edited", size=12)
    d.text(386, 136, "every other key: as before", size=11)
    d.cells(470, 188, value, NEW, size=22)
    d.text(590, 204, "value: Rome", size=12, anchor="start")
    d.text(310, 204, "value: Paris", size=12, anchor="start")
    d.save()


def function_vectors() -> None:
    """A vector out of few-shot prompts, added to a prompt without examples."""
    d = Drawing("function_vectors", 240)
    prompts = ["hot → cold, big → small, up →", "new → old, in → out, dark →"]
    prompts.append("good → bad, high → low, left →")
    for i, prompt in enumerate(prompts):
        y = 40 + 62 * i
        d.box(16, y, 220, 34)
        d.text(126, y + 22, prompt, size=12)
        for head in range(3):
            strong = head == 1
            d.dot(258 + 20 * head, y + 17, NEW if strong else LOST, 7,
                  fill_opacity=0.95 if strong else 0.4)  # fmt: skip
        d.line(318, y + 17, 364, 119 + 3 * (i - 1), opacity=0.7, arrow=i == 1)
    d.text(126, 22, "prompts with examples", weight="600")
    d.text(278, 22, "heads", weight="600")
    d.text(
        16,
        228,
        "the examples are different, the task is the same",
        size=11,
        anchor="start",
    )
    d.cells(368, 112, [0.8, 0.3, 0.95, 0.5, 0.7, 0.2], NEW, size=14)
    d.text(410, 100, "function vector", weight="600", size=13)
    d.text(410, 146, "mean output of", size=11)
    d.text(410, 160, "a few heads", size=11)
    d.line(458, 119, 536, 119, width=2, arrow=True)
    d.text(492, 110, "add", size=12)
    d.text(610, 22, "a prompt without examples", weight="600")
    for layer in range(4):
        here = layer == 1
        y = 170 - 34 * layer
        d.dot(552, y - 17, NEW if here else LOST, 9, fill_opacity=0.9 if here else 0.5)
        if layer:
            d.line(552, y + 7, 552, y - 6, opacity=0.5)
    d.box(520, 180, 64, 30)
    d.text(552, 200, "dry →", size=13)
    d.line(562, 51, 610, 51, arrow=True)
    d.text(620, 56, "wet", anchor="start", weight="600")
    d.save()


def acdc() -> None:
    """From the output back, every edge is cut that the task does not need."""
    d = Drawing("acdc", 240)
    rows = {0: [90, 170], 1: [50, 130, 210], 2: [50, 130, 210], 3: [130]}
    kept = {(1, 0, 3, 0), (2, 2, 3, 0), (1, 1, 2, 2), (0, 1, 1, 1), (0, 0, 1, 0)}
    ends = [(r, i) for r, xs in rows.items() for i in range(len(xs))]

    def place(r, i, x):
        return x + rows[r][i], 206 - 56 * r

    for x, title in ((20, "every edge"), (440, "the circuit")):
        d.text(x + 130, 22, title, weight="600")
        used = {(r, i) for a, b, c, e in kept for r, i in ((a, b), (c, e))}
        for r1, i1 in ends:
            for r2, i2 in ends:
                if r1 >= r2 or r2 - r1 > 2:
                    continue
                (x1, y1), (x2, y2) = place(r1, i1, x), place(r2, i2, x)
                stays = (r1, i1, r2, i2) in kept
                if x == 20:
                    d.line(x1, y1, x2, y2, width=1, opacity=0.35)
                elif stays:
                    d.line(x1, y1, x2, y2, width=3, colour=KNOWN)
        for r, i in ends:
            px, py = place(r, i, x)
            on = x == 20 or (r, i) in used
            d.dot(px, py, KNOWN if on else LOST, 10, fill_opacity=1 if on else 0.3,
                  stroke="currentColor", stroke_width=1)  # fmt: skip
        d.text(x + 130, 234, "prompt", size=12)
        d.text(x + 148, 42, "answer", size=12, anchor="start")
    d.line(300, 50, 300, 190, width=2, arrow=True)
    for i, line in enumerate(
        ["from the answer back:", "cut an edge;", "keep the cut if the"]
    ):
        d.text(318, 84 + 20 * i, line, size=12, anchor="start")
    d.text(318, 144, "answer stays the same", size=12, anchor="start")
    d.save()


def neuron_explanation() -> None:
    """Explain, simulate, score."""
    d = Drawing("neuron_explanation", 230)
    for x, title in ((20, "1 explain"), (260, "2 simulate"), (500, "3 score")):
        d.text(x, 24, title, anchor="start", weight="600")
    seen = [("a", 0.05), ("red", 0.9), ("car", 0.1), ("blue", 0.7), ("sky", 0.2)]
    new = [("the", 0.0), ("green", 0.8), ("door", 0.3), ("of", 0.0), ("gold", 0.6)]

    def text(x, y, words, colour):
        for i, (word, strength) in enumerate(words):
            d.box(x + 40 * i, y, 38, 24, colour, opacity=strength, line="none")
            d.text(x + 40 * i + 19, y + 17, word, size=13)

    text(16, 48, seen, KNOWN)
    d.text(116, 92, "where the neuron is active", size=12)
    d.line(116, 104, 116, 134, arrow=True)
    d.box(30, 142, 172, 32)
    d.text(116, 163, "“words for colours”", size=13)
    d.text(116, 196, "a sentence, from these texts", size=12)
    d.line(206, 158, 262, 84, bend=-8, arrow=True)
    text(256, 48, new, NEW)
    d.text(356, 92, "where the sentence says", size=12)
    d.text(356, 108, "it should be active", size=12)
    real = [("the", 0.0), ("green", 0.9), ("door", 0.1), ("of", 0.0), ("gold", 0.85)]
    text(256, 142, real, KNOWN)
    d.text(356, 186, "where it is, in new texts", size=12)
    d.line(464, 62, 500, 98, arrow=True)
    d.line(464, 154, 500, 122, arrow=True)
    points = [(0.0, 0.02), (0.82, 0.9), (0.3, 0.12), (0.05, 0.0), (0.62, 0.85)]
    d.line(530, 180, 530, 46)
    d.line(530, 180, 690, 180)
    d.line(534, 172, 680, 60, opacity=0.4, stroke_dasharray="4 4")
    for sx, sy in points:
        d.dot(540 + 140 * sx, 170 - 115 * sy, GIVEN, 6)
    d.text(610, 200, "simulated", size=12)
    d.text(516, 116, "real", size=12, transform="rotate(-90 516 116)")
    d.text(610, 222, "score = correlation", size=13)
    d.save()


def patchscopes() -> None:
    """A state of one prompt takes the place of a token in another that asks for it."""
    d = Drawing("patchscopes", 236)
    sides = (
        (20, "source", ["last", "year", "we", "moved", "to", "Kyoto"], 5, 2),
        (380, "target", ["The", "country", "of", "x"], 3, 1),
    )
    for x, title, words, at, layer in sides:
        step = 264 / len(words)
        d.text(x + 132, 22, title, weight="600")
        for i, word in enumerate(words):
            cx = x + step * (i + 0.5)
            d.text(cx, 226, word, size=13, weight="600" if i == at else "normal")
            for row in range(4):
                mine = i == at and (row == layer if at == 5 else row >= layer)
                d.dot(cx, 196 - 42 * row, KNOWN if mine else LOST, 9,
                      fill_opacity=0.9 if mine else 0.3)  # fmt: skip
                if row:
                    d.line(cx, 185 - 42 * (row - 1), cx, 166 - 42 * (row - 1),
                           opacity=0.4)  # fmt: skip
    x1, y1 = 20 + 44 * 5.5, 196 - 42 * 2
    x2, y2 = 380 + 66 * 3.5, 196 - 42
    for x, y in ((x1, y1), (x2, y2)):
        d.dot(x, y, KNOWN, 9, stroke="currentColor", stroke_width=2)
    d.line(x1 + 12, y1 - 6, x2 - 10, y2 - 8, colour=NEW, width=3, bend=64, arrow=True)
    d.text(330, 80, "its state", size=13)
    d.text(x2, 48, "Japan", size=14, weight="600")
    d.save()


def lenses() -> None:
    """States leave the stream at three heights, and are read like the last one."""
    d = Drawing("lenses", 262)
    heights = (206, 134, 62)
    names = ("block 8", "block 23", "block 29")
    ways = (
        ("affine, tuned", "a map, fitted"),
        ("identity prompt", "the model itself"),
        ("logit lens", "as it is"),
    )
    words = (("“the”", 0.25), ("“Tokyo”", 0.6), ("“Tokyo”", 0.95))
    d.text(96, 258, "Japan is", size=13)
    for y, name, way, (word, sure) in zip(heights, names, ways, words, strict=True):
        d.box(56, y - 16, 80, 32, LOST, opacity=0.18)
        d.text(96, y + 5, name, size=13)
        d.line(96, y + 34, 96, y + 16, width=2, opacity=0.5)
        d.line(96, y - 16, 96, y - 38, width=2, opacity=0.5)
        d.dot(96, y - 30, KNOWN, 8, stroke="currentColor", stroke_width=1.5)
        d.line(108, y - 30, 236, y - 30, width=2, arrow=True)
        d.box(242, y - 50, 136, 40, NEW, opacity=0.25)
        d.text(310, y - 33, way[0], size=13, weight="600")
        d.text(310, y - 17, way[1], size=12)
        d.line(380, y - 30, 426, y - 30, width=2, arrow=True)
        d.line(548, y - 30, 592, y - 30, width=2, arrow=True)
        d.dot(606, y - 30, GIVEN, 7, fill_opacity=sure)
        d.text(620, y - 25, word, size=14, anchor="start", weight="600")
    d.box(432, 6, 114, 192, KNOWN, opacity=0.18)
    d.text(489, 94, "final norm", size=13)
    d.text(489, 112, "unembedding", size=13)
    d.text(489, 220, "the model's own", size=12)
    d.save()


def steering() -> None:
    """The difference of two sentences' states is added to the states of a third."""
    d = Drawing("steering", 250)
    rows = (
        (60, "The film was wonderful.", GIVEN),
        (130, "The film was terrible.", LOST),
    )
    for y, words, colour in rows:
        d.text(20, y + 5, words, size=14, anchor="start")
        d.line(196, y, 226, y, width=2, arrow=True)
        d.dot(240, y, colour, 11)
    d.line(240, 116, 240, 74, colour=NEW, width=3, arrow=True)
    d.text(258, 100, "the steering vector", size=14, anchor="start", weight="600")
    d.text(20, 215, "The hotel was", size=14, anchor="start")
    for i in range(3):
        x = 186 + 86 * i
        d.line(x - 52 if i else x - 66, 210, x - 12, 210, width=2, arrow=True)
        d.dot(x, 210, LOST if i < 2 else KNOWN, 11)
    d.line(300, 112, 352, 194, colour=NEW, width=3, bend=-10, arrow=True)
    d.text(344, 150, "times c, added", size=14, anchor="start")
    d.text(272, 242, "block by block", size=12)
    for y, words, c, colour in (
        (180, "a dream come true", "c = 1", GIVEN),
        (240, "a nightmare", "c = −1", LOST),
    ):
        d.line(372, 210, 448, y, width=2, bend=0, arrow=True)
        d.dot(462, y, colour, 8)
        d.text(480, y + 5, words, size=14, anchor="start", weight="600")
        d.text(640, y + 5, c, size=13, anchor="start")
    d.save()


def modular_addition() -> None:
    """Two numbers as angles; turned one after the other they end at their sum."""
    d = Drawing("modular_addition", 236)
    p, a, b, radius = 7, 5, 4, 58

    def spot(x, number, r=radius):
        angle = 2 * math.pi * number / p
        return round(x + r * math.sin(angle), 1), round(122 - r * math.cos(angle), 1)

    for x, number, colour, title in (
        (92, a, KNOWN, f"a = {a}"),
        (266, b, GIVEN, f"b = {b}"),
        (440, a + b, NEW, f"a + b = {a + b}, and {(a + b) % p} mod {p}"),
    ):
        d.text(x, 22, title, weight="600")
        d.dot(x, 122, "none", radius, stroke="currentColor", stroke_opacity=0.4)
        for n in range(p):
            d.dot(*spot(x, n), colour if n == number % p else LOST, 6)
            tx, ty = spot(x, n, radius + 16)
            d.text(tx, round(ty + 4.5, 1), str(n), size=13)
        if number == a + b:  # the turns one after the other
            d.line(x, 122, *spot(x, a, radius - 9), colour=KNOWN, width=2)
            d.line(*spot(x, a, 26), *spot(x, a + b, 26), colour=GIVEN, bend=26)
        d.line(x, 122, *spot(x, number, radius - 9), colour=colour, width=3)
        d.text(x, 226, ("angle w·a", "angle w·b", "angle w·(a + b)")[(x - 92) // 174],
               size=13)  # fmt: skip
    d.text(179, 128, "+", size=20)
    d.text(353, 128, "=", size=20)
    d.text(628, 22, "logit of c", weight="600")
    for c in range(p):
        height = round(46 * math.cos(2 * math.pi * (a + b - c) / p), 1)
        top, right = 122 - max(height, 0), c == (a + b) % p
        d.box(562 + 19 * c, top, 15, abs(height), NEW if right else LOST, r=1,
              line="none", opacity=1.0 if right else 0.6)  # fmt: skip
        d.text(
            569.5 + 19 * c, 196, str(c), size=13, weight="600" if right else "normal"
        )
    d.line(556, 122, 700, 122, width=1, opacity=0.5)
    d.text(628, 226, "cos w(a + b − c)", size=13)
    d.save()


ALL = (
    activation_patching,
    causal_tracing,
    rome,
    function_vectors,
    acdc,
    neuron_explanation,
    patchscopes,
    lenses,
    steering,
    modular_addition,
)

if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for draw in ALL:
        draw()
