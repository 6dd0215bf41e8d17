"""What makes patients unlike: opacities, implants, breath, contrast timing, noise."""

import dataclasses

import numpy as np
import pytest

from data_prep.synthetic.anatomy import Anatomy, build_anatomy, lungs
from data_prep.synthetic.exam import Options, sample_exam
from data_prep.synthetic.findings import Findings, sample_nodules
from data_prep.synthetic.implants import Implant
from data_prep.synthetic.noise import SliceNoise, noise_tiles
from data_prep.synthetic.opacities import Opacity, opacity_distance, sample_opacities
from data_prep.synthetic.patient import pleura_distance, sample_illness, sample_patient
from data_prep.synthetic.render import render_scan
from data_prep.synthetic.scan import enhancement
from data_prep.synthetic.shapes import polyline

DICOM = Options(seed=5, image_size=64, num_slices=12, slice_spacing_mm=0.0)
BALL = Opacity(
    "consolidation", -50.0, 30.0, 40.0, centre=(-70.0, 0.0, -10.0), radii=(26.0, 26.0, 26.0)
)
FLUID = Opacity("effusion", -200.0, 20.0, 12.0, side=1, level=0.0)


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    patient = sample_patient(np.random.default_rng(2))
    return build_anatomy(
        dataclasses.replace(patient, scale=(1.0, 1.0, 1.0), asymmetry=(0.0, 0.0, 0.0))
    )


@pytest.fixture(scope="module")
def scan():
    exam, _ = sample_exam(0, DICOM)
    return dataclasses.replace(
        exam.scan,
        field_of_view_mm=384.0,
        centre_mm=(0.0, 0.0),
        image_size=96,
        z_mm=tuple(np.arange(-40.0, 20, 6)),
        rotation_degrees=0.0,
        contrast="none",
        noise_hu=6.0,
        kernel="soft",
        breath_mm=0.0,
    )


def render(anatomy: Anatomy, scan, **changes) -> np.ndarray:
    changed = dataclasses.replace(anatomy, **changes)
    return render_scan(changed, scan, Findings(), np.random.default_rng(0)).hu.astype(int)


@pytest.mark.parametrize("opacity", [BALL, FLUID], ids=["consolidation", "effusion"])
def test_an_opacity_takes_the_place_of_lung_alone(anatomy, scan, opacity):
    clean, ill = render(anatomy, scan), render(anatomy, scan, opacities=(opacity,))
    changed = ill - clean > 300
    assert changed.sum() > 200
    assert np.median(clean[changed]) < -700
    assert abs(np.median(ill[changed]) - opacity.hu) < 15
    left = np.arange(96) > 48
    # The patient's left is on the right of the image.
    assert not changed[:, :, left if opacity is BALL else ~left].any()
    # Tissue stays as it is, but for vessels of the lung that is no more.
    assert np.mean(np.abs(ill - clean)[clean > -100] > 60) < 0.02


def test_free_fluid_lies_below_whether_the_patient_is_on_the_back_or_the_front():
    x, y = np.meshgrid(np.arange(30.0, 100, 10), np.arange(-90.0, 91, 10))
    pleura = np.full(x.shape, -60.0)
    for up in (1, -1):
        fluid = dataclasses.replace(FLUID, up=up)
        heights = up * y[opacity_distance(fluid, x, y, -200.0, pleura) < 0]
        assert heights.min() >= 0 and heights.max() == 90


def test_nodules_are_placed_in_what_the_opacities_leave(anatomy):
    ill = dataclasses.replace(
        anatomy, opacities=(dataclasses.replace(FLUID, level=-40.0, high_z=100.0), BALL)
    )
    rng = np.random.default_rng(0)
    found = sample_nodules(ill, (-60.0, 40.0), 25, 0, rng).nodules
    assert len(found) > 15
    for nodule in found:
        x, y, z = (np.float32(v) for v in nodule.centre)
        point = np.full((1, 1), x), np.full((1, 1), y)
        aerated = lungs(*point, float(z), ill, pleura_distance(*point, float(z), ill.patient))
        assert aerated < -0.5 * max(nodule.radii_mm)


def test_a_pacemaker_is_metal_where_it_lies(anatomy, scan):
    implant = Implant(
        polyline([(60.0, -60.0, 0.0), (0.0, -30.0, 0.0)], 1.5),
        2600.0,
        (60.0, -60.0, -4.0),
        (20, 6, 9),
    )
    difference = render(anatomy, scan, implants=(implant,)) - render(anatomy, scan)
    shown = np.argwhere(difference > 1000)
    assert set(shown[:, 0]) <= {5, 6, 7} and len(shown) > 20
    x, y = ((shown[:, axis] - 47.5) * 4 for axis in (2, 1))
    assert np.all((x > 0) & (x < 84) & (y > -70) & (y < -26))


def test_breath_moves_the_diaphragm_and_not_the_apices(scan):
    breathing = dataclasses.replace(
        scan, z_mm=tuple(np.arange(-180.0, 101, 4)), breath_mm=3.0, breath_slices=20.0
    )
    moved = breathing.heights() - np.array(breathing.z_mm)
    assert 2.5 < np.abs(moved[:30]).max() <= 3.0
    assert np.all(moved[-9:] == 0)
    assert np.all(np.diff(breathing.heights()) > 0)


def test_contrast_is_on_its_way_from_the_lungs_to_the_aorta(scan):
    early, late = (
        enhancement(dataclasses.replace(scan, contrast="pulmonary", bolus=1.0, timing=timing))
        for timing in (0.0, 1.0)
    )
    assert early.pulmonary_artery > early.aorta and late.aorta > late.pulmonary_artery
    plain = enhancement(dataclasses.replace(scan, contrast="none", timing=0.7))
    assert plain.aorta == plain.pulmonary_artery == 41


def test_noise_is_correlated_in_all_three_directions():
    rng = np.random.default_rng(0)
    tiles = noise_tiles(128, 0.75, False, 1.0, rng)
    assert 0.8 < tiles[0].std() < 1.0
    assert 0.3 < (tiles[0][:, 1:] * tiles[0][:, :-1]).mean() / tiles[0].var() < 0.95
    noise = SliceNoise(tiles, 128, 0.4)
    slices = np.array([noise.next(rng).copy() for _ in range(40)])
    along = (slices[1:] * slices[:-1]).mean() / slices.var()
    assert along == pytest.approx(0.4, abs=0.05)
    sharp = noise_tiles(128, 0.75, True, 1.0, rng)[0]
    assert sharp.std() > 2 * tiles[0].std()


def test_frequencies_of_illness():
    patients = [sample_patient(np.random.default_rng(i)) for i in range(600)]
    ill = [sample_illness(p, np.random.default_rng([i, 1])) for i, p in enumerate(patients)]
    large = np.mean([a.heart_scale > b.heart_scale for a, b in zip(ill, patients, strict=True)])
    dark = np.mean([patient.lung_hu < -900 for patient in ill])
    assert 0.1 < large < 0.23 and 0.1 < dark < 0.23
    kinds = [
        {o.kind for o in sample_opacities(-90.0, False, 1.0, np.random.default_rng([i, 2]))}
        for i in range(600)
    ]
    for kind in ("effusion", "atelectasis", "consolidation"):
        assert 0.14 < np.mean([kind in found for found in kinds]) < 0.28
