"""Pseudonyms and the allow-list of fields."""

import dataclasses
import types

import pytest

from data_prep.privacy import pseudonyms
from data_prep.scan.headers import StackMarks

KEY = b"0123456789abcdef"


def test_pseudonyms_depend_on_key_and_kind():
    names = {
        pseudonyms.patient_pseudonym(KEY, "12"),
        pseudonyms.patient_pseudonym(b"fedcba9876543210", "12"),
        pseudonyms.series_pseudonym(KEY, "12", "", ""),
        pseudonyms.series_pseudonym(KEY, "1", "2", ""),
        pseudonyms.series_pseudonym(KEY, "", "12", ""),
        pseudonyms.private_digest(KEY, "12"),
        pseudonyms.shuffling_number(KEY, "12"),
    }
    assert len(names) == 7 and {len(name) for name in names} == {32}
    assert pseudonyms.patient_pseudonym(KEY, "12") == pseudonyms.patient_pseudonym(KEY, "12")


def test_key_is_made_once_and_for_the_owner_only(tmp_path):
    key = pseudonyms.make_key(tmp_path / "key")
    assert len(key) == 64 and pseudonyms.make_key(tmp_path / "key") == key
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert pseudonyms.make_key(tmp_path / "other") != key
    assert key.decode() not in pseudonyms.key_fingerprint(key)


def test_unusable_key_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such key file"):
        pseudonyms.read_key(tmp_path / "absent")
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(ValueError, match="at least 16 bytes, this one 6"):
        pseudonyms.read_key(tmp_path / "short")


@pytest.mark.parametrize(
    "name",
    [
        "SIEMENS", "Siemens Healthineers", "GE MEDICAL SYSTEMS", "Philips",
        "Philips Medical Systems", "TOSHIBA", "TOSHIBA_MEC", "Canon Medical Systems", "CANON_MEC",
        "Hitachi, Ltd.", "FUJIFILM Corporation", "UIH", "United Imaging Healthcare",
        "NeuSoft Medical Systems Co., Ltd.", "Marconi Medical Systems", "General Electric",
    ],
)  # fmt: skip
def test_known_manufacturers_keep_their_spelling(name):
    assert pseudonyms.public_manufacturer(name) == name


@pytest.mark.parametrize(
    "name", ["Doe^Jane", "SIEMENS Jane Doe", "GE 4711", "Medical Systems", "geneva", "Siemens é"]
)
def test_other_manufacturers_are_other(name):
    assert pseudonyms.public_manufacturer(name) == "other"
    assert pseudonyms.public_manufacturer("") == ""


def test_kernels_are_short_and_no_numbers():
    kernels = ("B30f", "STANDARD", "FC08-H", "Smooth (iDose 4)", "I31f 3", "YA", "", "B")
    assert [pseudonyms.public_kernel(kernel) for kernel in kernels] == list(kernels)
    assert pseudonyms.public_kernel("  I31f;3 ") == "I31f 3"
    for kernel in ("20010203", "2001-02-03", "MRN 4711001", "Soft, for Jane Doe", "B30f 12345"):
        assert pseudonyms.public_kernel(kernel) == "other"


def test_ethnic_groups_are_a_short_word_or_a_code():
    groups = ("", "Hispanic", "Asian - other", "3", "W", "group_a", "Group 12", "A2")
    assert [pseudonyms.public_ethnic_group(group) for group in groups] == list(groups)
    for group in (
        "31",
        "Jane Doe, Hill Street",
        "born in Springfield",
        "MRN 4711",
        "A 61-02-03",
        "_a",
        "B" * 17,
    ):
        assert pseudonyms.public_ethnic_group(group) == "other"


def test_only_the_allow_list_leaves_a_header():
    header = types.SimpleNamespace(
        manufacturer="GE, Inc.", kernel="B40f", marks=StackMarks(tube_voltage=120.0),
        contrast_agent="APPLIED", age=97,
        sex="F", ethnic_group="", quality_control_subject=False, patient_id="4711",
        series_instance_uid="1.2.3", study_date="20000101",
    )  # fmt: skip
    fields = pseudonyms.public_fields(header)
    assert fields == {
        "manufacturer": "GE, Inc.",
        "kernel": "B40f",
        "tube_voltage_kvp": 120.0,
        "contrast": True,
        "age": 90,
        "sex": "F",
        "ethnic_group": "",
        "synthetic": False,
    }


def test_secrets_do_not_show_in_a_repr():
    from data_prep.pipeline.notes import Conversion

    names = [field.name for field in dataclasses.fields(Conversion) if field.repr]
    assert "key" not in names and "windows" in names
