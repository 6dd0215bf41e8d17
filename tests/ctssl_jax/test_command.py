"""`ctssl`: one name for every command, recipes by name."""

import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
from absl import flags

from ctssl_jax import __main__ as ctssl
from ctssl_jax import train
from ctssl_jax.training import recipe_files, recipe_pages
from ctssl_jax.training.fields import FIELDS
from data_prep.system.errors import InputError
from data_prep.system.extras import pip_install
from tests.helpers.training_runs import PROJECT


def run(*arguments: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ctssl_jax", *arguments], cwd=cwd, capture_output=True, text=True
    )


def test_every_door_and_study_is_a_command(capsys):
    assert ctssl.main(["--help"]) == 0
    # else a process that goes on ends without a word at the next broken pipe
    assert signal.getsignal(signal.SIGPIPE) == signal.SIG_IGN
    shown = capsys.readouterr().out
    for folder in ("data_prep", "ctssl_jax", "experiments"):
        for path in (PROJECT / folder).glob("[a-z]*.py"):
            assert f"  {path.stem} " in shown
            assert ctssl.summary(path).endswith((".", "`train`")), f"{path}: say what it does"


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "bash"], ["recipes", "--help"]])
def test_a_reader_that_goes_away_is_no_error(arguments):
    command = [sys.executable, "-m", "ctssl_jax", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=PROJECT)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == -signal.SIGPIPE
    process.stderr.close()


def test_every_command_names_what_comes_next():
    """By `suggest`, in the door or in the study's file to which it leaves its work."""
    for named in ctssl.commands().values():
        for name, (_, path) in named.items():
            text = path.read_text()
            assert any(word in text for word in ("suggest", "curves.main(", "next:   ")), name
    for name in ("list", "masked_region"):
        done = run("recipes", *([] if name == "list" else [name]))
        assert done.returncode == 0 and "next:" not in done.stdout  # it may go to a file
        assert done.stderr.startswith("next:        ctssl ") and done.stderr.count("\n") == 1


def test_a_command_runs_as_its_module_does():
    by_name = run("train", "--help")
    assert by_name.returncode == 0 and "--[no]set_aside_damaged" in by_name.stdout
    refused = run("evaluate", "--no_such_flag=1")
    assert refused.returncode == 2 and "no_such_flag" in refused.stderr
    assert run("import-torch", "--help").returncode == 0


def test_an_unknown_command_is_one_line(capsys):
    assert ctssl.main(["trian"]) == 2
    assert capsys.readouterr().err == "error: no command 'trian'; ctssl --help lists them\n"


def test_completion_names_commands_and_recipes(capsys):
    assert ctssl.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert "evaluate" in script and "next_slice" in script

    def completed(*words: str) -> list[str]:
        given = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _ctssl"
        program = f'{script}\n{given}; echo "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", program], text=True, capture_output=True, check=True)
        return done.stdout.split()

    assert completed("ctssl", "eval") == ["evaluate"]
    assert completed("ctssl", "train", "--config", "=", "rot") == ["rotation"]
    assert completed("ctssl", "train", "--config", "=") == recipe_files.recipe_names()


def test_help_of_a_study_shows_the_flags_that_it_shares():
    shown = run("table2", "--help")
    assert shown.returncode == 0
    for flag in ("--[no]cross", "--dataset", "--cells", "--override"):
        assert f"  {flag}\n" in shown.stdout


@pytest.mark.parametrize("name", recipe_files.recipe_names())
def test_a_recipe_is_listed_with_every_field(name):
    assert f"\n{name}\n" in f"\n{recipe_pages.list_recipes()}"
    page = recipe_pages.describe(name, "small")
    for field in recipe_pages.flat(recipe_pages.to_json(recipe_files.load_recipe(name, "small"))):
        assert f"  {field} = " in page and FIELDS[field].meaning.split()[0] in page


def parse(*arguments: str) -> flags.FlagValues:
    values = flags.FlagValues()
    recipe_files.define_flag(help="", flag_values=values)
    argv, sys.argv = sys.argv, ["train", *arguments]
    try:
        values(sys.argv)
    finally:
        sys.argv = argv
    return values


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ((), r"^give --config=RECIPE and --workdir=DIR \(or --estimate\); recipes: .*rotation"),
        (("--config=rotation:small",), r"^give --workdir=DIR \(or --estimate\)$"),
        (("--workdir=RUN",), r"^give --config=RECIPE; recipes: .*rotation"),
    ],
)
def test_a_training_names_the_flags_that_were_forgotten(given, missing):
    values = flags.FlagValues()
    train.define_flags(values)
    values(["train", *given])
    with pytest.raises(InputError, match=missing):
        train.start(values)


def test_a_recipe_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse("--config=masked_region:small", "--config.num_steps=7").config
    assert (config.recipe, config.num_steps, config.image_size) == ("masked_region_small", 7, 64)
    own = (PROJECT / "configs" / "rotation.py").read_text().replace('"rotation_small"', '"mine"')
    Path("rotation.py").write_text(own)  # a file of one's own beside a recipe of that name
    assert parse("--config=rotation.py:small").config.recipe == "mine"
    assert parse("--config=rotation:small").config.recipe == "rotation_small"


@pytest.mark.parametrize("given", ["nope", "nope:small", "configs/nope.py", "masked_region.py"])
def test_a_recipe_that_is_not_there_is_named_with_those_that_are(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"no such (recipe|file); choose one of .*masked_region"):
        recipe_files.recipe_file(given)


def test_setup_lists_every_package():
    """`find:` does not find packages that `package_dir` moves."""
    setup = ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    listed = setup["options"]["packages"].split()
    found = [
        ".".join(path.relative_to(PROJECT).parent.parts)
        for folder in ("data_prep", "ctssl_jax", "configs", "experiments")
        for path in (PROJECT / folder).rglob("__init__.py")
    ]
    moved = {"configs": "ctssl_jax.configs", "experiments": "ctssl_jax.experiments"}
    tops = [(name.partition(".")[0], name.partition(".")[2]) for name in found]
    names = [".".join(filter(None, (moved.get(top, top), rest))) for top, rest in tops]
    assert sorted(listed) == sorted(names)


def test_the_remedy_for_a_missing_package_can_be_typed():
    assert pip_install("dicom-seg").startswith("pip install 'highdicom")
    assert pip_install("no-such-extra") == "pip install '.[no-such-extra]'"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("--config.optimizer.learning_rate=1", "config.learning_rate"),
        ("--config.model.hiden=1", "config.model.hidden"),
        ("--config.modell.hidden=1", "config.model.hidden"),
        ("--noconfig.remt", "config.remat"),
    ],
)
def test_a_field_that_the_recipe_lacks_is_named_with_the_one_that_was_meant(given, meant):
    with pytest.raises(flags.IllegalFlagValueError, match=f"no such field; did you mean {meant}"):
        parse("--config=masked_region:small", given)
    parse("--config=masked_region:small", "--config.model.hidden=(4,8)", "--noconfig.remat")
