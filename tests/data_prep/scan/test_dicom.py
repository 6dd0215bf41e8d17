"""The corner cases of DICOM series that converters get wrong, from files to volumes."""

import numpy as np
import pydicom
import pytest

from data_prep.scan.rules import Rules
from data_prep.scan.series import plan_series, select_reconstructions
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_rejection, only_volume


@pytest.fixture
def hu():
    return dicom_files.thorax()


def test_plain_series_is_exact(tmp_path, hu):
    volume = only_volume(convert(dicom_files.write(tmp_path, dicom_files.slices(hu))))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.hu.dtype == np.int16
    np.testing.assert_allclose(volume.position_mm, -300 + 2.5 * np.arange(24))
    np.testing.assert_array_equal(volume.pair_valid, [True] * 23 + [False])
    assert volume.pixel_spacing_mm == (5.5, 5.5)
    assert (volume.slice_spacing_mm, volume.slice_thickness_mm, volume.gantry_tilt_degrees) == (
        2.5,
        2.5,
        0,
    )
    assert volume.notes == () and volume.dropped == ()
    header = volume.headers[0]
    assert (header.age, header.sex, header.marks.tube_voltage, header.kernel) == (
        61,
        "F",
        120,
        "STANDARD",
    )


# ---- the corner cases, one test each -------------------------------------------------------------


def test_missing_slice(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    del datasets[10]
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, np.delete(hu, 10, axis=0))
    assert np.flatnonzero(~volume.pair_valid).tolist() == [9, 22]
    assert "gaps" in volume.notes and volume.slice_spacing_mm == 2.5


@pytest.mark.parametrize("second", [1.0, 3.5, 5.0])
def test_non_uniform_spacing(tmp_path, hu, second):
    datasets = dicom_files.slices(hu)
    z = np.cumsum([0] + [2.5] * 12 + [second] * 11)
    for ds, position in zip(datasets, z, strict=True):
        ds.ImagePositionPatient[2] = f"{position:g}"
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)
    np.testing.assert_allclose(volume.position_mm, z)
    assert "uneven_spacing" in volume.notes and "gaps" not in volume.notes


def test_duplicate_identical_slice(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    copy = dicom_files.slices(hu)[7]
    copy.SOPInstanceUID = dicom_files.uid(77)
    volume = only_volume(convert(dicom_files.write(tmp_path, [*datasets, copy])))
    np.testing.assert_array_equal(volume.hu, hu)
    assert [reason for _, reason in volume.dropped] == ["duplicate_slice"]
    assert volume.pair_valid[:-1].all() and "duplicates_dropped" in volume.notes


def test_duplicate_position_other_pixels(tmp_path, hu):
    copy = dicom_files.slices(hu)[7]
    dicom_files.set_pixels(copy, dicom_files.stored(copy) + 1)
    rejection = only_rejection(
        convert(dicom_files.write(tmp_path, [*dicom_files.slices(hu), copy]))
    )
    assert rejection.reason == "contradictory_duplicates" and len(rejection.headers) == 25


def test_gantry_tilt(tmp_path, hu):
    angle = np.radians(15)
    datasets = dicom_files.slices(hu, orientation=(1, 0, 0, 0, np.cos(angle), -np.sin(angle)))
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)
    assert (
        volume.gantry_tilt_degrees == pytest.approx(15, abs=0.01) and "gantry_tilt" in volume.notes
    )
    assert volume.slice_spacing_mm == pytest.approx(2.5 * np.cos(angle))


@pytest.mark.parametrize("angle", [0, 15])
def test_the_origin_jumps_within_the_plane(tmp_path, hu, angle):
    radians = np.radians(angle)
    datasets = dicom_files.slices(hu, orientation=(1, 0, 0, 0, np.cos(radians), -np.sin(radians)))
    for ds in datasets[12:]:
        ds.ImagePositionPatient[0] = "-140"
    volume = only_volume(convert(dicom_files.write(tmp_path / "a", datasets)))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.gantry_tilt_degrees == pytest.approx(angle, abs=0.01)
    assert np.flatnonzero(~volume.pair_valid).tolist() == [11, 23]
    assert volume.notes == (("gantry_tilt",) if angle else ()) + ("in_plane_jump",)
    rejection = only_rejection(convert(tmp_path / "a", Rules(irregular="refuse")))
    assert (rejection.reason, rejection.detail) == (
        "irregular",
        "the origin jumps within the plane",
    )


def test_in_plane_jitter_is_not_a_jump(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    for ds, jitter in zip(
        datasets, np.random.default_rng(0).uniform(-0.3, 0.3, len(datasets)), strict=True
    ):
        ds.ImagePositionPatient[0] = f"{-170 + jitter:.6f}"
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    assert volume.pair_valid[:-1].all() and "in_plane_jump" not in volume.notes


def test_a_jump_across_a_missing_slice_of_a_tilted_gantry(tmp_path, hu):
    """The step across the gap is twice as long in the plane as well. It is not a jump."""
    angle = np.radians(30)
    datasets = dicom_files.slices(hu, orientation=(1, 0, 0, 0, np.cos(angle), -np.sin(angle)))
    del datasets[10]
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    assert volume.notes == ("gantry_tilt", "gaps") and np.flatnonzero(
        ~volume.pair_valid
    ).tolist() == [9, 22]


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1)])
def test_localizer_inside_the_series(tmp_path, hu, orientation):
    localizer = dicom_files.slices(hu[:1], orientation=orientation)[0]
    localizer.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    dicom_files.set_pixels(localizer, np.zeros((100, 80), dtype=int))
    volume = only_volume(convert(dicom_files.write(tmp_path, [*dicom_files.slices(hu), localizer])))
    np.testing.assert_array_equal(volume.hu, hu)
    assert [reason for _, reason in volume.dropped] == ["localizer"]


def test_two_acquisitions_at_the_same_positions(tmp_path, hu):
    first, second = dicom_files.slices(hu), dicom_files.slices(dicom_files.thorax(seed=1))
    for ds in second:
        ds.AcquisitionNumber = 2
    outcome = convert(dicom_files.write(tmp_path, first + second))
    assert [v.candidate.headers[0].acquisition_number for v in outcome.volumes] == [1, 2]
    np.testing.assert_array_equal(outcome.volumes[0].hu, hu)
    np.testing.assert_array_equal(outcome.volumes[1].hu, dicom_files.thorax(seed=1))
    assert len({c.series_key for c in outcome.candidates}) == 2
    (exam,) = select_reconstructions(outcome.candidates, Rules())
    assert len(exam) == 2
    assert len(select_reconstructions(outcome.candidates, Rules(reconstructions="all"))) == 2


@pytest.mark.parametrize(("shift", "number"), [(0.5, 2), (0.25, 10), (0.5, None)])
def test_two_acquisitions_between_each_other(tmp_path, hu, shift, number):
    first = dicom_files.slices(hu)
    second = dicom_files.slices(
        dicom_files.thorax(seed=1), origin=(-170, -160, -300 + shift * dicom_files.SPACING_MM)
    )
    for ds in second:
        ds.AcquisitionNumber = number
    outcome = convert(dicom_files.write(tmp_path, first + second))
    np.testing.assert_array_equal(outcome.volumes[0].hu, hu)
    np.testing.assert_array_equal(outcome.volumes[1].hu, dicom_files.thorax(seed=1))
    assert [v.notes for v in outcome.volumes] == [("split_by_acquisition",)] * 2


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("pixels", ["same", "other"])
def test_step_and_shoot_acquisitions_stay_together(tmp_path, shared, pixels):
    hu = dicom_files.thorax(40)
    lower, upper = dicom_files.slices(hu)[: 20 + shared], dicom_files.slices(hu)[20:]
    for ds in upper:
        ds.AcquisitionNumber = 2
    for ds in upper[:shared]:
        ds.SOPInstanceUID += ".2"
        dicom_files.set_pixels(ds, dicom_files.stored(ds) + (pixels == "other"))
    volume = only_volume(convert(dicom_files.write(tmp_path, lower + upper)))
    np.testing.assert_array_equal(volume.hu, hu)  # the lower acquisition's slice where they differ
    reason = "duplicate_slice" if pixels == "same" else "acquisitions_meet"
    assert [(h.acquisition_number, reason) for h, reason in volume.dropped] == [
        (2, reason)
    ] * shared
    assert volume.pair_valid[:-1].all()
    assert volume.notes == (
        ("duplicates_dropped" if pixels == "same" else "acquisitions_meet",) if shared else ()
    )


def test_two_passes_whose_slices_have_an_acquisition_each(tmp_path, hu):
    datasets = dicom_files.slices(hu) + dicom_files.slices(dicom_files.thorax(seed=1))
    for i, ds in enumerate(datasets):
        ds.AcquisitionNumber = i + 1
    outcome = convert(dicom_files.write(tmp_path, datasets))
    np.testing.assert_array_equal(outcome.volumes[0].hu, hu)
    np.testing.assert_array_equal(outcome.volumes[1].hu, dicom_files.thorax(seed=1))


def test_images_that_contradict_everywhere(tmp_path, hu):
    datasets = dicom_files.slices(hu) + dicom_files.slices(dicom_files.thorax(seed=1))
    assert only_rejection(convert(dicom_files.write(tmp_path, datasets))).reason == (
        "contradictory_duplicates"
    )


def test_acquisition_number_missing_here_and_there(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    for i in (5, 15):
        datasets[i].AcquisitionNumber = None
    np.testing.assert_array_equal(
        only_volume(convert(dicom_files.write(tmp_path, datasets))).hu, hu
    )


@pytest.mark.parametrize("declared", ["declared", "undeclared", "declared_as_unsigned", "range"])
def test_padding_becomes_air(tmp_path, hu, declared):
    datasets = dicom_files.slices(hu, signed=True)
    corner = np.s_[:6, :6]
    for ds in datasets:
        values = dicom_files.stored(ds)
        values[corner] = -2000
        dicom_files.set_pixels(ds, values)
        if declared == "declared":
            ds.add_new("PixelPaddingValue", "SS", -2000)
        elif declared == "declared_as_unsigned":
            ds.add_new("PixelPaddingValue", "US", 63536)
        elif declared == "range":
            ds.add_new("PixelPaddingValue", "SS", -2000)
            ds.add_new("PixelPaddingRangeLimit", "SS", -1990)
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    expected = hu.copy()
    expected[:, :6, :6] = -1000
    np.testing.assert_array_equal(volume.hu, expected)


def test_monochrome1_changes_no_value(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        ds.PhotometricInterpretation = "MONOCHROME1"
    np.testing.assert_array_equal(
        only_volume(convert(dicom_files.write(tmp_path, datasets))).hu, hu
    )


def test_truncated_pixel_data(tmp_path, hu):
    dicom_files.write(tmp_path, dicom_files.slices(hu))
    victim = next(p for p in tmp_path.iterdir() if pydicom.dcmread(p).InstanceNumber == 9)
    victim.write_bytes(victim.read_bytes()[:-1000])
    volume = only_volume(convert(tmp_path))
    np.testing.assert_array_equal(volume.hu, np.delete(hu, 8, axis=0))
    ((header, reason),) = volume.dropped
    assert (header.source.path, reason) == (victim.name, "truncated_pixel_data")
    assert np.flatnonzero(~volume.pair_valid).tolist() == [7, 22] and "slices_lost" in volume.notes


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1"])
def test_no_preamble(tmp_path, hu, syntax):
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.UID(syntax)
    outcome = convert(dicom_files.write(tmp_path, datasets, preamble=False))
    np.testing.assert_array_equal(only_volume(outcome).hu, hu)


def test_matrix_varies(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    for ds in datasets[::2]:
        dicom_files.set_pixels(ds, np.pad(dicom_files.stored(ds), 8, constant_values=24))
    rejection = only_rejection(convert(dicom_files.write(tmp_path, datasets)))
    assert rejection.reason == "grid_varies" and len(rejection.headers) == 24


def test_matrix_of_a_single_slice_differs(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    dicom_files.set_pixels(
        datasets[5], np.pad(dicom_files.stored(datasets[5]), 8, constant_values=24)
    )
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, np.delete(hu, 5, axis=0))
    assert [reason for _, reason in volume.dropped] == [
        "other_grid"
    ] and "other_grid_dropped" in volume.notes
    assert not volume.pair_valid[4]


@pytest.mark.parametrize(("limit", "taken"), [(3.0, False), (4.999, False), (5.0, True)])
def test_thickness_and_not_spacing_is_judged(tmp_path, hu, limit, taken):
    datasets = dicom_files.slices(hu, spacing=3.0)
    for ds in datasets:
        ds.SliceThickness = "5"
    outcome = convert(dicom_files.write(tmp_path, datasets), Rules(max_slice_thickness_mm=limit))
    if taken:
        np.testing.assert_array_equal(only_volume(outcome).hu, hu)
    else:
        assert only_rejection(outcome).reason == "too_thick"


@pytest.mark.parametrize("instance_numbers", ["shuffled", "missing"])
def test_instance_numbers_do_not_matter(tmp_path, hu, instance_numbers):
    datasets = dicom_files.slices(hu)
    shuffled = np.random.default_rng(1).permutation(len(datasets))
    for ds, number in zip(datasets, shuffled, strict=True):
        if instance_numbers == "shuffled":
            ds.InstanceNumber = int(number)
        else:
            del ds.InstanceNumber
    np.testing.assert_array_equal(
        only_volume(convert(dicom_files.write(tmp_path, datasets))).hu, hu
    )


def test_two_series_in_one_folder(tmp_path, hu):
    other = dicom_files.thorax(30, seed=1)
    outcome = convert(
        dicom_files.write(tmp_path, dicom_files.slices(hu) + dicom_files.slices(other, series=2))
    )
    assert [len(v.hu) for v in outcome.volumes] == [24, 30]
    np.testing.assert_array_equal(outcome.volumes[0].hu, hu)
    np.testing.assert_array_equal(outcome.volumes[1].hu, other)
    (exam,) = select_reconstructions(outcome.candidates, Rules())
    assert len(exam[0].headers) == 30  # same kernel and thickness: more slices


def test_no_image_position(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        del ds.ImagePositionPatient
    assert only_rejection(convert(dicom_files.write(tmp_path, datasets))).reason == (
        "missing_position"
    )


def test_signedness_tag_wrong(tmp_path, hu):
    datasets = dicom_files.slices(hu, signed=True, intercept=0)
    for ds in datasets:
        ds.PixelRepresentation = 0
    assert only_rejection(convert(dicom_files.write(tmp_path, datasets))).reason == "implausible_hu"


def test_pixel_spacing_missing(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        del ds.PixelSpacing
    assert only_rejection(convert(dicom_files.write(tmp_path, datasets))).reason == (
        "missing_pixel_spacing"
    )


@pytest.mark.parametrize(("intercept", "taken"), [(0, True), (-1024, False)])
def test_no_rescale_tags(tmp_path, hu, intercept, taken):
    datasets = dicom_files.slices(hu, signed=True, intercept=intercept)
    for ds in datasets:
        del ds.RescaleSlope, ds.RescaleIntercept
    outcome = convert(dicom_files.write(tmp_path, datasets))
    if taken:
        volume = only_volume(outcome)
        np.testing.assert_array_equal(volume.hu, hu)
        assert "no_rescale_tags" in volume.notes
    else:
        assert only_rejection(outcome).reason == "missing_rescale"


@pytest.mark.parametrize(
    "orientation", [(0, 1, 0, 0, 0, -1), (1, 0, 0, 0, 0, -1), (0.7071068, 0, 0.7071068, 0, 1, 0)]
)
def test_other_planes(tmp_path, hu, orientation):
    datasets = dicom_files.slices(hu, orientation=orientation)
    assert only_rejection(convert(dicom_files.write(tmp_path, datasets))).reason == "not_axial"


@pytest.mark.parametrize(
    ("sop_class", "image_type", "reason"),
    [
        ("1.2.840.10008.5.1.4.1.1.7", ["DERIVED", "SECONDARY"], "secondary_capture"),
        ("1.2.840.10008.5.1.4.1.1.7.3", ["ORIGINAL", "PRIMARY", "AXIAL"], "secondary_capture"),
        ("1.2.840.10008.5.1.4.1.1.2", ["DERIVED", "SECONDARY", "REFORMATTED"], "derived_image"),
        ("1.2.840.10008.5.1.4.1.1.2", ["DERIVED", "PRIMARY", "MIP"], "derived_image"),
        ("1.2.840.10008.5.1.4.1.1.2", ["DERIVED", "PRIMARY", "AXIAL"], None),
        ("1.2.840.10008.5.1.4.1.1.2", ["ORIGINAL", "SECONDARY", "AXIAL"], None),
    ],
)
def test_derived_and_secondary_captures(tmp_path, hu, sop_class, image_type, reason):
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        ds.SOPClassUID, ds.ImageType = sop_class, image_type
    outcome = convert(dicom_files.write(tmp_path, datasets))
    if reason is None:
        np.testing.assert_array_equal(only_volume(outcome).hu, hu)
    else:
        assert only_rejection(outcome).reason == reason


def test_jittered_positions(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    for ds, jitter in zip(
        datasets, np.random.default_rng(0).uniform(-0.01, 0.01, len(datasets)), strict=True
    ):
        ds.ImagePositionPatient[2] = f"{float(ds.ImagePositionPatient[2]) + jitter:.6f}"
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.pair_valid[:-1].all() and volume.notes == ()


def test_slope_differs_per_slice(tmp_path, hu):
    hu = hu // 4 * 4
    datasets = dicom_files.slices(hu)
    for i, ds in enumerate(datasets):
        slope = (1, 2, 4)[i % 3]
        dicom_files.set_pixels(ds, (hu[i].astype(int) + 1024) // slope)
        ds.RescaleSlope = str(slope)
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.hu.dtype == np.int16


def test_enhanced_multi_frame(tmp_path, hu):
    order = np.random.default_rng(0).permutation(len(hu)).tolist()
    intercepts = [-1024 - 8 * i for i in range(len(hu))]
    ds = dicom_files.enhanced(hu, intercepts=intercepts, order=order)
    volume = only_volume(convert(dicom_files.write(tmp_path, [ds])))
    np.testing.assert_array_equal(volume.hu, hu)
    assert [header.frame for header in volume.headers] == np.argsort(order).tolist()
    assert volume.slice_thickness_mm == 2.5


# ---- orientation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orientation", "raw"),
    [
        pytest.param((1, 0, 0, 0, 1, 0), lambda a: a, id="head_first_supine"),
        pytest.param((-1, 0, 0, 0, 1, 0), lambda a: a[:, :, ::-1], id="mirrored_columns"),
        pytest.param((1, 0, 0, 0, -1, 0), lambda a: a[:, ::-1, :], id="negative_rows"),
        pytest.param((-1, 0, 0, 0, -1, 0), lambda a: a[:, ::-1, ::-1], id="prone"),
        pytest.param(
            (0, 1, 0, -1, 0, 0), lambda a: a[:, :, ::-1].transpose(0, 2, 1), id="decubitus"
        ),
        pytest.param((0, 1, 0, 1, 0, 0), lambda a: a.transpose(0, 2, 1), id="transposed"),
    ],
)
def test_every_orientation_comes_out_the_same(tmp_path, orientation, raw):
    hu = dicom_files.thorax()[:, :56]  # not square
    datasets = dicom_files.slices(raw(hu), orientation=orientation)
    for ds in datasets:
        ds.PixelSpacing = ["5.5", "5.25"] if ds.Rows == 56 else ["5.25", "5.5"]
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)
    assert volume.pixel_spacing_mm == (5.5, 5.25)


def test_feet_first_order_of_positions(tmp_path, hu):
    datasets = dicom_files.slices(hu[::-1], spacing=-2.5)
    for ds in datasets:
        ds.SliceThickness, ds.PatientPosition = "2.5", "FFS"
    volume = only_volume(convert(dicom_files.write(tmp_path, datasets)))
    np.testing.assert_array_equal(volume.hu, hu)
    assert np.all(np.diff(volume.position_mm) > 0)


# ---- further rules -------------------------------------------------------------------------------


def edited(hu, **values):
    datasets = dicom_files.slices(hu)
    for ds in datasets:
        for keyword, value in values.items():
            if value is None:
                delattr(ds, keyword)
            else:
                setattr(ds, keyword, value)
    return datasets


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"SeriesInstanceUID": None}, "missing_series_uid"),
        ({"SeriesInstanceUID": ""}, "missing_series_uid"),
        ({"ImageOrientationPatient": None}, "unknown_orientation"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "unknown_orientation"),
        ({"BurnedInAnnotation": "YES"}, "burned_in_annotation"),
        ({"Modality": "PT"}, "not_ct"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "localizer"),
        ({"RescaleSlope": "0"}, "missing_rescale"),
        ({"RescaleIntercept": None}, "missing_rescale"),
        ({"RescaleIntercept": "-5000"}, "implausible_hu"),
        ({"RescaleType": "Z_EFF"}, "derived_image"),
    ],
)
def test_refusals(tmp_path, hu, values, reason):
    rejection = only_rejection(convert(dicom_files.write(tmp_path, edited(hu, **values))))
    assert rejection.reason == reason and len(rejection.headers) == 24


def test_one_burned_in_annotation_refuses_the_series(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    datasets[3].BurnedInAnnotation = "YES"
    assert only_rejection(convert(dicom_files.write(tmp_path, datasets))).reason == (
        "burned_in_annotation"
    )


def test_captures_beside_the_slices_are_dropped(tmp_path, hu):
    captures = dicom_files.slices(dicom_files.thorax(6, seed=1), origin=(-170, -160, 500))
    for i, ds in enumerate(captures):
        ds.SOPInstanceUID = dicom_files.uid(1, 1, 100 + i)
        ds.ImageType = ["DERIVED", "SECONDARY"]
    volume = only_volume(convert(dicom_files.write(tmp_path, dicom_files.slices(hu) + captures)))
    np.testing.assert_array_equal(volume.hu, hu)
    assert {reason for _, reason in volume.dropped} == {"derived_image"} and volume.notes == ()


def test_several_stacks_of_one_series(tmp_path, hu):
    """A neck with the gantry tilted and a chest without, under one Series Instance UID."""
    angle = np.radians(20)
    neck = dicom_files.slices(
        hu, orientation=(1, 0, 0, 0, np.cos(angle), -np.sin(angle)), origin=(-170, -160, 100)
    )
    outcome = convert(dicom_files.write(tmp_path, dicom_files.slices(hu) + neck))
    assert sorted(round(v.gantry_tilt_degrees) for v in outcome.volumes) == [0, 20]
    assert len({c.series_key for c in outcome.candidates}) == 2


def test_same_series_uid_of_two_patients(tmp_path, hu):
    other = dicom_files.thorax(seed=1)
    outcome = convert(
        dicom_files.write(
            tmp_path, dicom_files.slices(hu) + dicom_files.slices(other, patient="patient-2")
        )
    )
    assert [v.candidate.patient_key for v in outcome.volumes] == ["patient-1", "patient-2"]
    np.testing.assert_array_equal(outcome.volumes[1].hu, other)


def test_no_patient_id(tmp_path, hu):
    volume = only_volume(convert(dicom_files.write(tmp_path, edited(hu, PatientID=None))))
    assert volume.candidate.patient_key == f"study:{dicom_files.uid(1)}" and volume.notes == (
        "no_patient_id",
    )


def test_no_slice_thickness(tmp_path, hu):
    volume = only_volume(convert(dicom_files.write(tmp_path, edited(hu, SliceThickness=None))))
    assert volume.slice_thickness_mm == 2.5 and volume.notes == ("no_slice_thickness",)


def test_no_slice_thickness_and_wide_spacing(tmp_path, hu):
    datasets = dicom_files.slices(hu, spacing=3.5)
    for ds in datasets:
        del ds.SliceThickness
    assert only_rejection(convert(dicom_files.write(tmp_path, datasets))).reason == "too_thick"


@pytest.mark.parametrize(("limit", "taken"), [(24, True), (25, False)])
def test_fewest_slices(tmp_path, hu, limit, taken):
    outcome = convert(dicom_files.write(tmp_path, dicom_files.slices(hu)), Rules(min_slices=limit))
    assert [r.reason for r in outcome.rejections] == ([] if taken else ["too_few_slices"])


@pytest.mark.parametrize(
    ("count", "detail"), [(1, "1 slice, at least 20 asked"), (19, "19 slices, at least 20 asked")]
)
def test_detail_of_too_few_slices(tmp_path, hu, count, detail):
    assert (
        only_rejection(convert(dicom_files.write(tmp_path, dicom_files.slices(hu[:count])))).detail
        == detail
    )


def test_irregular_volumes_can_be_refused(tmp_path, hu):
    datasets = dicom_files.slices(hu)
    del datasets[10]
    rejection = only_rejection(
        convert(dicom_files.write(tmp_path, datasets), Rules(irregular="refuse"))
    )
    assert rejection.reason == "irregular"


@pytest.mark.parametrize(("missing", "taken"), [((5, 9, 15), True), ((5, 9, 12, 15), False)])
def test_at_most_a_tenth_of_the_slices_may_be_missing(tmp_path, missing, taken):
    hu = dicom_files.thorax(30)
    datasets = [ds for i, ds in enumerate(dicom_files.slices(hu)) if i not in missing]
    outcome = convert(dicom_files.write(tmp_path, datasets))
    assert [r.reason for r in outcome.rejections] == ([] if taken else ["too_many_lost"])
    for volume in outcome.volumes:  # each gap costs one pair
        assert np.count_nonzero(~volume.pair_valid) == len(missing) + 1


def test_a_folder_and_its_copy(tmp_path, hu):
    dicom_files.write(tmp_path / "a", dicom_files.slices(hu))
    dicom_files.write(tmp_path / "b", dicom_files.slices(hu), seed=1)
    volume = only_volume(convert(tmp_path))
    np.testing.assert_array_equal(volume.hu, hu)
    assert len(volume.dropped) == 24


def test_a_good_copy_replaces_a_damaged_slice(tmp_path, hu):
    dicom_files.write(tmp_path / "a", dicom_files.slices(hu))
    victim = tmp_path / "a" / "IM0003"
    copy = victim.read_bytes()
    victim.write_bytes(copy[:-100])
    (tmp_path / "b").write_bytes(copy)
    volume = only_volume(convert(tmp_path))
    np.testing.assert_array_equal(volume.hu, hu)
    assert [reason for _, reason in volume.dropped] == ["truncated_pixel_data"]


def test_preference_of_reconstructions(tmp_path, hu):
    wanted = {"Br40d\\3": 1, "B70f": 2, "STANDARD": 3, "LUNG": 4, "FC52": 5}
    datasets = []
    for kernel, number in wanted.items():
        some = dicom_files.slices(hu, series=number)
        for ds in some:
            ds.ConvolutionKernel = kernel.split("\\")
            ds.SliceThickness = "2.5" if number == 1 else "1.25"
        datasets += some
    outcome = convert(dicom_files.write(tmp_path, datasets))
    for preferred, first in (("soft", ["STANDARD", "Br40d"]), ("sharp", ["B70f", "LUNG", "FC52"])):
        rules = Rules(preferred_kernel=preferred)
        headers = [h for c in outcome.candidates for h in c.headers]
        (exam,) = select_reconstructions(plan_series(headers, rules), rules)
        assert [c.headers[0].kernel for c in exam][: len(first)] == first


def test_rules_are_checked():
    for wrong in (
        {"min_slices": 0},
        {"irregular": "maybe"},
        {"max_slice_thickness_mm": -1},
        {"max_lost_fraction": 1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Rules(**wrong)
