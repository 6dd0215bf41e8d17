"""A model's page: the cohort as counts, the training curve, and the published series that the model
has read, by which others find what they share with it."""

import json
import types
import zipfile

import pytest
from absl import flags

from ctssl_jax import overlap as door
from ctssl_jax.release import model_card, model_page, public_series
from ctssl_jax.release.public_series import Published
from data_prep.privacy import pseudonyms
from data_prep.system.errors import InputError
from data_prep.system.files import file_sha256

KEY = b"a key of 32 characters.........."
PUBLISHED = [Published(f"P-{n}", f"1.2.{n}", f"1.2.{n}.{s}") for n in range(1, 7) for s in (2, 1)]


def trained(key=KEY):
    """A run and its dataset: series 1.2.N.1 of patients 1 to 4, the last two for validation, that
    of patient 2 as one of several stacks; and a private scan of a patient of the same ID."""
    rows = {"train": [], "validation": []}
    for number in range(1, 5):
        patient, study = f"P-{number}", f"1.2.{number}"
        series = f"1.2.{number}.1" + "#kernel=B30f" * (number == 2)
        rows["train" if number < 3 else "validation"].append((patient, study, series))
    rows["train"].append(("P-5", "9.9.9", "9.9.9.1"))
    volumes = {
        split: [
            {
                "volume_id": pseudonyms.series_pseudonym(key, *one),
                "exam_id": pseudonyms.exam_id(key, *one[:2]),
                "patient_id": pseudonyms.patient_pseudonym(key, one[0]),
            }
            for one in all_of_them
        ]
        for split, all_of_them in rows.items()
    }
    patients = {split: [row["patient_id"] for row in volumes[split]] for split in volumes}
    del patients["validation"][-1]  # never read
    preparation = {"key_fingerprint": pseudonyms.key_fingerprint(key)}
    dataset = types.SimpleNamespace(preparation=preparation, volumes=volumes.__getitem__)
    return types.SimpleNamespace(patients=patients), dataset


def test_published_series_that_were_read_are_listed_and_no_others():
    run, dataset = trained()
    listed = public_series.trained_on(run, dataset, PUBLISHED, KEY)
    assert listed == [
        ("1.2.1.1", "train"),
        ("1.2.2.1", "train"),  # a stack of one of these
        ("1.2.2.2", "train"),
        ("1.2.3.1", "validation"),
    ]
    text = public_series.table(listed)
    assert text.splitlines()[:2] == ["series_instance_uid,split", "1.2.1.1,train"]
    assert "9.9.9" not in text and not any(
        row[name] in text for row in dataset.volumes("train") for name in row
    )
    assert public_series.trained_on(run, dataset, [], KEY) == []
    with pytest.raises(InputError, match="is not the key of the dataset's pseudonyms; give the"):
        public_series.trained_on(run, dataset, PUBLISHED, KEY + b"!")


def test_tables_of_collections_and_lists_of_users(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("\ufeffSeries UID,Collection,Subject ID,Study UID\n1.2.3, C ,P-1,1.2\n")
    assert public_series.read_published(table) == [Published("P-1", "1.2", "1.2.3")]
    assert public_series.read_series(table) == ["1.2.3"]
    table.write_text("# mine\n1.2.3\n 1.2.4 \n69d8f0dbf511\n")
    assert public_series.read_series(table) == ["1.2.3", "1.2.4", "69d8f0dbf511"]
    with pytest.raises(InputError, match="has no column of the patient"):
        public_series.read_published(table)
    for content, message in (
        (b"none\n", "has no Series Instance UID"),
        (b"\xff\xfe\x00", "no.*text"),
    ):
        table.write_bytes(content)
        with pytest.raises(InputError, match=message):
            public_series.read_series(table)
    with pytest.raises(InputError, match=r"cannot be read .*give a CSV file"):
        public_series.read_series(tmp_path / "absent.csv")


@pytest.fixture
def model(tmp_path):
    """A folder of an export, without weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / public_series.FILE).write_text(
        public_series.table([("1.2.1.1", "train"), ("1.2.3.1", "validation")])
    )
    listed = folder / public_series.FILE
    facts = {"sha256": file_sha256(listed), "bytes": listed.stat().st_size}
    manifest = {
        "format_version": 1,
        "architecture": "VQVAE",
        "model": {},
        "preprocessing": {"windows": [[50, 350]]},
        "training": {"config": {}, "checkpoint_step": 1, "task": "rotation"},
        "data": {"splits": {}},
        "files": {listed.name: facts},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def values_of(**values):
    """Flag values, as the command line gives them."""
    flag_values = flags.FlagValues()
    for name, value in values.items():
        flags.DEFINE_string(name, str(value), "", flag_values=flag_values)
    flag_values.mark_as_parsed()
    return flag_values


def test_overlap_with_a_list_of_ones_own(model, tmp_path, capsys):
    own = tmp_path / "own.txt"
    own.write_text("1.2.1.1\n1.2.9\n1.2.3.1\n")
    packed = tmp_path / "model.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in model.iterdir():
            archive.write(path, f"model/{path.name}")
    for name in (model, packed):
        door.start(values_of(model=name, series=own))
        assert capsys.readouterr().out.splitlines()[:3] == [
            "train        1.2.1.1",
            "validation   1.2.3.1",
            "of 3 series the model was trained on 1, and 1 chose its checkpoint",
        ]
    (model / public_series.FILE).write_text("series_instance_uid,split\n")
    with pytest.raises(InputError, match=r"public_series\.csv is missing or not what was exported"):
        public_series.overlap(model, ["1.2.1.1"])
    manifest = json.loads((model / "manifest.json").read_text()) | {"files": {}}
    (model / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="does not say on which published series it was trained"):
        public_series.overlap(model, ["1.2.1.1"])
    with pytest.raises(InputError, match=r"has no manifest\.json; give a folder or zip file"):
        public_series.overlap(tmp_path, ["1.2.1.1"])


def test_small_counts_of_people_are_not_told():
    assert model_page._told("4") == model_page._told("3 volumes") == "fewer than 5"
    assert model_page._told("61.0 +/- 3.1 years (of 2 patients)") == "fewer than 5"
    for value in ("5", "12 volumes", "61.0 +/- 3.1 years (of 20 patients)", "not recorded"):
        assert model_page._told(value) == value


def test_a_curve_on_the_page(tmp_path):
    curves = {
        "score": "masked_mse",
        "loss": [[step, 1 / step] for step in range(10, 1000, 10)],
        "validation": [[step, 2 / step] for step in range(100, 2000, 100)],
    }
    manifest = {"page": {"curve": curves}, "training": {"checkpoint_step": 700}}
    lines = model_card._curve(manifest).splitlines()
    assert "(training.png)" in lines[2] and lines[4] == "| step | masked_mse on validation slices |"
    assert "| 700 (this model) | 0.002857 |" in lines and lines[-1] == "| 1,900 | 0.001053 |"
    assert len(lines) < 18
    for name in ("a.png", "b.png"):
        model_page.draw_curve(tmp_path / name, curves, 700, "rotation")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    curves["validation"] = []
    assert "|" not in model_card._curve(manifest)
    model_page.draw_curve(tmp_path / "a.png", curves, 700, "rotation")
    manifest["page"]["curve"] = {}
    assert model_card._curve(manifest) == ""
