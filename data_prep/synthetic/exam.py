"""A synthetic patient on a scanner: person, findings and acquisition, all drawn from a seed."""

import dataclasses

import numpy as np

from data_prep.synthetic.anatomy import Anatomy, build_anatomy
from data_prep.synthetic.dicom_writer import (
    VENDORS,
    Series,
    Vendor,
    choose_transfer_syntax,
    series_uid,
)
from data_prep.synthetic.findings import Findings, sample_emboli, sample_nodules
from data_prep.synthetic.implants import sample_implants
from data_prep.synthetic.opacities import sample_opacities
from data_prep.synthetic.patient import Patient, sample_illness, sample_patient
from data_prep.synthetic.render import Rendering, render_scan
from data_prep.synthetic.scan import Scan, outside_field_of_view

LAYOUTS = ("dicom", "rsna_pe", "lidc_idri")
FIELDS = ("body", "lungs", "lung", "mediastinum")
# z between which the trunk and the main pulmonary arteries lie, in reference space.
CENTRAL_ARTERIES_Z = (-46.0, -10.0)
# Widths of fields that leave the body wall out, in reference space.
FIELDS_MM = {"lungs": 262, "lung": 145, "mediastinum": 170}
# x of the middle of the left lung, in reference space; the right one's is its negative.
LUNG_X = 68.0
# How often opacities take the place of lung in each layout, relative to `dicom`.
OPACITY_SHARES = {"dicom": 1.0, "rsna_pe": 0.6, "lidc_idri": 0.35}
# How often each layout has no contrast, the pulmonary arterial and the venous phase.
CONTRAST_SHARES = {"dicom": (0.4, 0.35, 0.25), "rsna_pe": (0, 1, 0), "lidc_idri": (0.55, 0.1, 0.35)}


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that decide the bytes of a patient's files, with the patient's number.

    `num_slices` 0 is the whole chest; `slice_spacing_mm` 0 leaves the spacing to the scanner;
    `layout` is one of LAYOUTS; `field` one of FIELDS: what the reconstructed field of view holds;
    of the rsna_pe layout, slices are positive of which emboli cover `min_embolus_mm2`.
    """

    seed: int
    image_size: int
    num_slices: int
    slice_spacing_mm: float
    layout: str = "dicom"
    field: str = "body"
    min_embolus_mm2: float = 20.0


@dataclasses.dataclass(frozen=True)
class Exam:
    """One patient's study before it is rendered.

    `position` is Patient Position (0018,5100); `mirrored` and `transfer_syntax` as in `Series`;
    `origin_mm` the centre of the first voxel; `attributes` the attributes of all series; `entropy`
    names the study; `poor_quality` lists the faults of the images: "motion", "contrast".
    """

    anatomy: Anatomy
    scan: Scan
    findings: Findings
    vendor: Vendor
    position: str
    mirrored: bool
    transfer_syntax: str
    origin_mm: tuple[float, float, float]
    attributes: dict[str, object]
    entropy: tuple[str, ...]
    poor_quality: tuple[str, ...]


def sample_exam(index: int, options: Options) -> tuple[Exam, np.random.Generator]:
    """Patient `index` of an archive, with the generator of random numbers for rendering and
    writing. Layouts and seeds have different patients. Of each two exams of the rsna_pe layout one
    has emboli."""
    layout = LAYOUTS.index(options.layout)
    rng = np.random.default_rng([options.seed, index] + [layout] * (layout > 0))
    patient = sample_patient(rng)
    vendor = VENDORS[int(rng.integers(len(VENDORS)))]
    scan = sample_scan(patient, vendor, options, rng)
    position = str(rng.choice(["HFS", "FFS", "HFP", "FFP"], p=[0.7, 0.17, 0.08, 0.05]))
    scan = dataclasses.replace(scan, prone=position.endswith("P"))
    mirrored = position == "FFS" and rng.random() < 0.4
    if options.layout == "rsna_pe":
        pair = np.random.default_rng([options.seed, index // 2, 10])
        with_emboli = int(pair.integers(2)) == index % 2
    else:
        with_emboli = (
            options.layout == "dicom" and scan.contrast == "pulmonary" and rng.random() < 0.3
        )
    strained = bool(with_emboli and rng.random() < 0.4)
    if strained:
        patient = dataclasses.replace(patient, right_ventricle_scale=float(rng.uniform(1.1, 1.3)))
    poor_quality = ()
    if options.layout == "rsna_pe" and rng.random() < 0.05:
        poor_quality = (("motion",), ("contrast",), ("motion", "contrast"))[int(rng.integers(3))]
        scan = dataclasses.replace(
            scan,
            motion_mm=4.0 * ("motion" in poor_quality),
            bolus=scan.bolus * (0.55 if "contrast" in poor_quality else 1.0),
        )
    ill = np.random.default_rng([options.seed, index, layout, 11])
    patient = sample_illness(patient, ill)
    top = max(patient.dome_right_z, patient.dome_left_z)
    opacities = sample_opacities(top, scan.prone, OPACITY_SHARES[options.layout], ill)
    anatomy = build_anatomy(patient, opacities, sample_implants(patient, ill))
    heights = (scan.z_mm[0] / patient.scale[2], scan.z_mm[-1] / patient.scale[2])
    if options.layout == "lidc_idri":
        count, dots = int(rng.choice(5, p=[0.04, 0.34, 0.3, 0.2, 0.12])), int(rng.poisson(1.0))
    else:
        share = 0.5 if options.layout == "dicom" else 0.2
        count, dots = int(rng.random() < share) * int(rng.integers(1, 4)), int(rng.random() < 0.3)
    findings = sample_nodules(anatomy, heights, count, dots, rng)
    if with_emboli:
        emboli = sample_emboli(anatomy, heights, strained, rng)
        findings = dataclasses.replace(findings, emboli=emboli)
    if options.field == "lung":
        scan = _of_one_lung(scan, patient, findings)
    prefix = {"dicom": "PHANTOM", "rsna_pe": "PHANTOM-RSNA", "lidc_idri": "PHANTOM-LIDC"}[
        options.layout
    ]
    entropy = ("phantom", *([options.layout] * (layout > 0)), str(options.seed), str(index))
    exam = Exam(
        anatomy=anatomy,
        scan=scan,
        findings=findings,
        vendor=vendor,
        position=position,
        mirrored=bool(mirrored),
        transfer_syntax=choose_transfer_syntax(vendor, rng),
        origin_mm=(*scan.first_voxel_mm, scan.z_mm[0] - round(float(rng.uniform(0, 600)), 1)),
        attributes=_study_attributes(
            patient, vendor, scan, entropy, f"{prefix}-{options.seed}-{index:04d}", index, rng
        ),
        entropy=entropy,
        poor_quality=poor_quality,
    )
    return exam, rng


def render_series(
    exam: Exam, reconstruction: str, number: int, rng: np.random.Generator
) -> tuple[Series, Rendering]:
    """Series `number` of an exam with the "soft" or the "sharp" kernel, and its rendering."""
    scan = dataclasses.replace(exam.scan, kernel=reconstruction)
    rendering = render_scan(exam.anatomy, scan, exam.findings, rng)
    kernels = exam.vendor.soft_kernels if reconstruction == "soft" else exam.vendor.sharp_kernels
    entropy = (*exam.entropy, reconstruction)
    series = Series(
        hu=rendering.hu,
        position_mm=exam.origin_mm,
        pixel_spacing_mm=scan.pixel_spacing_mm,
        slice_spacing_mm=scan.slice_spacing_mm,
        slice_thickness_mm=scan.slice_thickness_mm,
        outside=outside_field_of_view(scan),
        vendor=exam.vendor,
        transfer_syntax=exam.transfer_syntax,
        patient_position=exam.position,
        mirrored=exam.mirrored,
        attributes={
            **exam.attributes,
            "ConvolutionKernel": str(rng.choice(kernels)).split("\\"),
            "SeriesInstanceUID": series_uid(entropy),
            "SeriesNumber": number,
            "SeriesDescription": f"Chest {scan.slice_thickness_mm:g} {reconstruction}",
        },
        entropy=entropy,
    )
    return series, rendering


def sample_scan(
    patient: Patient,
    vendor: Vendor,
    options: Options,
    rng: np.random.Generator,
) -> Scan:
    """Slice positions, field of view, contrast and dose of a supine scan with the soft kernel."""
    thickness, spacing = vendor.collimations[int(rng.integers(len(vendor.collimations)))]
    if options.slice_spacing_mm:
        thickness = spacing = options.slice_spacing_mm
    base, apex = patient.chest_extent_mm
    count = int((apex - base) / spacing) + 1
    start = 0
    if options.num_slices and options.num_slices < count:
        # A part stays where the lungs are, as far as it fits there.
        low, high = (int((z - base) / spacing) for z in patient.lung_extent_mm)
        first, last = low, max(low, high - options.num_slices)
        if options.layout == "rsna_pe":
            # It holds the central arteries, or lies within them.
            arteries = (int((z * patient.scale[2] - base) / spacing) for z in CENTRAL_ARTERIES_Z)
            first, last = sorted((next(arteries), next(arteries) + 1 - options.num_slices))
        start = int(np.clip(rng.integers(first, last + 1), 0, count - options.num_slices))
        count = options.num_slices
    contrast = str(rng.choice(["none", "pulmonary", "venous"], p=CONTRAST_SHARES[options.layout]))
    # Many technicians leave a margin around the body, some leave the scanner's whole field.
    margin = float(np.clip(rng.lognormal(0.15, 0.13), 0.97, 1.6))
    field_of_view = float(np.clip(patient.body_width_mm * margin, 300, 500))
    centre = (float(rng.normal(0, 8)), float(rng.normal(4, 12)))
    if options.field != "body":
        field_of_view = FIELDS_MM[options.field] * patient.scale[0] * float(rng.uniform(1.02, 1.12))
        centre = (centre[0] / 2, centre[1] / 2)
    return Scan(
        image_size=options.image_size,
        field_of_view_mm=round(field_of_view),
        centre_mm=centre,
        z_mm=tuple(round(base + (start + i) * spacing, 3) for i in range(count)),
        slice_spacing_mm=spacing,
        slice_thickness_mm=thickness,
        contrast=contrast,
        bolus=float(rng.uniform(0.65, 1.15))
        if contrast == "pulmonary"
        else float(rng.uniform(0.7, 1.3)),
        kernel="soft",
        noise_hu=float(np.clip(rng.lognormal(2.6, 0.4), 6, 36)),
        rotation_degrees=float(rng.normal(0, 4)),
        circular=vendor.outside is not None,
        prone=False,
        flat_table=vendor.name in ("Philips", "TOSHIBA"),
        timing=float(rng.beta(1.2, 2.5)),
        sharpness=float(rng.uniform(0.75, 1.25)),
        correlation=float(np.clip(rng.normal(0.45, 0.1) * thickness / spacing, 0.2, 0.7)),
        breath_mm=float(rng.uniform(1, 4)) if rng.random() < 0.35 else 0.0,
        breath_slices=float(rng.uniform(14, 40)),
    )


def _of_one_lung(scan: Scan, patient: Patient, findings: Findings) -> Scan:
    """The scan, its field of view around the lung that has more of the nodules; the right one where
    both have as many."""
    more = sum(np.sign(nodule.centre[0]) for nodule in findings.nodules)
    x = (LUNG_X if more > 0 else -LUNG_X) * patient.scale[0]
    return dataclasses.replace(scan, centre_mm=(scan.centre_mm[0] + x, scan.centre_mm[1]))


def _study_attributes(
    patient: Patient,
    vendor: Vendor,
    scan: Scan,
    study: tuple[str, ...],
    patient_id: str,
    index: int,
    rng: np.random.Generator,
) -> dict[str, object]:
    """Patient, study and acquisition attributes, all made up from the seed."""
    year, month, day = (
        2008 + int(rng.integers(15)),
        int(rng.integers(1, 13)),
        int(rng.integers(1, 29)),
    )
    date = f"{year:04d}{month:02d}{day:02d}"
    clock = f"{int(rng.integers(7, 20)):02d}{int(rng.integers(60)):02d}{int(rng.integers(60)):02d}"
    attributes = {
        "PatientID": patient_id,
        "PatientName": f"SYNTHETIC^{index:04d}",
        "PatientSex": patient.sex,
        "EthnicGroup": patient.group,
        "PatientAge": f"{patient.age:03d}Y",
        "PatientBirthDate": f"{year - patient.age:04d}0101",
        "StudyInstanceUID": series_uid((*study, "study")),
        "FrameOfReferenceUID": series_uid((*study, "frame of reference")),
        "StudyID": str(int(rng.integers(1, 10000))),
        "StudyDate": date,
        "SeriesDate": date,
        "AcquisitionDate": date,
        "ContentDate": date,
        "StudyTime": clock,
        "SeriesTime": clock,
        "AcquisitionTime": clock,
        "ContentTime": clock,
        "AccessionNumber": f"{int(rng.integers(10**7)):08d}",
        "StudyDescription": "CT CHEST",
        "ReferringPhysicianName": "SYNTHETIC^REFERRER",
        "PositionReferenceIndicator": "",
        "InstitutionName": "SYNTHETIC INSTITUTION",
        "ManufacturerModelName": str(rng.choice(vendor.models)),
        "KVP": int(rng.choice(vendor.tube_voltages)),
        "XRayTubeCurrent": int(rng.integers(80, 400)),
        "ReconstructionDiameter": scan.field_of_view_mm,
        "AcquisitionNumber": 1,
    }
    if scan.contrast != "none":
        attributes["ContrastBolusAgent"] = str(
            rng.choice(["OMNIPAQUE 350", "Ultravist 370", "IV", "CONTRAST"])
        )
    return attributes
