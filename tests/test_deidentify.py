"""Pseudonyms and the allow-list of fields."""

import dataclasses
import types

import pytest

from data_prep import deidentify

KEY = b"0123456789abcdef"


def test_pseudonyms_depend_on_key_and_kind():
    names = {
        deidentify.patient_pseudonym(KEY, "12"),
        deidentify.patient_pseudonym(b"fedcba9876543210", "12"),
        deidentify.series_pseudonym(KEY, "12", "", ""),
        deidentify.series_pseudonym(KEY, "1", "2", ""),
        deidentify.series_pseudonym(KEY, "", "12", ""),
        deidentify.private_digest(KEY, "12"),
        deidentify.shuffling_number(KEY, "12"),
    }
    assert len(names) == 7 and {len(name) for name in names} == {32}
    assert deidentify.patient_pseudonym(KEY, "12") == deidentify.patient_pseudonym(KEY, "12")


def test_key_is_made_once_and_for_the_owner_only(tmp_path):
    key = deidentify.make_key(tmp_path / "key")
    assert len(key) == 64 and deidentify.make_key(tmp_path / "key") == key
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert deidentify.make_key(tmp_path / "other") != key
    assert key.decode() not in deidentify.key_fingerprint(key)


def test_unusable_key_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such key file"):
        deidentify.read_key(tmp_path / "absent")
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(ValueError, match="at least 16 bytes, this one 6"):
        deidentify.read_key(tmp_path / "short")


def test_text_is_limited_in_characters_and_length():
    assert deidentify.clean_text("  SIEMENS\n; DROP\t'x' ") == "SIEMENS DROP x"
    assert deidentify.clean_text("Müller^Hans=x@y") == "M ller Hans x y"
    assert len(deidentify.clean_text("a" * 500)) == 48


def test_only_the_allow_list_leaves_a_header():
    header = types.SimpleNamespace(
        manufacturer="GE, Inc.", kernel="B40f", kvp=120.0, contrast_agent="APPLIED", age=97, sex="F", ethnic_group="",
        quality_control_subject=False, patient_id="4711", series_instance_uid="1.2.3", study_date="20000101",
    )  # fmt: skip
    fields = deidentify.public_fields(header)
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
    from data_prep.conversion import Conversion

    names = [field.name for field in dataclasses.fields(Conversion) if field.repr]
    assert "key" not in names and "windows" in names
