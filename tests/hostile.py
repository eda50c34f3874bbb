"""Texts that mean something to HTML, DOT, LaTeX or Matplotlib, and a reader of pages
that tells whether they got out of their place.
"""

from html.parser import HTMLParser

TEXTS = [
    "$",
    "$$",
    "$x",
    "$x$",
    r"$\frac{$",
    r"\frac{",
    r"\input{/etc/passwd}",
    "^_{}%#&~",
    "<b>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "--><svg onload=alert(1)>",
    '"',
    "'",
    '" onmouseover="alert(1)',
    "' onmouseover='alert(1)",
    "&lt;b&gt; &#60;",
    "{{7*7}}",
    "a\\",
    'a\\"',
    "\x00",
    "\x1b[31m",
    "\r",
    "\u2028",
    "\u202e",
    "\ufeff",
    "\ud800",
    "日本",
    "_x",
]


class Page(HTMLParser):
    """The tags and attributes of a page, in order, what its scripts and styles are, and
    its text.
    """

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.code: list[str] = []
        self.texts: list[str] = []
        self.values: list[str] = []
        self.inside: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, *(name for name, _ in attrs)))
        self.values += [value or "" for _, value in attrs]
        self.inside.append(tag)

    def handle_endtag(self, tag):
        self.tags.append(("/" + tag,))

    def handle_comment(self, data):
        self.tags.append(("comment",))

    def handle_data(self, data):
        if self.inside and self.inside[-1] in ("script", "style"):
            self.code.append(data)
            self.inside.append("")
        else:
            self.texts.append(data)


def same_page(hostile: str, harmless: str) -> None:
    """The same tags, attributes and number of scripts, whatever the texts are."""
    a, b = Page(hostile), Page(harmless)
    assert a.tags == b.tags
    assert len(a.code) == len(b.code)
    assert not [name for tag in a.tags for name in tag if name.startswith("on")]
