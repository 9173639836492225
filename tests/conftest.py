"""Shared by all tests: no network, and the fixtures of `helpers/shared_fixtures.py`.

Nothing else is imported here: the process that only hands the tests out to others would import it first, for seconds
in which these have not been started.
"""

import gc
import os
import tempfile

import pytest

# Set before any library reads them: otherwise a missing file is looked for on the network for minutes.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="medct-tests-")
if not os.path.exists("/dev/nvidiactl"):  # noqa: PTH110
    os.environ["TRITON_INTERPRET"] = "1"  # without a card kernels can only be interpreted


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "no":  # this process runs tests
        gc.disable()
        config.pluginmanager.import_plugin("shared_fixtures")
        # Most scans that tests make are odd in some way; those about notes ask for them.
        config.addinivalue_line("filterwarnings", "ignore::medct.VolumeWarning")


def pytest_collection_finish() -> None:
    """What was imported and collected stays: looking through it for garbage takes a twentieth of the suite's time."""
    gc.freeze()
    gc.enable()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Archives hold the time when they were made: as names, pytest's processes would not agree on them."""
    return f"{len(val)} bytes" if isinstance(val, bytes) and len(val) > 40 else None
