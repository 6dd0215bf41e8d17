"""Who is the same patient: IDs in any character set, spellings, copies, IDs that are missing in
part."""

import pytest

from data_prep.scan.archives import list_sources
from data_prep.scan.headers import read_header
from data_prep.scan.loading import ExamPlan, plan_exams
from data_prep.scan.patients import People, identities, spelling_of, spellings_like
from data_prep.scan.rules import Rules
from tests.helpers import dicom_files
from tests.helpers.dicom_files import thorax, uid

HU = thorax(20, size=32)


def scan(patient="patient-1", study=1, *, series=1, edit=None):
    datasets = dicom_files.slices(HU, study=study, series=series, patient=patient)
    for number, ds in enumerate(datasets):
        if edit:
            edit(ds, number)
    return datasets


def read(folder, *scans):
    for datasets in scans:
        dicom_files.write(folder, datasets)
    return [read_header(folder, source) for source in list_sources(folder)]


def written(folder, *scans) -> ExamPlan:
    return plan_exams(read(folder, *scans), Rules())


def written_with_ids(folder, *scans) -> ExamPlan:
    """Writes a scan for each (bytes of the Patient ID, character sets, study)."""
    folder.mkdir(exist_ok=True)
    for number, (raw, character_set, study) in enumerate(scans):
        padded = raw + b" " * (len(raw) % 2)
        for i, ds in enumerate(scan("=" * len(padded), study)):
            if character_set:
                ds.SpecificCharacterSet = character_set
            content = dicom_files.to_bytes(ds)
            assert content.count(b"=" * len(padded)) == 1
            (folder / f"{number}-{i}").write_bytes(content.replace(b"=" * len(padded), padded))
    return plan_exams([read_header(folder, source) for source in list_sources(folder)], Rules())


def patients(plan: ExamPlan) -> list[str]:
    return [exam[0].patient_key for exam in plan.exams]


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("4711^^^HOSPITAL", "4711", True),
        ("4711^4^M11^ADT1^MR", "4711", True),
        ("LUNG 0001", "lung0001", True),
        ("ANON^001", "ANON^002", False),
        ("Doe^Jane^^Dr", "Doe^John^^Dr", False),
        ("P 1 11", "P 11 1", False),
        ("12", "012", False),
    ],
)
def test_spellings(one, other, alike):
    assert (spelling_of(one) == spelling_of(other)) is alike
    assert all(spelling_of(like) == spelling_of(one) for like in spellings_like(one))


# ---- character sets ------------------------------------------------------------------------------


def test_one_patient_in_two_character_sets(tmp_path):
    """Kanji behind escapes in one study, the same name in UTF-8 in another one."""
    kanji = "患者-4711"
    escaped = kanji.encode("iso2022_jp")
    assert b"\x1b" in escaped
    plan = written_with_ids(
        tmp_path,
        (escaped, ["", "ISO 2022 IR 87"], 1),
        (kanji.encode(), ["ISO_IR 192"], 2),
        ("환자-1".encode("euc_kr").join([b"\x1b$)C", b""]), ["", "ISO 2022 IR 149"], 3),
    )
    assert sorted(patients(plan)) == sorted([kanji, kanji, "환자-1"])


def test_a_byte_5c_within_a_character_cuts_nothing(tmp_path):
    """Two patients whose IDs differ behind a character with the second byte 5C."""
    plan = written_with_ids(
        tmp_path,
        ("乗-1".encode("gb18030"), ["GB18030"], 1),
        ("乗-2".encode("gb18030"), ["GB18030"], 2),
        ("表-3".encode("shift_jis"), ["ISO_IR 13"], 3),
    )
    assert sorted(patients(plan)) == ["乗-1", "乗-2", "表-3"]


def test_keys_by_which_older_datasets_know_a_patient(tmp_path):
    """Without the character set, with escapes taken for damage, or cut at a byte 5C."""
    ids = [
        ("Иван".encode("iso8859_5"), ["ISO_IR 144"], 1),
        ("患者".encode("iso2022_jp"), ["", "ISO 2022 IR 87"], 2),
        ("患者".encode("iso2022_jp"), ["", "ISO 2022 IR 87"], 3),
        ("乗-1".encode("gb18030"), ["GB18030"], 4),
        (b"plain", [], 5),
    ]
    plan = written_with_ids(tmp_path, *ids)
    people = People()
    for exam in plan.exams:
        people.add(identities(exam[0].headers))
    patients = people.resolve()
    assert not patients.key_of
    assert patients.keys_of == {
        "Иван": ("¸ÒÐÝ", "Иван"),
        "患者": (f"study:{uid(2)}", f"study:{uid(3)}", "患者"),
        "乗-1": ("\x81", "乗-1"),
    }


# ---- missing in part -----------------------------------------------------------------------------


def test_an_id_that_is_missing_in_one_slice_of_a_series(tmp_path):
    def edit(ds, number):
        if number == 9:
            del ds.PatientID

    plan = written(tmp_path, scan(edit=edit))
    [[candidate]] = plan.exams
    assert candidate.patient_key == "patient-1" and len(candidate.headers) == 20


def test_an_id_that_is_missing_in_one_series_of_a_study(tmp_path):
    def soft(ds, number):
        ds.PatientID, ds.SliceThickness = "", "3"

    plan = written(tmp_path, scan(), scan(series=2, edit=soft))
    [[thin, thick]] = plan.exams
    assert {thin.patient_key, thick.patient_key} == {"patient-1"}


def test_a_study_that_is_missing_in_half_of_a_series(tmp_path):
    def edit(ds, number):
        if number >= 10:
            del ds.StudyInstanceUID
            ds.PatientID = ""

    plan = written(tmp_path, scan(edit=edit))
    [[candidate]] = plan.exams
    assert candidate.patient_key == "patient-1" and len(candidate.headers) == 20


def test_images_without_patient_and_study_join_nobody(tmp_path):
    def edit(ds, number):
        ds.PatientID, ds.StudyInstanceUID = "", ""

    scans = [scan(name, study, edit=None) for name, study in (("a", 1), ("b", 2))]
    strays = [scan("", study, edit=edit)[:3] for study in (3, 4)]
    plan = written(tmp_path, *scans, *strays)
    assert sorted(patients(plan)) == ["a", "b"]


# ---- one patient under two IDs -------------------------------------------------------------------


@pytest.mark.parametrize(
    "other", ["PATIENT-1", "patient - 1", "patient-1^^^HOSPITAL", "ｐａｔｉｅｎｔ－１"]
)
def test_spellings_of_one_id_are_one_patient(tmp_path, other):
    def utf8(ds, number):
        ds.SpecificCharacterSet = "ISO_IR 192"

    plan = written(tmp_path, scan(), scan(other, study=2, edit=utf8))
    assert len(plan.exams) == 2 and len(set(patients(plan))) == 1


def test_instances_whose_study_and_series_were_renamed_tell_the_patient(tmp_path):
    def original(ds, number):
        ds.SOPInstanceUID = uid(1, 1, number + 1)

    plan = written(tmp_path, scan(), scan("ANON42", study=9, edit=original))
    assert len(plan.exams) == 2 and len(set(patients(plan))) == 1


def test_a_uid_that_many_ids_share_names_nobody(tmp_path):
    """A de-identification that gave all studies one UID: each ID is a patient, and that is said."""
    found = {}
    for number in range(6):
        found |= identities(read(tmp_path / str(number), scan(f"id{number}", study=7)[:1]))
    people = People()
    people.add(found)
    patients = people.resolve()
    assert not patients.key_of and patients.num_placeholders == 3  # study, series, instance


def test_uids_that_a_man_and_a_woman_share_join_nobody(tmp_path):
    """Two people under one Study and one Series UID: two volumes, as their IDs say."""

    def man(ds, number):
        ds.PatientSex = "M"

    plan = written(tmp_path, scan("a"), scan("b", edit=man))
    assert sorted(patients(plan)) == ["a", "b"]
    assert [len(exam[0].headers) for exam in plan.exams] == [20, 20]


def test_patients_that_earlier_runs_joined_stay_joined(tmp_path):
    people = People(known=[("a", "b")])
    people.add(identities(read(tmp_path, scan("b")[:1])))
    patients = people.resolve()
    assert not patients.key_of and patients.keys_of == {"b": ("a", "b")}
