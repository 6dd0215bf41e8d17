"""Several stacks under one Series Instance UID are parted, refused by name, or lose pairs; they are
never one volume. Sound series whose elements vary from slice to slice stay whole."""

import copy
import dataclasses
import time

import numpy as np
import pytest
from pydicom.dataset import Dataset

from data_prep.scan.archives import list_sources
from data_prep.scan.headers import read_header
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, plan_series
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_volume

TINY = np.zeros((24, 10, 10), np.int16)  # 55 mm: headers alone decide
LOWEST = -300.0


def stack(offset=0.0, number=24, hu=TINY, *, spacing=2.5, first=1, **values):
    """Slices that begin `offset` mm above the lowest; Instance Number counts on from `first`."""
    origin = (-170.0, -160.0, LOWEST + offset)
    datasets = dicom_files.slices(hu[:number], spacing=spacing, origin=origin)
    for i, ds in enumerate(datasets):
        ds.SOPInstanceUID = dicom_files.uid(1, 1, round(1000 * offset), len(values), first, i + 1)
        ds.InstanceNumber = first + i
        for keyword, value in values.items():
            setattr(ds, keyword, value(i) if callable(value) else value)
    return datasets


def stacks_of(folder, datasets, rules=None):
    """(lowest position in mm, slices, notes) of each candidate, sorted."""
    taken = [
        entry
        for entry in dicom_files.planned(folder, datasets, rules)
        if not isinstance(entry, Rejection)
    ]
    return sorted((round(c.position_mm[0] - LOWEST, 6), len(c.headers), c.notes) for c in taken)


def reasons_of(folder, datasets):
    return [
        entry.reason
        for entry in dicom_files.planned(folder, datasets)
        if isinstance(entry, Rejection)
    ]


# ---- mixed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [1.25, 0.0])
@pytest.mark.parametrize(
    ("note", "lower", "upper"),
    [
        pytest.param("kernel", {}, {"ConvolutionKernel": "LUNG"}, id="kernels"),
        pytest.param("tube_voltage", {"KVP": "80"}, {"KVP": "140"}, id="energies"),
        pytest.param(
            "image_type",
            {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI", "DE_80"]},
            {"ImageType": ["ORIGINAL", "PRIMARY", "AXIAL", "CT_SOM5 SPI", "DE_140"]},
            id="image_types",
        ),
        pytest.param(
            "frame_of_reference",
            {"FrameOfReferenceUID": "1.2.3.1"},
            {"FrameOfReferenceUID": "1.2.3.2"},
            id="frames_of_reference",
        ),
        pytest.param("trigger_time", {"TriggerTime": "100"}, {"TriggerTime": "500"}, id="triggers"),
        pytest.param(
            "temporal_position",
            {"TemporalPositionIdentifier": 1},
            {"TemporalPositionIdentifier": 2},
            id="temporal_positions",
        ),
        pytest.param(
            "series_description",
            {"SeriesDescription": "Insp"},
            {"SeriesDescription": "Exp"},
            id="descriptions",
        ),
    ],
)
def test_two_stacks_that_an_element_tells_apart(tmp_path, note, lower, upper, offset):
    datasets = stack(**lower) + stack(offset, **upper)
    expected = [(0, 24, (f"split_by_{note}",)), (offset, 24, (f"split_by_{note}",))]
    assert stacks_of(tmp_path, datasets) == expected


def test_two_kernels_of_two_energies_need_both_elements(tmp_path):
    datasets = [
        ds
        for number, (kernel, kvp) in enumerate(
            (kernel, kvp) for kernel in ("STANDARD", "LUNG") for kvp in ("80", "140")
        )
        for ds in stack(0.6 * number, ConvolutionKernel=kernel, KVP=kvp)
    ]
    found = stacks_of(tmp_path, datasets)
    assert [number for _, number, _ in found] == [24] * 4
    assert {notes for *_, notes in found} == {("split_by_kernel", "split_by_tube_voltage")}


def test_passes_whose_slices_have_a_time_each(tmp_path):
    """Two breath-holds that overlap by 8 slices. No value repeats."""
    datasets = stack(AcquisitionTime=lambda i: f"1010{i:02d}.5")
    datasets += stack(16 * 2.5 + 1.25, AcquisitionTime=lambda i: f"1011{i:02d}.5")
    notes = ("split_by_acquisition_time",)
    assert stacks_of(tmp_path, datasets) == [(0, 24, notes), (41.25, 24, notes)]


def test_passes_to_and_fro(tmp_path):
    """The table turns: the second pass begins where the first one ends."""
    datasets = stack(AcquisitionTime=lambda i: f"1010{i:02}")
    datasets += stack(SeriesNumber=1, AcquisitionTime=lambda i: f"1010{47 - i:02}")
    for ds in datasets:
        del ds.InstanceNumber
        ds.SeriesNumber = 1
    assert [number for _, number, _ in stacks_of(tmp_path, datasets)] == [24, 24]


def test_trigger_times_that_vary_from_beat_to_beat(tmp_path):
    datasets = stack(TriggerTime=lambda i: f"{100 + i % 3}")
    datasets += stack(0.6, TriggerTime=lambda i: f"{500 + i % 3}")
    found = stacks_of(tmp_path, datasets)
    assert found == [(0, 24, ("split_by_trigger_time",)), (0.6, 24, ("split_by_trigger_time",))]


def test_passes_that_only_instance_numbers_tell_apart(tmp_path):
    found = stacks_of(tmp_path, stack() + stack(0.6, first=25))
    assert [(offset, number) for offset, number, _ in found] == [(0, 24), (0.6, 24)]


def test_a_second_stack_of_a_few_slices_is_refused_alone(tmp_path):
    datasets = stack() + stack(11.25, 5, ConvolutionKernel="LUNG")
    assert [number for _, number, _ in stacks_of(tmp_path / "a", datasets)] == [24]
    assert reasons_of(tmp_path / "b", datasets) == ["too_few_slices"]


def test_what_nothing_tells_apart_is_refused(tmp_path):
    datasets = stack() + stack(0.6, InstanceNumber="1")
    for ds in datasets:
        ds.InstanceNumber = 1
    assert reasons_of(tmp_path, datasets) == ["mixed_stacks"]


def test_alternating_kernels_that_each_leave_gaps_are_refused(tmp_path):
    """Each kernel has every second slice: half of either stack is lost."""
    kernels = {"ConvolutionKernel": lambda i: ("STANDARD", "LUNG")[i % 2]}
    datasets = stack(number=48, hu=np.zeros((48, 10, 10), np.int16), **kernels)
    assert reasons_of(tmp_path, datasets) == ["mixed_stacks"] * 2


def test_a_few_slices_between_the_others_lose_their_pairs(tmp_path):
    hu = dicom_files.thorax(40)
    strange = dicom_files.slices(hu[9:10], origin=(-170, -160, LOWEST + 9 * 2.5 + 0.8))
    strange[0].SOPInstanceUID = dicom_files.uid(7)
    volume = only_volume(convert(dicom_files.write(tmp_path, dicom_files.slices(hu) + strange)))
    assert len(volume.hu) == 41 and volume.notes == ("uneven_spacing", "irregular_part")
    assert np.flatnonzero(~volume.pair_valid).tolist() == [9, 10, 40]


def test_passes_that_nothing_tells_apart_lose_the_pairs_where_they_overlap(tmp_path):
    """By half a step, so that all steps are even there."""
    hu = dicom_files.thorax(20)
    upper = dicom_files.slices(hu, origin=(-170, -160, LOWEST + 15 * 2.5 + 1.25))
    for i, ds in enumerate(upper):
        ds.SOPInstanceUID = dicom_files.uid(7, i)
    volume = only_volume(convert(dicom_files.write(tmp_path, dicom_files.slices(hu) + upper)))
    assert len(volume.hu) == 40 and volume.notes == ("uneven_spacing", "irregular_part")
    assert np.flatnonzero(~volume.pair_valid).tolist() == [*range(15, 24), 39]


def test_energies_of_an_enhanced_file(tmp_path):
    """KVP of the frames, in their functional groups, a quarter of a step apart."""
    hu = dicom_files.thorax(24, size=32)
    ds = dicom_files.enhanced(
        np.concatenate([hu, hu]), intercepts=[-1024] * 48, order=list(range(48))
    )
    for i, frame in enumerate(ds.PerFrameFunctionalGroupsSequence):
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        position[2] = f"{LOWEST + 2.5 * (i % 24) + 0.6 * (i // 24):g}"
        details = Dataset()
        details.KVP = 80.0 if i < 24 else 140.0
        frame.CTXRayDetailsSequence = [details]
    found = stacks_of(tmp_path, [ds])
    assert [number for _, number, _ in found] == [24, 24]
    assert {notes for *_, notes in found} == {("split_by_tube_voltage",)}


# ---- sound ---------------------------------------------------------------------------------------


def alternating(*values):
    return lambda i: values[i % len(values)]


def test_series_whose_elements_vary_stay_whole(tmp_path):
    sound = {
        "time_of_each_slice": {"AcquisitionTime": lambda i: f"10{i // 60:02d}{i % 60:02d}.5"},
        "times_that_wrap": {"AcquisitionTime": lambda i: f"1017{i * 1.7 % 60:05.2f}"},
        "trigger_time_of_each_slice": {"TriggerTime": lambda i: f"{430 + 7 * (i * 13 % 11)}"},
        "trigger_time_of_each_block": {"TriggerTime": lambda i: f"{430 + i // 4 * 13 % 11}"},
        "alternating_acquisitions": {"AcquisitionNumber": alternating(1, 2)},
        "alternating_blocks": {"AcquisitionNumber": lambda i: 1 + i // 4 % 2},
        "frame_of_reference_of_each_slice": {"FrameOfReferenceUID": lambda i: f"1.2.3.{i + 1}"},
        "alternating_image_types": {
            "ImageType": lambda i: ["ORIGINAL", "PRIMARY", "AXIAL", ("A", "B")[i % 2]]
        },
        "kernel_missing_in_every_second": {"ConvolutionKernel": alternating("STANDARD", "")},
        "kernel_of_the_upper_half": {"ConvolutionKernel": lambda i: "AB"[i > 12]},
        "two_slices_of_another_kernel": {"ConvolutionKernel": lambda i: "AB"[i in (5, 20)]},
        "spellings_of_a_kernel": {"ConvolutionKernel": alternating("STANDARD", "Standard ")},
        "rounded_thicknesses": {"SliceThickness": alternating("2.5", "2.49", "2.6")},
        "voltage_zero_in_every_second": {"KVP": alternating("120", "0")},
        "two_slices_of_another_voltage": {"KVP": lambda i: (120, 100)[i in (5, 20)]},
    }
    for name, values in sound.items():
        assert stacks_of(tmp_path / name, stack(**values)) == [(0, 24, ())], name


def test_overlapping_slices_counted_through_stay_whole(tmp_path):
    """Reconstructed at half the thickness, with acquisition numbers that alternate."""
    datasets = stack(spacing=1.25, AcquisitionNumber=alternating(1, 2), SliceThickness="2.5")
    assert stacks_of(tmp_path, datasets) == [(0, 24, ())]


def test_alternating_acquisitions_with_a_lost_slice_stay_whole(tmp_path):
    datasets = stack(AcquisitionNumber=alternating(1, 2))
    del datasets[10]
    assert stacks_of(tmp_path, datasets) == [(0, 23, ())]


def test_alternating_acquisitions_with_a_copied_slice_stay_whole(tmp_path):
    datasets = stack(AcquisitionNumber=alternating(1, 2))
    copied = copy.deepcopy(datasets[10])
    copied.SOPInstanceUID = dicom_files.uid(99)
    for number in (1, 2):
        copied.AcquisitionNumber = number
        assert stacks_of(tmp_path / str(number), [*datasets, copied]) == [(0, 24, ())]


def test_a_change_of_the_spacing_with_another_acquisition_stays_whole(tmp_path):
    datasets = stack(number=12) + stack(30, 12, spacing=1, first=13, AcquisitionNumber=2)
    [entry] = dicom_files.planned(tmp_path, datasets)
    assert len(entry.headers) == 24


def test_twenty_thousand_slices_are_planned_in_seconds(tmp_path):
    """Two hundred sound series, and one whose positions repeat."""
    dicom_files.write(tmp_path, stack(number=1))
    [first] = [read_header(tmp_path, source) for source in list_sources(tmp_path)]
    many = [
        dataclasses.replace(
            first,
            source=first.source._replace(path=f"{series}/{i:05}"),
            sop_instance_uid=f"1.2.{series}.{i}",
            series_instance_uid=f"1.3.{series}",
            position=(0.0, 0.0, 0.7 * (i % 5000)),
            kernel=f"B{i // 5000}",
        )
        for series in range(201)
        for i in range(50 if series else 10_000)
    ]
    start = time.monotonic()
    assert len(plan_series(many, Rules())) == 202
    assert time.monotonic() - start < 60
