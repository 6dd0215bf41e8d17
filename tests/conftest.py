"""Shared fixtures. JAX runs on the CPU with eight simulated devices, so that sharding is tested
everywhere."""

import concurrent.futures
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = " ".join(
        [
            os.environ.get("XLA_FLAGS", ""),
            "--xla_force_host_platform_device_count=8",
            "--xla_backend_optimization_level=0",  # tiny models compile longer than they run
            "--xla_llvm_disable_expensive_passes=true",
            "--xla_cpu_use_fusion_emitters=false",  # less than half the time to compile
        ]
    )
os.environ.setdefault("MPLBACKEND", "Agg")
# On a busy machine every command would name its long silences on stderr, which tests compare.
os.environ.setdefault("CTSSL_QUIET", "1")
# Compiled programs are shared by all tests, the workers of pytest-xdist, and the processes that
# tests start: all inherit this environment. The folder outlives the session, so that a test is fast
# when it runs again.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "compiled"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest

from data_prep.system import workers

# processes that tests start and stop shall not inherit that of nohup
signal.signal(signal.SIGHUP, signal.SIG_DFL)
PROJECT = Path(__file__).resolve().parents[1]
SPAWNED_WORKERS = workers._new_executor
# These take longest. They come first, so that no worker has one of them left when the others are
# done.
LONGEST = (
    "test_multiple_processes",
    "test_quickstart",
    "test_joint_embedding",
    "test_train_command",
    "test_downstream",
    "test_embed",
    "test_predict",
    "test_tasks",
    "test_corrupted_outputs",
    "test_export",
    "test_privacy_campaign",
    "test_studies",
)


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist hands out files in the order of `pytest_collection_modifyitems`, not by their
    numbers of tests; and a worker that dies ends the session: its release 3.8 waits for ever for
    the one that takes its place."""
    config.option.loadscopereorder = False
    config.option.maxworkerrestart = "0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first."""
    order = {name: position for position, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def quick_workers() -> Iterator[None]:
    """Worker processes are forked from a process that has imported what they need, instead of being
    spawned.

    They share as little with the tests as spawned ones do, and start in a tenth of the time.
    Commands that tests start spawn theirs; a module that tests the spawning replaces this fixture
    by an empty one.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["data_prep.pipeline.prepare", "data_prep.dataset.verify"])

    def new_executor(num_workers: int) -> concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(
            num_workers, mp_context=context, initializer=workers._start_worker
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_new_executor", new_executor)
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real CT scans: `$CTSSL_TEST_DATA`, or `../shared/data` beside the checkout; skips
    where absent."""
    named = os.environ.get("CTSSL_TEST_DATA")
    folder = Path(named) if named else PROJECT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real CT scans: set CTSSL_TEST_DATA to a folder that holds them")
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset directory of 16 x 16 slices: 60 for training, 24 for validation, 24 for test. Not
    to be changed."""
    from tests.helpers.example_dataset import write_example_dataset

    return write_example_dataset(tmp_path_factory.mktemp("data") / "tiny", image_size=16)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, but not written, which takes seconds each: for tests of the numbers beside
    them."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda *arguments, **options: None)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty object store, `example://`, as `example_store.install` makes it: in the environment
    of new processes."""
    monkeypatch.setattr(workers, "_new_executor", SPAWNED_WORKERS)
    from tests.helpers.example_store import install

    return install(tmp_path / "store", monkeypatch)


@pytest.fixture(scope="session")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pseudonym key that is the same for all datasets of the tests."""
    path = tmp_path_factory.mktemp("key") / "key"
    path.write_text("0123456789abcdef0123456789abcdef")
    return path


@pytest.fixture(scope="module")
def bucket_variables():
    """Variables that lead to an emulated bucket of Google's store, with preconditions."""
    pytest.importorskip("gcp_storage_emulator")
    from tests.helpers import bucket

    with bucket.serving() as port:
        yield bucket.environment(port)


@pytest.fixture
def emulated_bucket(bucket_variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of that bucket, in the environment of the test."""
    from tests.helpers import bucket

    for name, value in bucket_variables.items():
        monkeypatch.setenv(name, value)
    return bucket.BUCKET
