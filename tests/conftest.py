"""Settings of the test suite: one thread, no network unless asked for, the same
hypothesis examples in every CI run.
"""

import os

import pytest

ONLINE = os.environ.get("MECHTUT_ONLINE") == "1"
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


def pytest_collection_modifyitems(items):
    """Tests marked `hub` download a model; they run with MECHTUT_ONLINE=1 only."""
    if not ONLINE:
        for item in items:
            if item.get_closest_marker("hub"):
                item.add_marker(
                    pytest.mark.skip(
                        reason="needs the Hugging Face hub; set MECHTUT_ONLINE=1"
                    )
                )
