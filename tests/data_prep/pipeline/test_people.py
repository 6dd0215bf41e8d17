"""One patient in a dataset: copies under other names, growth across versions of the rules, labels
whose key fits several scans."""

import shutil

import nibabel
import numpy as np
import pytest

from data_prep.dataset.reader import Dataset
from data_prep.dataset.schema import notes_on_rules, read_preparation, write_preparation
from data_prep.labels import staging
from data_prep.labels.lookup import LabelSources
from data_prep.pipeline.accounting import dataset_text
from data_prep.pipeline.options import Directories, Options
from data_prep.pipeline.prepare import prepare
from data_prep.scan.archives import list_sources
from data_prep.scan.headers import read_header
from data_prep.scan.loading import header_reader, plan_exams
from data_prep.scan.rules import VERSION, Rules
from data_prep.scan.series import slice_headers
from data_prep.scan.volume import load_volume
from data_prep.system.errors import InputError
from tests.helpers import dicom_files
from tests.helpers.dicom_files import thorax, uid

OPTIONS = Options(image_size=16, splits=(1.0, 0.0, 0.0))


def add_scan(folder, patient: str, study: int, seed: int, *, series: int = 1, edit=None, **options):
    hu = options.pop("hu", thorax(20, seed=seed))
    datasets = dicom_files.slices(hu, study=study, series=series, patient=patient, **options)
    for number, ds in enumerate(datasets):
        if edit:
            edit(ds, number)
    return dicom_files.write(folder / f"{patient}-{study}-{series}", datasets)


def run(folder, key_file, options=OPTIONS, **more):
    places = Directories(folder / "scans", folder / "dataset", folder / "audit")
    return places, prepare(options, places, num_workers=1, pseudonym_key_file=key_file, **more)[0]


def patients(places) -> list[str]:
    return [row["patient_id"] for row in Dataset.open(places.output_dir).volumes()]


# ---- copies --------------------------------------------------------------------------------------


def test_the_same_pixels_under_two_patients_are_one_patient(tmp_path, key_file):
    """All UIDs were replaced: a whole copy, and a copy turned by 180 degrees and without its first
    slices."""
    scans = tmp_path / "scans"
    add_scan(scans, "patient-1", 1, seed=1)
    add_scan(scans, "ANON42", 2, seed=1)
    turned = {"orientation": (-1, 0, 0, 0, -1, 0), "origin": (0.5, 10.5, -290.0)}
    add_scan(scans, "B7", 3, seed=2, hu=thorax(23, seed=2)[3:, ::-1, ::-1], **turned)
    add_scan(scans, "C8", 4, seed=2, hu=thorax(23, seed=2))
    add_scan(scans, "other", 5, seed=5)
    places, preparation = run(tmp_path, key_file)
    assert len(patients(places)) == 5 and len(set(patients(places))) == 3
    assert preparation["counts"]["patients_joined"] == 2


def test_a_series_whose_slices_say_different_things_of_their_patient(tmp_path, key_file):
    """Study and patient are missing in a half; a copy under another ID; the patient's row of labels
    and attributes is found under any ID. One volume, one patient, and that is said."""

    def half(ds, number):
        if number < 10:
            ds.PatientID, ds.StudyInstanceUID = "", ""

    scans = tmp_path / "scans"
    add_scan(scans, "patient-1", 1, seed=1, edit=half)
    add_scan(scans, "ANON42", 1, seed=1)
    (tmp_path / "attributes.csv").write_text("PatientID,age\npatient-1,44\n")
    (tmp_path / "labels.csv").write_text("PatientID,pe\npatient-1,1\n")
    sources = LabelSources(
        labels_csv=(tmp_path / "labels.csv",), attributes_csv=tmp_path / "attributes.csv"
    )
    places, preparation = run(tmp_path, key_file, sources=sources)
    [row] = Dataset.open(places.output_dir).volumes()
    assert row["num_slices"] == 20 and row["age"] == 44
    assert "patient_ids_joined" in row["notes"].split()
    assert preparation["counts"]["labels"]["pe"] == {"1": 1, "missing": 0}
    text = dataset_text(preparation, True, places.output_dir, places.audit_dir)
    assert "1 patients whose scans carry several Patient IDs" in text


# ---- growth --------------------------------------------------------------------------------------


def as_rules_1(directory):
    """Makes a dataset look as if an earlier program had written it."""
    preparation = read_preparation(directory)
    preparation.pop("rules", None)
    write_preparation(directory, preparation)


def test_a_grown_archive_keeps_its_pseudonyms_and_counts_both_rules(tmp_path, key_file):
    scans = tmp_path / "scans"
    add_scan(scans, "patient-1", 1, seed=1)
    add_scan(scans, "", 2, seed=2)
    places, _ = run(tmp_path, key_file)
    as_rules_1(places.output_dir)
    before = Dataset.open(places.output_dir).volumes()
    add_scan(scans, "PATIENT-1 ", 3, seed=3)
    add_scan(scans, "Z", 2, seed=4, series=2)  # now the study has an ID
    add_scan(scans, "Z", 5, seed=5)
    _, preparation = run(tmp_path, key_file)
    after = Dataset.open(places.output_dir).volumes()
    assert after[: len(before)] == before and len(after) == 4
    assert set(patients(places)) == {row["patient_id"] for row in before}
    assert preparation["rules"] == {"version": VERSION, "volumes": {"1": 2, str(VERSION): 2}}
    text = dataset_text(preparation, True, places.output_dir, places.audit_dir)
    assert "2 volumes were read by version 1 of the rules and stay as they are" in text
    [note] = notes_on_rules({"options": {}}, preparation)  # a model of before, these data
    assert "version 1 of the rules" in note and "by version 1 and 2" in note
    assert notes_on_rules(preparation, preparation) == []


def test_patients_whom_pixels_told_stay_one_patient_as_the_archive_grows(tmp_path, key_file):
    scans = tmp_path / "scans"
    add_scan(scans, "patient-1", 1, seed=1)
    places, _ = run(tmp_path, key_file)
    [first] = patients(places)
    add_scan(scans, "ANON42", 2, seed=1)
    run(tmp_path, key_file)
    add_scan(scans, "ANON42", 3, seed=3)
    _, preparation = run(tmp_path, key_file)
    assert patients(places) == [first] * 3
    assert preparation["counts"]["patients_joined"] == 1


def test_classes_of_an_earlier_program_are_not_mixed_with_others(tmp_path, key_file):
    """Versions before 2 took NaN for a class."""
    add_scan(tmp_path / "scans", "a", 1, seed=1)
    table = tmp_path / "labels.csv"
    table.write_text("PatientID,pe\na,1\nb,0\nc,NaN\n")
    places, preparation = run(tmp_path, key_file, sources=LabelSources(labels_csv=(table,)))
    preparation["labels"]["pe"]["classes"] = ["0", "1", "NaN"]
    preparation.pop("rules")
    write_preparation(places.output_dir, preparation)
    add_scan(tmp_path / "scans", "b", 2, seed=2)
    with pytest.raises(InputError, match=r"label pe has the classes 0, 1, NaN, and .* rules 0, 1"):
        run(tmp_path, key_file, sources=LabelSources(labels_csv=(table,)))


def test_another_dataset_knows_a_patient_under_another_spelling(tmp_path, key_file):
    add_scan(tmp_path / "a" / "scans", "patient-1", 1, seed=1)
    first, _ = run(tmp_path / "a", key_file)
    add_scan(tmp_path / "b" / "scans", "Patient-1^^^HOSPITAL", 2, seed=2)
    second, _ = run(tmp_path / "b", key_file, same_splits_as=(first.output_dir,))
    assert patients(first) == patients(second)


def test_a_dataset_of_a_newer_program_does_not_grow(tmp_path, key_file):
    add_scan(tmp_path / "scans", "patient-1", 1, seed=1)
    places, preparation = run(tmp_path, key_file)
    preparation["rules"] = {"version": VERSION + 1, "volumes": {str(VERSION + 1): 1}}
    write_preparation(places.output_dir, preparation)
    add_scan(tmp_path / "scans", "patient-2", 2, seed=2)
    with pytest.raises(InputError, match=rf"by version {VERSION + 1} of the rules, this program"):
        run(tmp_path, key_file)


def test_growth_that_would_join_patients_of_two_splits_is_refused(tmp_path, key_file):
    scans, options = tmp_path / "scans", Options(image_size=16, splits=(0.5, 0.0, 0.5))
    add_scan(scans, "a", 1, seed=1)
    add_scan(scans, "b", 2, seed=2)
    places, _ = run(tmp_path, key_file, options)
    before = Dataset.open(places.output_dir).volumes()
    add_scan(scans, "b", 1, seed=3, series=2)  # the study of a
    with pytest.raises(InputError, match=r"one patient.* different splits") as error:
        run(tmp_path, key_file, options)
    assert all(row["patient_id"] in str(error.value) for row in before)
    assert Dataset.open(places.output_dir).volumes() == before


# ---- labels --------------------------------------------------------------------------------------


def test_an_instance_uid_of_two_slices_labels_none(tmp_path):
    def twice(ds, number):
        ds.SOPInstanceUID = uid(1, 1, min(number + 1, 19))

    folder = add_scan(tmp_path / "scans", "patient-1", 1, seed=1, edit=twice)
    shutil.copy(folder / "IM0003", folder / "copy")  # a copy is no other slice
    table = tmp_path / "labels.csv"
    rows = [f"{uid(1, 1, number)},{number % 2}\n" for number in range(1, 20)]
    table.write_text("SOPInstanceUID,pe\n" + "".join(rows))
    labels = staging.stage(LabelSources(labels_csv=(table,)), folder, tmp_path / "staged")
    headers = [read_header(folder, source) for source in list_sources(folder)]
    counts = staging.match(labels, headers)
    assert counts["label_rows_of_several_scans"] == {"pe": 1}
    [[candidate]] = plan_exams(headers, Rules()).exams
    classes = [
        row["pe"] for row in labels.labels_of(load_volume(folder, candidate, Rules())).slices
    ]
    assert classes == [*((number + 1) % 2 for number in range(18)), None, None]


def test_the_instance_uid_of_a_multi_frame_file_labels_none(tmp_path):
    ds = dicom_files.enhanced(thorax(20), intercepts=[-1024] * 20, order=list(range(20)))
    folder = dicom_files.write(tmp_path / "scans", [ds])
    table = tmp_path / "labels.csv"
    table.write_text(f"SOPInstanceUID,pe\n{ds.SOPInstanceUID},1\n")
    labels = staging.stage(LabelSources(labels_csv=(table,)), folder, tmp_path / "staged")
    headers = slice_headers(read_header(folder, next(list_sources(folder))))
    counts = staging.match(labels, headers)
    assert counts["label_rows_without_match"] == {"pe": 0}
    assert counts["label_rows_of_several_scans"] == {"pe": 1}


def test_a_file_name_of_two_scans_labels_none(tmp_path):
    affine = np.diag([-5.0, -5.0, 2.5, 1])
    for number, name in enumerate(("a/scan", "b/scan", "b/other")):
        path = tmp_path / "scans" / f"{name}.nii"
        path.parent.mkdir(parents=True, exist_ok=True)
        hu = thorax(20, seed=number).transpose(2, 1, 0)
        nibabel.save(nibabel.Nifti1Image(hu, affine), path)
    table = tmp_path / "labels.csv"
    table.write_text("VolumeName,pe\nscan.nii,1\nother.nii,0\n")
    sources = LabelSources("nifti", labels_csv=(table,))
    labels = staging.stage(sources, tmp_path / "scans", tmp_path / "staged")
    read = header_reader("nifti")
    headers = [read(tmp_path / "scans", s) for s in list_sources(tmp_path / "scans")]
    assert staging.match(labels, headers)["label_rows_of_several_scans"] == {"pe": 1}
