"""Memory of the host and of programs, and batch sizes by it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ctssl_jax.parallel import batch_sizes, memory
from ctssl_jax.parallel.memory import GIB, host_memory, is_out_of_memory, peak_bytes
from data_prep.system.errors import InputError

MEMINFO = "MemTotal: 99999999 kB\nMemAvailable: 20971520 kB\n"  # 20 GiB
STATISTICS = "anon 5\ninactive_file {0}\nactive_file {0}\ntotal_inactive_file {0}\n"
STATISTICS += "total_active_file {0}\n"


def host(root, files):
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder, limit, used, *, version, cached=0):
    names = {
        2: ("memory.max", "memory.current"),
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    }[version]
    values = [
        value if isinstance(value, str) else f"{int(value * GIB)}\n" for value in (limit, used)
    ]
    files = dict(zip(names, values, strict=True))
    files["memory.stat"] = STATISTICS.format(int(cached * GIB))
    return {f"sys/fs/cgroup/{folder}{name}": text for name, text in files.items()}


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 20),
        # version 2: Slurm limits the step, the task inside it is without a limit
        (
            {
                "proc/self/cgroup": "0::/job_7/step_0/task_0\n",
                **group("job_7/step_0/task_0/", "max\n", 3, version=2),
                **group("job_7/step_0/", 16, 6, version=2, cached=1),
                **group("job_7/", 64, 7, version=2),
            },
            12,
        ),
        ({"proc/self/cgroup": "0::/\n", **group("", 4, 1, version=2)}, 3),  # a container
        ({"proc/self/cgroup": "0::/a\n", **group("a/", 64, 1, version=2)}, 20),
        # version 1, and a container, which sees the path of the host
        (
            {
                "proc/self/cgroup": "5:cpu:/a\n4:memory:/a/b\n0::/\n",
                **group("memory/a/b/", 9, 2, version=1, cached=0.5),
                **group("memory/a/", 9223372036854771712 / GIB, 2, version=1),
            },
            8,
        ),
        ({"proc/self/cgroup": "4:memory:/docker/x\n", **group("memory/", 5, 1, version=1)}, 4),
        ({"proc/self/cgroup": "0::/\n", **group("", 4, 5, version=2)}, 0),
        ({"proc/self/cgroup": "0::/a\n", "proc/meminfo": "MemTotal: 5 kB\n"}, None),
    ],
)
def test_the_least_of_free_memory_and_of_all_groups(tmp_path, files, gib):
    found = host_memory(host(tmp_path, files))
    assert found == (None if gib is None else gib * GIB)


def test_devices_of_the_cpu_share_the_host(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 16 * GIB + GIB // 2)
    assert memory.device_memory(jax.devices()[:1]) == 16 * GIB
    assert memory.device_memory(jax.devices()[:8]) == 2 * GIB
    monkeypatch.setattr(memory, "host_memory", lambda: GIB)
    assert memory.device_memory(jax.devices()[:1]) == GIB * 3 // 4
    monkeypatch.setattr(memory, "host_memory", lambda: None)
    assert memory.device_memory(jax.devices()) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."), True),
        (jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: write: No space left on device"), False),
        (jax.errors.JaxRuntimeError("INTERNAL: Generated function failed"), False),
        (MemoryError("std::bad_alloc"), True),
        (np._core._exceptions._ArrayMemoryError((10**9,), np.dtype(float)), True),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_the_end_of_memory(error, expected):
    assert is_out_of_memory(error) is expected


def test_peak_by_hand():
    def function(x):  # x lives to the end, 4 kB each
        y = x + 1  # x, y
        z = jnp.sin(y)  # x, y, z; then y dies
        return jax.jit(lambda w: jnp.cos(w) * w)(z) + x[:1]  # x, z and two inside

    x = jax.ShapeDtypeStruct((1000,), np.float32)
    assert peak_bytes(jax.make_jaxpr(function)(x).jaxpr) == 4 * 4000


@pytest.mark.parametrize(("most", "num_devices"), [(16, 1), (5, 1), (16, 8), (24, 8), (8, 8)])
def test_sizes_hold_every_slice_once_are_few_and_pad_little(most, num_devices):
    sizes = {
        number: batch_sizes.in_few_sizes(number, most, num_devices) for number in range(1, 400)
    }
    for number, parts in sizes.items():
        assert sum(parts[:-1]) < number <= sum(parts)
        assert all(size % num_devices == 0 and size <= most for size in parts)
        assert sum(parts) - number < max(num_devices, number, number / 8 + 1)
    assert len({size for parts in sizes.values() for size in parts}) <= 5


def test_one_slice_costs_one_and_a_split_is_divided_evenly():
    assert batch_sizes.in_few_sizes(1, 2048, 1) == [1]
    assert [batch_sizes.evenly(number, 16, 1) for number in (1, 16, 17, 168)] == [1, 16, 9, 16]
    assert [batch_sizes.evenly(number, 16, 8) for number in (1, 17, 24)] == [8, 16, 16]


def choose(monkeypatch, asked, number, *, available, image_size=64, devices=1, a_slice=1000):
    monkeypatch.setattr(batch_sizes, "device_memory", lambda devices: available)
    state = jax.ShapeDtypeStruct((25,), np.float32)

    def trace(slices):
        images = jax.ShapeDtypeStruct((slices, a_slice // 8), np.float32)
        return jax.jit(lambda state, images: images + 1).trace(state, images)

    return batch_sizes.choose(asked, number, image_size, jax.devices()[:devices], trace, state)


def test_the_batch_goes_by_memory_and_by_the_work(monkeypatch):
    assert choose(monkeypatch, 0, 1000, available=None) == 16
    assert choose(monkeypatch, 0, 1000, available=10**6) == 16
    assert choose(monkeypatch, 0, 1000, available=5_000) == 4
    assert choose(monkeypatch, 0, 1000, available=1) == 1
    assert choose(monkeypatch, 0, 3, available=10**6) == 3
    assert choose(monkeypatch, 0, None, available=10**6, image_size=512) == 1
    assert choose(monkeypatch, 0, 1000, available=5_000, devices=8) == 32
    assert choose(monkeypatch, 7, 1000, available=10**6) == 7
    assert choose(monkeypatch, 100_000, 20, available=10**6) == 20  # there are no more
    with pytest.raises(InputError, match=r"^--batch_size=1000: 1,000 .*give --batch_size=63,"):
        choose(monkeypatch, 1000, 10**6, available=100_000)


def test_the_end_of_memory_is_one_line():
    with (
        pytest.raises(InputError, match=r"ran out with 16 slices at a time.*give --batch_size=8$"),
        batch_sizes.end_of_memory(16),
    ):
        raise MemoryError
    with pytest.raises(ValueError, match="another"), batch_sizes.end_of_memory(16):
        raise ValueError("another")
