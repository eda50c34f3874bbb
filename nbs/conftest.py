"""Settings for `pytest --nbval nbs`: compare every cell's output strictly, and skip
what is marked for the hub.
"""

import os

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # the saved outputs were computed with one thread
os.environ.setdefault(
    "TQDM_DISABLE", "1"
)  # and without progress bars, which show times
os.environ.setdefault(
    "PYTHONWARNINGS", "ignore:IProgress not found"
)  # tqdm's, where ipywidgets is not installed
if os.environ.get("MECHTUT_ONLINE") != "1":
    os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """nbdev_clean removes execution counts, and nbval compares only the cells that have
    one: give each its own.
    """
    for number, item in enumerate(items, 1):
        cell = getattr(item, "cell", None)
        if cell is not None:
            cell.execution_count = number
            if "#| eval: false" in cell.source:
                item.options["skip"] = True
