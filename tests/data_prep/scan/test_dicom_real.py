"""Real scans: volumes, refusals with their reasons, and the HU of every voxel."""

import collections
import dataclasses

import numpy as np
import pydicom
import pytest

from data_prep.scan.anatomy import covers_chest
from data_prep.scan.archives import list_sources, read_bytes
from data_prep.scan.headers import Header, NotAnImage, read_header
from data_prep.scan.rules import Rules
from data_prep.scan.series import Rejection, plan_series
from data_prep.scan.volume import load_volume


@pytest.fixture(scope="module")
def archive(real_data):
    read = [read_header(real_data, source) for source in list_sources(real_data)]
    headers = [entry for entry in read if isinstance(entry, Header)]
    return read, plan_series(headers, Rules())


def test_everything_is_accounted_for_as_expected(archive):
    read, planned = archive
    taken, refused = {}, collections.defaultdict(set)
    for entry in planned:
        for folder in {
            header.source.path.split("/")[0]
            for header in getattr(entry, "all_headers", entry.headers)
        }:
            if isinstance(entry, Rejection):
                refused[folder].add(entry.reason)
            else:
                taken[folder] = len(entry.headers)
    assert taken == {"lidc_0001": 133, "lidc_0003.zip": 140, "cptac_pda_c3n_00249.zip": 102}
    assert refused == {
        "lung_petct_dx_a0002": {"too_thick"},
        "gantry_tilt_ge": {"no_chest"},
        "no_uids_j2k": {"missing_series_uid"},
        "not_a_clean_volume": {"too_few_slices"},
        "mixed_patients": {"too_few_slices", "not_axial"},
        "transfer_syntaxes": {"too_few_slices", "derived_image"},  # a perfusion map
    }
    others = [entry for entry in read if isinstance(entry, NotAnImage)]
    assert all(
        entry.reason == ("packed" if entry.source.path.endswith(".tar.xz") else "not_dicom")
        and not entry.source.path.endswith(".dcm")
        for entry in others
    )
    in_series = sum(len(getattr(entry, "all_headers", entry.headers)) for entry in planned)
    assert in_series == sum(entry.number_of_frames for entry in read if isinstance(entry, Header))


@pytest.mark.parametrize("folder", ["lidc_0001", "lidc_0003.zip", "cptac_pda_c3n_00249.zip"])
def test_chest_volumes_are_exact(real_data, archive, folder):
    candidate = next(
        entry for entry in archive[1] if entry.headers[0].source.path.startswith(folder)
    )
    volume = load_volume(real_data, candidate, Rules())
    assert not isinstance(volume, Rejection)
    assert volume.hu.shape == (len(candidate.headers), 512, 512) and volume.hu.dtype == np.int16
    assert volume.notes == () and volume.dropped == () and volume.pair_valid[:-1].all()
    rng = np.random.default_rng(0)
    for _ in range(20):
        s, y, x = (int(rng.integers(n)) for n in volume.hu.shape)
        ds = pydicom.dcmread(
            pydicom.filebase.DicomBytesIO(read_bytes(real_data, volume.headers[s].source))
        )
        # these scans are head first, supine in the image
        hu = pydicom.pixels.apply_rescale(ds.pixel_array, ds)[y, x]
        assert volume.hu[s, y, x] == (hu if hu >= -1500 else -1000)
        assert volume.position_mm[s] == pytest.approx(float(ds.ImagePositionPatient[2]), abs=1e-6)


def test_head_is_refused_by_its_pixels_too(real_data):
    rules = Rules(max_slice_thickness_mm=10)
    headers = [
        read_header(real_data, s)
        for s in list_sources(real_data)
        if s.path.startswith("gantry_tilt_ge")
    ]
    (candidate,) = plan_series(
        [dataclasses.replace(header, body_part="") for header in headers], rules
    )
    rejection = load_volume(real_data, candidate, rules)
    assert (
        isinstance(rejection, Rejection)
        and rejection.reason == "no_chest"
        and len(rejection.headers) == 28
    )
    volume = load_volume(real_data, candidate, Rules(max_slice_thickness_mm=10, require_lung=False))
    assert volume.gantry_tilt_degrees == pytest.approx(18.5, abs=0.1)
    assert {"gantry_tilt", "uneven_spacing"} <= set(volume.notes) and not covers_chest(volume.chest)


def test_both_reconstructions_of_the_thick_scan(real_data):
    rules = Rules(max_slice_thickness_mm=8)
    headers = [
        read_header(real_data, s)
        for s in list_sources(real_data)
        if s.path.startswith("lung_petct")
    ]
    planned = plan_series([header for header in headers if isinstance(header, Header)], rules)
    volumes = [load_volume(real_data, candidate, rules) for candidate in planned]
    assert [len(volume.hu) for volume in volumes] == [30, 30]
    assert all(covers_chest(volume.chest) for volume in volumes)
    preferred = min(planned, key=lambda candidate: candidate.preference)
    assert preferred.headers[0].kernel == "B40f"
