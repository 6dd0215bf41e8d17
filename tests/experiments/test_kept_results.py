"""The results that are kept in the repository: numbers only, and they draw the tables there."""

import json
import re
from pathlib import Path

import pytest

from experiments import objectives, recipe_choices, table2
from experiments.study import runner
from experiments.study.cells import Settings
from tests.helpers.training_runs import PROJECT

RESULTS = PROJECT / "experiments" / "results"
STUDIES = {"table2": table2, "recipe_choices": recipe_choices, "objectives": objectives}


def folders():
    return sorted(path.parent for path in RESULTS.glob("*/study.json"))


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_the_tables_follow_from_the_results(folder, tmp_path):
    name, study = next(one for one in STUDIES.items() if folder.name.startswith(one[0]))
    asked = Settings(Path(), tmp_path, "small", 0, 0, (), "test", kept=folder)
    drawn = study.draw(runner.recorded(asked))
    assert drawn == (folder / f"{name}.md").read_text()
    for table in folder.glob("*.csv"):
        assert (tmp_path / table.name).read_text() == table.read_text()


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: folder.name)
def test_they_are_small_and_hold_no_pseudonym_path_or_picture(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".json", ".md", ".csv"}
    for path in folder.rglob("*.json"):
        assert path.stat().st_size < 50_000
        if path.name == "study.json":
            continue
        content = json.loads(path.read_text())
        assert len(content.pop("dataset_fingerprint")) == 64
        text = json.dumps(content)
        # pseudonyms, paths, UIDs of DICOM
        assert not re.search(r"[0-9a-f]{16}|/(tmp|home|work)|\d\.\d+\.\d+\.\d+\.\d", text)
        assert all(isinstance(patient, int) for patient in content["volumes"]["patient"])
