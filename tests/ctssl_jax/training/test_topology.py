"""The step compiled for TPUs that are not there: what is counted in its text, and the refusals.

Where libtpu is missing, as in the test environment, nothing is compiled; `.ci/run` has it.
"""

import importlib.util
import re

import jax
import pytest

from ctssl_jax.training import topology
from ctssl_jax.training.compiled_text import count_work
from ctssl_jax.training.topology import estimate_topology, topology_devices
from data_prep.system.errors import InputError
from tests.helpers.training_runs import tiny_config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)

# As XLA writes programs for TPUs: a loop of 18 turns over stacked kernels, of which each turn takes
# one; S(1) is memory on the chip's core. A map of four images, taken apart into eight of half the
# width. The rare branch of a condition moves more.
TEXT = """\
HloModule jit_step, is_scheduled=true

%fused.1 (param_0.1: f32[18,8,128], param_1.1: s32[]) -> f32[8,128] {
  %param_0.1 = f32[18,8,128]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  ROOT %dynamic-slice.1 = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1.1, %zero.1, %zero.1), dynamic_slice_sizes={1,8,128}
}

%body (state.1: (s32[], f32[18,8,128])) -> (s32[], f32[18,8,128]) {
  %state.1 = (s32[]{:T(128)}, f32[18,8,128]{2,1,0:T(8,128)}) parameter(0)
  %turn = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %stacked = f32[18,8,128]{2,1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %one = f32[8,128]{1,0:T(8,128)} fusion(%stacked, %turn), kind=kLoop, calls=%fused.1, backend_config={"window_config":{"estimated_cycles":"100"}}
  %sums = (f32[8]{0:T(128)S(1)}, f32[8]{0:T(128)S(1)}) all-reduce(%one, %one), replica_groups={{0,1}}, to_apply=%add
  ROOT %next = (s32[]{:T(128)}, f32[18,8,128]{2,1,0:T(8,128)}) tuple(%turn, %stacked)
}

%condition (state.2: (s32[], f32[18,8,128])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, f32[18,8,128]{2,1,0:T(8,128)}) parameter(0)
  ROOT %less = pred[]{:T(512)} constant(true)
}

%rare (given.1: f32[8,128]) -> f32[8,128] {
  %given.1 = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %copy.1 = f32[8,128]{1,0:T(8,128)} copy(%given.1)
}

%usual (given.2: f32[8,128]) -> f32[8,128] {
  ROOT %given.2 = f32[8,128]{1,0:T(8,128)} parameter(0)
}

ENTRY %main (image: bf16[8,16,9,4], kernel: bf16[3,3,4,4], stack: f32[18,8,128]) -> f32[8,128] {
  %image = bf16[16,8,9,4]{3,1,2,0:T(8,128)(2,1)S(1)} parameter(0)
  %kernel = bf16[3,3,4,4]{3,2,1,0:T(4,128)(2,1)S(1)} parameter(1)
  %stack = f32[18,8,128]{2,1,0:T(8,128)} parameter(2)
  %maps = bf16[16,8,8,4]{3,1,2,0:T(8,128)(2,1)S(1)} convolution(%image, %kernel), window={size=3x3 pad=1_1x0_0}, dim_labels=0b1f_01io->0b1f, metadata={op_name="jit(step)/jvp()/conv_general_dilated"}
  %start = s32[]{:T(128)} constant(0)
  %first = (s32[]{:T(128)}, f32[18,8,128]{2,1,0:T(8,128)}) tuple(%start, %stack)
  %loop = (s32[]{:T(128)}, f32[18,8,128]{2,1,0:T(8,128)}) while(%first), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"18"}}
  %narrow = f32[8,1]{1,0:T(8,128)} constant({...})
  ROOT %result = f32[8,128]{1,0:T(8,128)} conditional(%start, %narrow, %narrow), branch_computations={%usual, %rare}
}
"""


def test_loops_are_counted_as_often_as_they_run():
    work = count_work(TEXT)
    assert work.collectives == {"all-reduce": 18}
    assert work.collective_bytes == {"all-reduce": 18 * 2 * 512}  # eight numbers fill a tile of 128
    assert work.cycles == 18 * 100
    # A turn reads and writes one kernel of 4 KiB and sums it twice; the rest lies on the core.
    assert work.traffic == 18 * 4 * 4096
    assert work.operations == 2 * 16 * 8 * 8 * 4 * 3 * 3 * 4
    assert work.largest_map == 8
    assert topology.rewritten(work, 4) and not topology.rewritten(work, 8)


@pytest.mark.parametrize("name", ["v5e", "v5e:4", "4x4", "v5litepod-16", "v5e:4x4:0", "H100:8x2"])
def test_a_name_of_another_form_is_refused(name):
    with pytest.raises(InputError, match=rf"--topology={name}: must be KIND:SHAPE .*v5e:4x4"):
        topology_devices(name)


def test_without_libtpu_the_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs libtpu, but no TPU: pip install '\.\[tpu\]'"):
        topology_devices("v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:5x3", "v9:2x2", "v4:2x2", "v6e:300x300"])
def test_a_shape_that_no_pod_has_is_refused(name):
    with pytest.raises(InputError, match=f"^--topology={name}: .*three sides") as refusal:
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
    assert jax.devices()[0].platform == "cpu"
    config.batch_norm_group = 1
    estimate_topology(config, "v5e:2x2:2")
    fewer = int(re.search(r"(\d+) all-reduce", capsys.readouterr().out)[1])
    assert fewer <= number - 2 * 11  # once forwards and once backwards a layer


@needs_libtpu
def test_kernels_are_gathered_in_bfloat16():
    config = tiny_config("", batch_size=64, dtype="bfloat16", fsdp_devices=2)
    config.model.hidden = (16, 32)
    program = topology.program_for(config, "v5e:2x2")
    text = topology.compile_ahead(program).as_text()
    gathered = set(re.findall(r"= \(?(\w+)\[[\d,]*\][^=]* all-gather(?:-start)?\(", text))
    assert "bf16" in gathered
