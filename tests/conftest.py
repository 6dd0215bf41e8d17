"""Shared fixtures. JAX runs on the CPU with eight simulated devices, so that sharding is tested everywhere."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT scans: `$CTSSL_TEST_DATA`, or `../shared/data` beside the checkout; skips where absent."""
    named = os.environ.get("CTSSL_TEST_DATA")
    folder = Path(named) if named else PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real CT scans: set CTSSL_TEST_DATA to a folder that holds them")
    return folder
