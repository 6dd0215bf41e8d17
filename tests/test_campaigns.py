"""Short versions of the campaigns under tests/campaigns, and what they found."""

from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest

from data_prep import decoders
from tests import dicom_files
from tests.campaigns import mutated_dicom

JPEG_LS = "1.2.840.10008.1.2.4.80"
RLE = "1.2.840.10008.1.2.5"


@pytest.fixture(scope="module")
def small_files() -> list[bytes]:
    plain, compressed = dicom_files.slices(dicom_files.thorax(2))
    dicom_files.compress(compressed, JPEG_LS, imagecodecs.jpegls_encode)
    return [dicom_files.to_bytes(plain), dicom_files.to_bytes(compressed)]


def test_mutants_of_generated_files(small_files):
    outcomes = mutated_dicom.run(small_files, 240, seed=0)
    assert mutated_dicom.defects(outcomes) == {}
    assert sum(map(len, outcomes.values())) == 240 and len(outcomes["equal to pydicom"]) > 20 and len(outcomes) > 5


def test_mutants_of_real_files(real_data):
    outcomes = mutated_dicom.run(mutated_dicom.load_files(real_data / "transfer_syntaxes"), 120, seed=0)
    assert mutated_dicom.defects(outcomes) == {}


def test_a_mutant_is_the_same_every_time(small_files):
    assert all(mutated_dicom.mutate(small_files, 3, n) == mutated_dicom.mutate(small_files, 3, n) for n in range(24))


@pytest.mark.parametrize("syntax, encode, sof", [
    (JPEG_LS, imagecodecs.jpegls_encode, b"\xff\xf7"),
    ("1.2.840.10008.1.2.4.70", imagecodecs.ljpeg_encode, b"\xff\xc3"),
])  # fmt: skip
def test_a_frame_that_names_a_huge_matrix_is_refused_before_it_is_decoded(tmp_path, monkeypatch, syntax, encode, sof):
    (dataset,) = dicom_files.slices(dicom_files.thorax(1))
    dicom_files.compress(dataset, syntax, encode)
    data = bytearray(dicom_files.to_bytes(dataset))
    at = data.index(sof, data.index(b"\xff\xd8"))
    data[at + 5 : at + 9] = np.array([30000, 30000], ">u2").tobytes()
    (tmp_path / "mutant").write_bytes(data)
    for name in ("jpegls_decode", "jpeg8_decode"):
        monkeypatch.setattr(imagecodecs, name, lambda frame: pytest.fail("decoded"))
    assert mutated_dicom.read_mutant(tmp_path, "frame_size") in (
        "rejected undecodable_pixels",
        "pixels undecodable_pixels",
    )


@pytest.mark.parametrize(
    "header", [(2, 64, 8_401_538), (2, 0, 64), (3, 64, 70), (1, 64), (15, *[2**32 - 1] * 15), (2, 70, 70)]
)
def test_a_run_length_frame_that_points_outside_itself_is_not_decoded(header, monkeypatch):
    """The decoder would read there, which ends the process."""
    monkeypatch.setattr(imagecodecs, "dicomrle_decode", lambda *arguments: pytest.fail("decoded"))
    frame = np.array([*header, *[0] * (16 - len(header))], "<u4").tobytes() + bytes(100)
    runner = SimpleNamespace(transfer_syntax=RLE, rows=4, columns=4, bits_allocated=16)
    for damaged in (frame, frame[:40]):
        with pytest.raises(ValueError, match=r"segments of the frame|ends within its header"):
            decoders.decode_frame(damaged, runner)


def test_a_high_bit_that_is_not_the_last_stored_bit_is_refused(tmp_path):
    (dataset,) = dicom_files.slices(dicom_files.thorax(1))
    dataset.BitsStored, dataset.HighBit = 13, 15
    (tmp_path / "mutant").write_bytes(dicom_files.to_bytes(dataset))
    assert mutated_dicom.read_mutant(tmp_path, "absurd_value") == "pixels undecodable_pixels"


@pytest.mark.parametrize("head", [b"OW\0\x40", b"NW\0\x40", b"OW\x20\0"])
def test_a_damaged_vr_of_the_pixels_does_not_shift_the_image(tmp_path, head):
    (dataset,) = dicom_files.slices(dicom_files.thorax(1))
    data = bytearray(dicom_files.to_bytes(dataset))
    at = data.index(b"\xe0\x7f\x10\0OW\0\0")
    data[at + 4 : at + 8] = head
    (tmp_path / "mutant").write_bytes(data)
    assert mutated_dicom.read_mutant(tmp_path, "start_of_pixels") in (
        "pixels undecodable_pixels",
        "pixels truncated_pixel_data",
    )
