"""Nothing is lost and nothing is done twice: kills at every file operation in turn and
at random moments, full disks, folders that cannot be written, two at once; whatever
happens, the same call again ends with the same bits as if nothing had.
"""

import errno
import gc
import multiprocessing
import os
import random
import resource
import shutil
import signal
import threading
import time
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from families import tiny
from torch import Tensor
from tqdm import tqdm

from mechtut.editing.covariance import key_covariance
from mechtut.mini.training import Recipe, Trainer, train
from mechtut.models import files
from mechtut.models.files import alone_in, check_folder
from mechtut.models.hooks import Edit, intervene
from mechtut.models.loading import load_model
from mechtut.neurons.client import Request, Server
from mechtut.neurons.collect import collect
from mechtut.neurons.records import NeuronRecords
from mechtut.papers.acdc import acdc, sweep
from mechtut.papers.causal_tracing import trace_facts
from mechtut.papers.function_vectors import indirect_effect
from mechtut.patching.replay import Replay
from mechtut.prompts.subject_noise import Noise

QUIET = {"progress": False}
TINY = Recipe(
    tokens=6 * 2 * 64,
    n_layer=2,
    d_model=32,
    n_head=2,
    n_ctx=64,
    batch=2,
    warmup=2,
    handoff=1,
    per_kind=1,
)


class Killed(BaseException):
    """A kill: nothing of ours runs after it, so it is no `Exception`."""


@cache
def model_of(n_layer=3):
    return load_model(tiny("gpt2", n_layer=n_layer))


@cache
def mini():
    return load_model("mini", device="cpu")


@cache
def reader():
    """A tiny model that reads the embedded model's tokens."""
    return load_model(tiny("gpt2", vocab_size=mini().d_vocab), mini().tokenizer)


def ids(rows, length, seed=0):
    return torch.randint(
        1, 97, (rows, length), generator=torch.Generator().manual_seed(seed)
    )


def last_logit(logits):
    return logits[..., 0, 7]


def run_replay(folder):
    grid = [[Edit("resid_post", n, 0.0, pos=p)] for n in range(3) for p in range(3)]
    replay = Replay(model_of(), ids(2, 5))
    return replay.run(grid, last_logit, folder=folder, **QUIET)


def run_facts(folder):
    facts = [
        {"prompt": "Riley Martin works as a", "subject": "Riley Martin"},
        {"prompt": "Casey Martin works as a", "subject": "Casey Martin"},
    ]
    for fact in facts:
        best = int(mini().logits(fact["prompt"])[0, -1].argmax())
        fact["attribute"] = mini().decode([best]).strip()
    noise, tokens = Noise(3.0, std=0.1), "subject_last"
    options = {"noise": noise, "tokens": tokens, "n_samples": 1, **QUIET}
    return trace_facts(mini(), facts, folder=folder, **options)


def run_effects(folder):
    prompts = [(row.tolist(), 5) for row in ids(3, 5)]
    means = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    return indirect_effect(
        model_of(), prompts, means, batch_size=1, folder=folder, **QUIET
    )


def run_covariance(folder):
    texts = ["Riley Martin works as a", "Casey", "A singer is here."]
    return key_covariance(reader(), texts, 2, chunk=1, folder=folder, **QUIET)


def run_acdc(folder):
    pair = ids(3, 7), ids(3, 7, seed=1)
    return acdc(model_of(6), *pair, threshold=0.02, folder=folder, **QUIET)


def run_collect(folder):
    options = {"n_tokens": 8, "n_top": 3, "n_random": 4, "batch_size": 4, **QUIET}
    options["layers"], corpus, small = [1], ids(16, 8).split(4), model_of()
    collect(small, corpus, folder=folder, save_every=8, **options)
    return NeuronRecords.load(folder) if folder else collect(small, corpus, **options)


class Answering(Server):
    """A server without a network that counts what it is asked."""

    asked = 0

    def ask(self, request):
        type(self).asked += 1
        text = request.body["prompt"][::-1]
        return {"choices": [{"text": text, "logprob": float("-inf")}]}


def run_cache(folder):
    server = Answering("some-model", "http://127.0.0.1:1/v1", cache=folder)
    requests = [Request("completions", {"prompt": f"number {i}"}) for i in range(4)]
    return [server._remembered(r) for r in requests]


def run_training(folder):
    if folder is None:
        return None
    run = train(folder, TINY, save_every=2, **QUIET)
    return {k: v.clone() for k, v in run.model.state_dict().items()}


JOBS = {
    "replay": run_replay,
    "facts": run_facts,
    "effects": run_effects,
    "covariance": run_covariance,
    "acdc": run_acdc,
    "collect": run_collect,
    "cache": run_cache,
}
each_job = pytest.mark.parametrize("job", JOBS)


def same(a, b, where=""):
    """Equal to the last bit, all of it but the time and what was asked of whom."""
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()), where
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), where
    elif is_dataclass(a):
        for f in fields(a):
            if f.name != "provenance":
                same(getattr(a, f.name), getattr(b, f.name), f"{where}.{f.name}")
    elif isinstance(a, dict):
        assert sorted(a) == sorted(b), where
        for k in a:
            same(a[k], b[k], f"{where}[{k}]")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}[{i}]")
    else:
        assert repr(a) == repr(b), where


@cache
def expected(job):
    return JOBS[job](None) if job != "cache" else run_cache(None)


class Disk:
    """Counts file operations. After `limit` of them each fails with `error`; a write
    that fails has written its first half.
    """

    def __init__(self, monkeypatch):
        self.n, self.limit, self.error = 0, None, Killed
        for module, name in ((files, "os"), (files, "open")):
            real = os if name == "os" else open
            monkeypatch.setattr(module, name, _Watched(self, real), raising=False)
        from mechtut.neurons import records

        monkeypatch.setattr(records, "shutil", _Watched(self, shutil))

    def step(self):
        self.n += 1
        if self.limit is not None and self.n > self.limit:
            raise self.error() if self.error is Killed else self.error


class _Watched:
    free = ("close", "getpid", "kill", "access", "path", "name", "read", "O_RDONLY")

    def __init__(self, disk, real):
        self._disk, self._real = disk, real

    def __call__(self, *args, **kwargs):  # open
        self._disk.step()
        return _File(self._disk, self._real(*args, **kwargs))

    def __getattr__(self, name):
        real = getattr(self._real, name)
        if name in self.free or not callable(real):
            return real
        if name == "unlink" and self._disk.error is not Killed:
            return real

        def watched(*args, **kwargs):
            self._disk.step()
            return real(*args, **kwargs)

        return watched


class _File:
    def __init__(self, disk, real):
        self.disk, self.real = disk, real

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.real.close()

    def write(self, data):
        try:
            self.disk.step()
        except BaseException:
            self.real.write(data[: len(data) // 2])
            raise
        self.real.write(data)

    def __getattr__(self, name):
        return getattr(self.real, name)


@each_job
def test_killed_at_every_file_operation(job, tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    same(expected(job), JOBS[job](tmp_path / "whole"), job)
    total, disk.n = disk.n, 0
    same(expected(job), JOBS[job](tmp_path / "whole"), job)
    assert total > 10 and disk.n < 6, "a finished folder is left as it is"
    # every second one of the three that take longest
    places = range(0, total, 2 if job in ("facts", "acdc", "collect") else 1)
    for limit in places:
        folder = tmp_path / str(limit)
        disk.n, disk.limit = 0, limit
        with pytest.raises(Killed):
            JOBS[job](folder)
        disk.limit = None
        if folder.exists():
            assert check_folder(folder).wrong == [], limit
        same(expected(job), JOBS[job](folder), f"{job} after {limit}")
        assert check_folder(folder).wrong == []
        shutil.rmtree(folder)


@each_job
def test_a_full_disk_loses_nothing(job, tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    JOBS[job](tmp_path / "whole")
    total = disk.n
    for limit in random.Random(0).sample(range(2, total), 4):
        folder = tmp_path / str(limit)
        disk.n, disk.limit = 0, limit
        disk.error = OSError(errno.ENOSPC, "No space left on device")
        with pytest.raises(OSError, match="No space left"):
            JOBS[job](folder)
        disk.limit = None
        assert not list(folder.rglob(".*.part")), "what is half done is removed"
        assert check_folder(folder).wrong == []
        same(expected(job), JOBS[job](folder), f"{job} after {limit}")


def run_in_child(job, folder):
    """Start a job in a forked process."""
    pid = os.fork()
    if pid == 0:
        try:
            tqdm.set_lock(threading.RLock())  # not the one that the parent waits for
            JOBS[job](folder)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return pid


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@each_job
def test_killed_at_random_moments(job, tmp_path):
    """SIGKILL to a child, five times for each kind of work."""
    start = time.perf_counter()
    JOBS[job](tmp_path / "first")
    took, draw, killed = time.perf_counter() - start, random.Random(job), 0
    same(expected(job), JOBS[job](tmp_path / "first"), job)
    for i in range(5):
        folder = tmp_path / str(i)
        pid = run_in_child(job, folder)
        time.sleep(draw.uniform(0.05, 0.9) * took)
        os.kill(pid, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        if folder.exists():
            assert check_folder(folder).wrong == []
        same(expected(job), JOBS[job](folder), f"{job} {i}")
        assert not list(folder.rglob(".*.part")) or job in ("cache", "facts")
    assert killed, "the children were too quick"


def test_training_killed_at_every_file_operation(tmp_path, monkeypatch):
    """A checkpoint is the old one or the new one, and so is the model."""
    run = Trainer(TINY)
    disk, file = Disk(monkeypatch), tmp_path / "checkpoint.safetensors"
    run.train_step()
    run.save(file)
    before, later = Trainer(TINY), Trainer(TINY)
    run.train_step()
    disk.n = 0
    run.save(tmp_path / "other.safetensors")
    for limit in range(disk.n):
        disk.n, disk.limit = 0, limit
        with pytest.raises(Killed):
            run.save(file)
        disk.limit = None
        later.restore(file)
        assert later.step == 1 or limit >= disk.n - 2
        before.restore(file)
        before.save(file)
    run.save(file)
    later.restore(file)
    same(run.model.state_dict(), later.model.state_dict())
    whole = file.read_bytes()
    for broken in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match=r"checkpoint\.safetensors.*delete it"):
            later.restore(file)


def test_training_killed_at_random_moments(tmp_path):
    start = time.perf_counter()
    whole = run_training(tmp_path / "whole")
    took, draw = time.perf_counter() - start, random.Random(0)
    model = (tmp_path / "whole" / "model" / "model.safetensors").read_bytes()
    JOBS["training"] = run_training
    try:
        for i in range(4):
            folder = tmp_path / str(i)
            pid = run_in_child("training", folder)
            time.sleep(draw.uniform(0.3, 0.95) * took)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            same(whole, run_training(folder), str(i))
            assert (folder / "model" / "model.safetensors").read_bytes() == model
            assert check_folder(folder).wrong == []
    finally:
        del JOBS["training"]


def test_a_second_process_is_refused(tmp_path):
    """And may work there once the first one is gone, however it went."""
    pid = os.fork()
    if pid == 0:
        with alone_in(tmp_path):
            (tmp_path / "ready").write_text("")
            time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        for job in JOBS:
            if job != "cache":  # answers are single files: any number may write them
                with pytest.raises(RuntimeError, match=rf"another process \({pid}\)"):
                    JOBS[job](tmp_path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    same(expected("replay"), run_replay(tmp_path))


def test_a_second_thread_is_refused_and_a_nested_block_is_not(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with alone_in(tmp_path), alone_in(tmp_path), ThreadPoolExecutor(1) as pool:
        refused = pool.submit(run_replay, tmp_path).exception()
    assert isinstance(refused, RuntimeError) and "another thread" in str(refused)
    assert not files._held


def _read_only(job, folder, answer):
    os.setuid(65534)  # nobody
    try:
        JOBS[job](folder)
        answer.put("done")
    except Exception as error:
        answer.put(f"{type(error).__name__}: {error}")


@pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="needs another user"
)
@pytest.mark.parametrize("job", ["replay", "effects", "acdc", "collect"])
def test_a_folder_that_cannot_be_written(job, tmp_path):
    """A finished one is read; for an unfinished one the error comes before the work."""
    os.chmod(tmp_path, 0o755)
    for parent in tmp_path.parents:
        if not os.stat(parent).st_mode & 0o001:
            os.chmod(parent, 0o755)
    JOBS[job](tmp_path / "whole")
    (tmp_path / "empty").mkdir()
    context, told = multiprocessing.get_context("fork"), []
    for name in ("whole", "empty"):
        answer = context.SimpleQueue()
        child = context.Process(target=_read_only, args=(job, tmp_path / name, answer))
        child.start()
        told.append(answer.get())
        child.join()
    assert told[0] == "done"
    assert told[1].startswith("PermissionError") and "empty" in told[1], told[1]


def test_a_resumed_sweep_of_searches_counts_its_work(tmp_path, monkeypatch):
    """Searches share metrics: a resumed one knows what the others had learned."""
    pair, thresholds = (ids(3, 7), ids(3, 7, seed=1)), [0.5, 0.05, 0.01]
    fresh = sweep(model_of(6), *pair, thresholds, **QUIET)
    disk = Disk(monkeypatch)
    sweep(model_of(6), *pair, thresholds, folder=tmp_path / "whole", **QUIET)
    total = disk.n
    for limit in (total // 4, total // 2, total - 3):
        disk.n, disk.limit, folder = 0, limit, tmp_path / str(limit)
        with pytest.raises(Killed):
            sweep(model_of(6), *pair, thresholds, folder=folder, **QUIET)
        disk.limit = None
        again = sweep(model_of(6), *pair, thresholds, folder=folder, **QUIET)
        same(fresh, again)


def _resident():
    """The most memory that this process ever had, in kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_three_hundred_traces_leave_no_handles_and_no_memory(tmp_path):
    """The same folder again and again, and a folder each."""
    replay = Replay(model_of(), ids(1, 4))
    cells = [[Edit("resid_post", 0, 0.0, pos=1)]]

    def work(n):
        for i in range(n):
            replay.run(cells, last_logit, folder=tmp_path / str(i % 30), **QUIET)

    work(30)  # the folders are made, and all that is made once
    count = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    first, before = len(gc.get_objects()), _resident()
    work(270)
    assert len(gc.get_objects()) - first < 500
    assert _resident() - before < 10_000  # kilobytes
    if count:
        assert len(os.listdir("/proc/self/fd")) <= count


def test_ten_thousand_interventions_in_bounded_memory():
    """A few kilobytes for each while they run, and all of it is given back."""
    replay = Replay(model_of(), ids(1, 6), batch_size=64)

    def edit(i, n):
        return Edit("resid_post", i % 3, i / n, pos=i % 6, mode="add")

    def work(n):
        return replay.run([[edit(i, n)] for i in range(n)], last_logit, **QUIET)

    work(1000)
    before = _resident()
    found = work(10_000)
    once = _resident()
    assert once - before < 100_000  # kilobytes
    assert torch.equal(work(10_000), found) and _resident() - once < 10_000
    for i in (0, 4321, 9999):
        with intervene(model_of(), [edit(i, 10_000)]):
            plain = model_of().logits(ids(1, 6))[0, -1, 7]
        assert torch.allclose(found[i, 0], plain, atol=1e-4)
