"""The step compiled for TPUs that are not there: what is counted in its text, and the refusals.

Where libtpu is missing, as in the test environment, nothing is compiled; `.ci/run` has it.
"""

import importlib.util
import re
import types
from pathlib import Path

import numpy as np
import pytest

from ctssl_jax.training import topology
from ctssl_jax.training.compiled_text import count_work
from ctssl_jax.training.topology import estimate_topology, topology_devices
from data_prep.system.errors import InputError
from tests.helpers.training_runs import tiny_config, tiny_recipe

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)

# As XLA writes programs for TPUs: a loop of 18 turns over stacked kernels, of which each turn takes
# one; S(1) is memory on the chip's core. A map of four images, taken apart into eight of half the
# width. The rare branch of a condition moves more.
TEXT = (Path(__file__).parent / "tpu_program.txt").read_text()


def test_loops_are_counted_as_often_as_they_run():
    work = count_work(TEXT)
    assert work.collectives == {"all-reduce": 18}
    assert work.collective_bytes == {"all-reduce": 18 * 2 * 512}  # eight numbers fill a tile of 128
    assert work.cycles == 18 * 100
    # A turn reads its number, reads and writes one kernel of 4 KiB and sums it twice; the rest lies
    # on the core.
    assert work.traffic == 18 * (4 + 4 * 4096)
    assert work.operations == 2 * 16 * 8 * 8 * 4 * 3 * 3 * 4
    assert work.largest_map == 8
    assert topology.rewritten(work, 4) and not topology.rewritten(work, 8)


def test_turns_that_only_the_condition_tells():
    """As XLA leaves loops whose counter it has changed."""
    told = TEXT.replace(', backend_config={"known_trip_count":{"n":"18"}}', "")
    condition = """\
  %limit = s32[]{:T(128)} constant(18)
  %turn.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%turn.2, %limit), direction=LT"""
    told = told.replace("  ROOT %less = pred[]{:T(512)} constant(true)", condition)
    assert "known_trip_count" not in told and "direction=LT" in told
    assert count_work(told) == count_work(TEXT)
    for old, new in (("direction=LT", "direction=NE"), ("constant(18)", "parameter(0)")):
        once = count_work(told.replace(old, new))
        assert (once.cycles, once.untold_loops) == (100, 1)
    assert count_work(told).untold_loops == 0


def test_views_of_one_size_are_one_pass():
    config = tiny_recipe("", "lejepa", **{"views.num_global": 2, "views.num_local": 8})
    work = count_work(TEXT)  # maps of eight images
    assert topology.rewritten(work, topology.images_of_a_pass(tiny_config(""), 4))
    assert not topology.rewritten(work, topology.images_of_a_pass(config, 4))


@pytest.mark.parametrize(
    "name",
    [
        *("v5e", "v5e:4", "4x4", "v5litepod-16", "v5e:4x4:0", "H100:8x2", "v9:2x2", "v5e:0x2"),
        *("v5e:2x2x2", "v5p:4x4", "v6e:16x32"),  # other sides; more chips than a pod has
    ],
)
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(InputError, match=rf"--topology={name}: must be KIND:SHAPE .*v5e:4x4"):
        topology_devices(name)


def test_without_libtpu_the_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs libtpu, but no TPU: pip install 'jax"):
        topology_devices("v5e:2x2")


@pytest.mark.parametrize(
    ("kind", "settings", "better"),
    [
        ("TPU v5 lite", {}, "--config.dtype=bfloat16 --config.batch_size=128"),
        ("TPU v6 lite", {"dtype": "bfloat16"}, "--config.batch_size=128"),
        ("TPU v4", {"dtype": "bfloat16", "microbatches": 2}, "--config.batch_size=256"),
        ("TPU v4", {"batch_size": 128}, "--config.dtype=bfloat16"),
        ("TPU v5", {"dtype": "bfloat16", "batch_size": 128}, ""),
        ("cpu", {}, ""),
    ],
)
def test_a_run_on_tpus_is_told_of_better_settings(kind, settings, better):
    config = tiny_config("", **{"batch_size": 16, **settings})
    devices = np.full((16, 1), types.SimpleNamespace(device_kind=kind))
    lines = topology.advice(config, types.SimpleNamespace(size=16, devices=devices))
    assert [line.split(f"{kind}: ")[1].split(" takes")[0] for line in lines] == [better][
        : len(better)
    ]


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:5x3", "v5p:3x3x3"])
def test_a_shape_that_no_host_has_is_refused(name):
    with pytest.raises(InputError, match=f"^--topology={name}: libtpu knows no such") as refusal:
        topology_devices(name)
    assert "\n" not in str(refusal.value)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "number", "slices"),
    [("v4:2x2x2", 8, 1), ("v5p:2x2x1", 4, 1), ("v5e:1x1", 1, 1), ("v6e:4x4:2", 32, 2)],
)
def test_every_kind_has_known_figures(name, number, slices):
    devices = topology_devices(name)
    assert len(devices) == number and devices[0].device_kind in topology.CHIPS
    assert len({getattr(device, "slice_index", 0) or 0 for device in devices}) == slices


@needs_libtpu
def test_a_small_step_is_compiled_for_two_slices(capsys):
    config = tiny_config("", batch_size=32, dtype="bfloat16", scan=True, remat=True)
    config.model.depth = 2
    estimate_topology(config, "v5e:2x2:2")
    printed = capsys.readouterr().out
    assert "v5e:2x2:2: 8 x TPU v5 lite on 2 host(s), mesh of 8 (data) x 1 (fsdp)" in printed
    for line in ("memory", "arithmetic", "traffic", "collectives", "bound", "compiler", "WARNING"):
        assert re.search(f"^{line} ", printed, re.M), line
    assert "4 slices a chip are few" in printed and "--config.batch_size=64" in printed
    number = int(re.search(r"(\d+) all-reduce", printed)[1])
    config.batch_norm_group = 1
    estimate_topology(config, "v5e:2x2:2")
    fewer = int(re.search(r"(\d+) all-reduce", capsys.readouterr().out)[1])
    # Once forwards and once backwards a layer, of which XLA merges some; then the gradients alone.
    assert number > 15 and fewer < 6


@needs_libtpu
def test_a_step_that_does_not_fit_is_one_line_with_a_setting_that_needs_less():
    config = tiny_config("", batch_size=2**22, dtype="bfloat16", remat=True)
    with pytest.raises(
        InputError, match=r"^the step needs [\d.]+GiB of the 15.75GiB .*2097152,"
    ) as no:
        estimate_topology(config, "v5e:2x2")
    assert "\n" not in str(no.value)


@needs_libtpu
def test_kernels_are_gathered_in_bfloat16():
    config = tiny_config("", batch_size=64, dtype="bfloat16", fsdp_devices=2)
    config.model.hidden = (16, 32)
    program = topology.program_for(config, "v5e:2x2")
    text = topology.compile_ahead(program).as_text()
    gathered = set(re.findall(r"= \(?(\w+)\[[\d,]*\][^=]* all-gather(?:-start)?\(", text))
    assert "bf16" in gathered
