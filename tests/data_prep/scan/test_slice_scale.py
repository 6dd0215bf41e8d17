"""Single slices on another scale than the slices around them; and sound scans that look odd."""

import types

import numpy as np
import pytest

from data_prep.scan.rules import Rules
from data_prep.scan.slice_scale import slices_on_another_scale
from tests.helpers import dicom_files
from tests.helpers.dicom_files import convert, only_rejection, only_volume


def outcome_of(folder, edit, count=30, hu=None, **options):
    hu = dicom_files.thorax(count) if hu is None else hu
    datasets = dicom_files.slices(hu, **options)
    for i, ds in enumerate(datasets):
        edit(ds, i)
    return hu, convert(dicom_files.write(folder, datasets), Rules())


def check_dropped(hu, outcome, bad):
    volume = only_volume(outcome)
    assert [reason for _, reason in volume.dropped] == ["other_scale"] * len(bad)
    assert "slices_lost" in volume.notes and volume.hu.dtype == np.int16
    np.testing.assert_array_equal(volume.hu, np.delete(hu, bad, axis=0))


BAD_SLICES = {
    "intercept_0": lambda ds: setattr(ds, "RescaleIntercept", "0"),
    "intercept_24_off": lambda ds: setattr(ds, "RescaleIntercept", "-1000"),
    "slope_10": lambda ds: setattr(ds, "RescaleSlope", "10"),
    "slope_of_a_tenth": lambda ds: setattr(ds, "RescaleSlope", "0.1"),
    "slope_negative": lambda ds: setattr(ds, "RescaleSlope", "-1"),
    "padding": lambda ds: dicom_files.set_pixels(ds, np.zeros((64, 64), int)),
    "byte_order": lambda ds: dicom_files.set_pixels(
        ds, dicom_files.stored(ds).astype(np.uint16).byteswap()
    ),
    "overlay_in_the_last_bit": lambda ds: dicom_files.set_pixels(
        ds, dicom_files.stored(ds) | (np.indices((64, 64)).max(0) == 40) << 15
    ),
    "doubled": lambda ds: dicom_files.set_pixels(ds, 2 * dicom_files.stored(ds)),
}


@pytest.mark.parametrize("kind", BAD_SLICES)
def test_slices_on_another_scale_are_dropped_by_name(tmp_path, kind):
    """One slice, and two that are neighbours."""
    bad = [8, 20, 21]

    def edit(ds, i):
        if i in bad:
            BAD_SLICES[kind](ds)

    check_dropped(*outcome_of(tmp_path, edit), bad)


def test_a_third_of_the_slices_on_another_scale_is_refused(tmp_path):
    def edit(ds, i):
        if i >= 20:
            ds.RescaleIntercept = "0"

    rejection = only_rejection(outcome_of(tmp_path, edit)[1])
    assert rejection.reason == "other_scale" and rejection.detail == "10 of 30 slices"


def test_a_slice_without_rescale_tags_is_dropped(tmp_path):
    def edit(ds, i):
        if i == 7:
            del ds.RescaleSlope, ds.RescaleIntercept

    hu, outcome = outcome_of(tmp_path, edit)
    volume = only_volume(outcome)
    assert [reason for _, reason in volume.dropped] == ["missing_rescale"]
    np.testing.assert_array_equal(volume.hu, np.delete(hu, 7, axis=0))


def test_a_scale_of_its_own_for_each_slice_is_sound(tmp_path):
    """As PET has it: slope and intercept use the bits of each slice."""
    hu = dicom_files.thorax(24)
    rng = np.random.default_rng(3)
    slopes, intercepts = rng.integers(1, 5, 24) / 4, rng.integers(-3000, -1000, 24)

    def edit(ds, i):
        values = np.rint((hu[i] - intercepts[i]) / slopes[i]).astype(int)
        dicom_files.set_pixels(ds, values)
        ds.RescaleSlope, ds.RescaleIntercept = str(slopes[i]), str(intercepts[i])

    volume = only_volume(outcome_of(tmp_path, edit, hu=hu)[1])
    assert volume.dropped == () and np.abs(volume.hu - hu).max() <= 0.5


def test_blank_ends_and_metal_are_sound(tmp_path):
    """Padding at both ends, as resampling leaves it, and a plate of metal in three slices."""
    hu = dicom_files.thorax(40)
    hu[:6] = hu[-4:] = -1000
    hu[20:23, 24:32, 12:22] = 3071
    hu[20:23, 30] = -1000  # a streak
    _, outcome = outcome_of(tmp_path, lambda ds, i: None, hu=hu)
    assert only_volume(outcome).dropped == ()


def test_a_slice_that_lost_its_sign_is_dropped(tmp_path):
    """Pixel Representation 0 makes 65,536 HU more of each negative value."""

    def edit(ds, i):
        if i == 12:
            ds.PixelRepresentation = 0

    check_dropped(*outcome_of(tmp_path, edit, signed=True, intercept=0), [12])


@pytest.mark.parametrize("thinned", [1, 6])
def test_real_scans_lose_no_slice(real_data, thinned):
    """Also in steps of up to 12 mm, in fields that hold one lung, and in wide fields."""
    import nibabel

    for path in sorted((real_data / "real_chest_nifti").glob("*.nii.gz"))[:3]:
        hu = np.moveaxis(np.asanyarray(nibabel.load(path).dataobj), 2, 0)[::thinned]
        size = hu.shape[1]
        header = types.SimpleNamespace(
            rescale_slope=1.0, rescale_intercept=0.0, pixel_representation=1
        )
        wide = np.pad(hu[:, ::2, ::2], ((0, 0), (size // 2,) * 2, (size // 2,) * 2), "minimum")
        for field in (hu, hu[:, size // 4 : -size // 4, size // 6 : size // 2], wide):
            headers = [header] * len(field)
            assert slices_on_another_scale(field, headers, [hu[0]] * len(field)) == []


def test_a_series_that_lost_its_sign_is_implausible(tmp_path):
    def edit(ds, i):
        ds.PixelRepresentation = 0

    rejection = only_rejection(outcome_of(tmp_path, edit, count=20, signed=True, intercept=0)[1])
    assert rejection.reason == "implausible_hu"
