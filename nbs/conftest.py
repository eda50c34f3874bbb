"""Settings for `pytest --nbval nbs`: outputs are compared strictly, cells for the hub
are skipped, and the notebooks of one worker share a kernel, cleared between them.
"""

import os
from collections import Counter
from queue import Empty
from typing import ClassVar

import nbval.plugin
import pytest
from nbval.kernel import RunningKernel

# the saved outputs were computed with one thread and without progress bars, which show
# times; the warning is tqdm's, where ipywidgets is not installed
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
if os.environ.get("MECHTUT_ONLINE") != "1":
    os.environ["HF_HUB_OFFLINE"] = "1"

# What a new notebook finds in a kernel that ran another one: no names, no figures, its
# own folder, and a mechtut that nobody has changed. Torch and transformers stay
# imported, which saves some five seconds a notebook.
CLEAR = """
get_ipython().reset(new_session=False)
import gc, os, sys
os.chdir({folder!r})
os.environ.clear()
os.environ.update({environment!r})
for name in [m for m in sys.modules if m.split(".")[0] == "mechtut"]:
    del sys.modules[name]
if "torch" in sys.modules:
    sys.modules["torch"].set_grad_enabled(True)
    sys.modules["torch"].set_default_dtype(sys.modules["torch"].float32)
if "matplotlib.pyplot" in sys.modules:
    sys.modules["matplotlib.pyplot"].close("all")
get_ipython().reset(new_session=False)
__import__("gc").collect()
"""


class SharedKernel(RunningKernel):
    """A kernel that outlives its notebook and is cleared for the next one."""

    running: ClassVar[dict[str, "SharedKernel"]] = {}

    def __new__(cls, kernel_name, cwd=None, startup_timeout=60):
        kernel = cls.running.get(kernel_name)
        if kernel is not None and kernel.is_alive() and kernel.clear(cwd):
            return kernel
        return super().__new__(cls)

    def __init__(self, kernel_name, cwd=None, startup_timeout=60):
        if self.running.get(kernel_name) is not self:
            super().__init__(kernel_name, cwd, startup_timeout)
            self.running[kernel_name] = self

    def clear(self, folder):
        """Forget the last notebook; false if the kernel cannot."""
        # what a kernel sets when it starts: without it a first import of pyplot, later
        # than the first notebook, would show no figures
        inline = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        code = CLEAR.format(folder=str(folder), environment=inline | dict(os.environ))
        message = self.kc.execute(code, silent=True, store_history=False)
        try:
            reply = self.kc.get_shell_msg(timeout=60)
            while reply["parent_header"].get("msg_id") != message:
                reply = self.kc.get_shell_msg(timeout=60)
            self.await_idle(message, 60)
        except Empty:
            return False
        return reply["content"]["status"] == "ok"

    def stop(self):
        """nbval's end of a notebook: stay, unless something is wrong."""

    def end(self):
        """The end of the worker."""
        super().stop()


nbval.plugin.RunningKernel = SharedKernel


def pytest_sessionfinish():
    for kernel in SharedKernel.running.values():
        kernel.end()


def weight(item):
    """Long notebooks first, so that the workers finish together."""
    path = item.nodeid.split("::")[0]
    first = ("papers/", "mini/training", "guides/", "circuits/", "neurons/")
    return next((i for i, part in enumerate(first) if part in path), len(first)), path


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """nbdev_clean removes execution counts, and nbval compares only the cells that have
    one: give each its own.
    """
    items.sort(key=weight)  # stable: the cells of a notebook stay in order
    for number, item in enumerate(items, 1):
        cell = getattr(item, "cell", None)
        if cell is not None:
            cell.execution_count = number
            if "#| eval: false" in cell.source:
                item.options["skip"] = True


def pytest_terminal_summary(terminalreporter):
    """The ten slowest notebooks."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                seconds[report.nodeid.split("::")[0]] += report.duration
    terminalreporter.section("slowest notebooks")
    for path, duration in seconds.most_common(10):
        terminalreporter.write_line(f"{duration:7.1f} s  {path}")
