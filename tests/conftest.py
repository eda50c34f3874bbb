"""Settings of the test suite: one thread, no network unless asked for, the same
hypothesis examples and the same random numbers in every CI run.
"""

import os
import random
import signal

import numpy as np
import pytest

pytest_plugins = ["browser"]  # the fixtures for tests in a browser
ONLINE = os.environ.get("MECHTUT_ONLINE") == "1"
# a shell may have switched Ctrl-C off for what it runs in the background
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
if not ONLINE:
    os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis  # noqa: E402
import torch  # noqa: E402  (reads OMP_NUM_THREADS when it is imported)

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
hypothesis.settings.register_profile(
    "ci", deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


# the longest files: they begin first, so that the workers finish together; the pages to
# explore somewhat later, when the worker of test_site.py has built the site
LONG = (
    "test_site.py",
    "experiments/",
    "test_explore.py",
    "test_reading.py",
    "test_nothing_lost.py",
    "mini/test_training.py",
    "papers/",
    "circuits/",
    "neurons/",
)


@pytest.fixture(autouse=True)
def same_draws():
    """Each test draws what it would draw alone, whichever ran before on its worker."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def pytest_collection_modifyitems(items):
    """Long files first. Tests marked `hub` download a model; they run with
    MECHTUT_ONLINE=1 only.
    """
    ranks = {part: i for i, part in enumerate(LONG)}
    items.sort(key=lambda x: min([ranks[p] for p in LONG if p in x.nodeid] or [9]))
    if not ONLINE:
        reason = "needs the Hugging Face hub; set MECHTUT_ONLINE=1"
        for item in items:
            if item.get_closest_marker("hub"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter):
    """Say how many hostile inputs were thrown, and that all were right or refused."""
    kept = dict[str, int]()
    for report in terminalreporter.stats.get("passed", []):
        for name, count in report.user_properties:
            kept[name] = kept.get(name, 0) + count * (report.when == "call")
    for name, count in kept.items():
        terminalreporter.write_line(f"{name}: {count}")
