"""The documents: every README.md and the notebook, and what they name: commands, flags, fields,
links, pictures."""

import re
import shlex
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

from ctssl_jax import __main__ as ctssl
from ctssl_jax.training import recipe_pages
from ctssl_jax.training.recipe_files import load_recipe, recipe_names
from tests.campaigns import document_commands, notebook
from tests.helpers.command_parser import refusals

PROJECT = Path(__file__).resolve().parents[1]


def notebook_as_markdown() -> str:
    """The notebook with its cells of commands and of Python as blocks."""
    parts = []
    for cell in notebook.read()["cells"]:
        text, is_code = "".join(cell["source"]), cell["cell_type"] == "code"
        first, _, rest = text.partition("\n")
        if first.startswith("%%bash"):
            parts.append(f"```bash\n{rest}\n```")
        else:
            parts.append(f"```python\n{text}\n```" if is_code else text)
    return "\n\n".join(parts)


DOCUMENTS = {
    str(path.relative_to(PROJECT)): path.read_text()
    for path in sorted([*PROJECT.rglob("*.md")])
    if not {part for part in path.relative_to(PROJECT).parts[:-1] if part.startswith(".")}
    and path.relative_to(PROJECT).parts[0] not in ("build", "dist", "runs")
}
DOCUMENTS["experiments/first_steps.ipynb"] = notebook_as_markdown()
OTHER_PROGRAMS = set(  # flags in documents that are those of pip, ruff, pytest, Slurm and gcloud
    "array check command dependency dist force gres help logdir nodes parsable recurse requeue "
    "signal spot time user worker zone project".split()
)
DOORS = {name: module for named in ctssl.commands().values() for name, (module, _) in named.items()}
_OF_A_MODULE = r"python3? -m (?P<module>(?:data_prep|ctssl_jax|experiments|tests)\.[\w.]+)"
_DOOR = r"(?:(?<![\w./-])|(?<=\.venv/bin/))ctssl (?P<door>[a-z]\w+)"
_COMMAND = re.compile(rf"(?:{_OF_A_MODULE}|{_DOOR})(?P<rest>[^;|&>\n]*)")


def blocks(text: str, language: str = "bash") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """(module, arguments) of each of our commands in the `bash` blocks of a document."""
    variables = {"SLURM_ARRAY_TASK_ID": "0"}
    for block in blocks(text):
        for line in block.replace("\\\n", " ").split("\n"):
            if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', line):
                variables[assigned[1]] = assigned[2]
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            for found in _COMMAND.finditer(line):
                try:
                    words = shlex.split(found["rest"], comments=True)
                except ValueError:  # the command stands in quotes that end behind it
                    words = shlex.split(found["rest"].rstrip().rstrip("\"'"), comments=True)
                yield found["module"] or DOORS.get(found["door"], found["door"]), words


def refused(commands: dict[str, list]) -> list[str]:
    """Refusals of the command lines of documents, with the name of the document."""
    named = [(name, command) for name, found in commands.items() for command in found]
    answers = refusals([command for _, command in named])
    return [f"{name}: {answer}" for (name, _), answer in zip(named, answers, strict=True) if answer]


def test_every_command_of_the_documents_parses():
    commands = {name: list(commands_of(text)) for name, text in DOCUMENTS.items()}
    assert sum(map(len, commands.values())) > 50
    assert refused(commands) == []


def test_every_command_within_a_line_has_flags_that_exist():
    """These need not be complete: `ctssl prepare --dry_run`."""
    commands = {}
    for name, text in DOCUMENTS.items():
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        spans = "\n".join(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose))
        found = list(commands_of(f"```bash\n{spans}\n```"))
        assert {module for module, _ in found if "." not in module} == set(), name
        commands[name] = [(module, flags) for module, words in found if (flags := own(words))]
    incomplete = ("must have a value other than None", "arguments are required")
    assert [one for one in refused(commands) if not any(text in one for text in incomplete)] == []


def own(words: list[str]) -> list[str]:
    """The flags of a command but for those that only a recipe defines."""
    recipe = any(word.startswith("--config=") for word in words)
    return [
        word
        for word in words
        if word not in ("...", "--help") and (recipe or not word.startswith("--config."))
    ]


def test_a_wrong_command_is_found():
    text = """```bash
ctssl train --config=nope --workdir=RUN
ctssl train --config=pe --config.nope=1 --workdir=RUN   # comment
ctssl evaluate --workdir=RUN --nope=1 && ctssl prepare --input_dir=A --output_dir=B --image_size=x
ctssl table2 nope --dataset=DATASET
python -m experiments.memory_table --nope
ctssl nope
ctssl describe --dataset=DATASET --verify
```"""
    assert len(refused({"planted": list(commands_of(text))})) == 7


def test_the_table_of_commands_has_every_command():
    rows = re.findall(r"^\| `ctssl (\w+)` \|", DOCUMENTS["README.md"], flags=re.MULTILINE)
    assert sorted(rows) == sorted(DOORS)


def test_readme_is_short_and_shows_the_commands():
    readme = DOCUMENTS["README.md"]
    assert len(readme.splitlines()) <= 150
    assert any("pip install" in block and "ctssl quickstart" in block for block in blocks(readme))
    command = blocks(readme.split("<!-- test command -->")[1])[0]
    for part in (
        "python3 -m venv",
        "'.[test,torch]'",
        "ruff check",
        "ruff format --check",
        ".venv/bin/mypy",
        "-m pytest",
    ):
        assert part in command


def headings(text: str) -> set[str]:
    """The anchors of a document, as GitHub makes them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_pictures_are_there(name):
    folder = (PROJECT / name).parent
    prose = re.sub(r"```.*?```", "", DOCUMENTS[name], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        assert "://" not in target, f"{name} links to {target}"
        file, _, anchor = target.partition("#")
        path = (folder / file).resolve() if file else PROJECT / name
        assert path.exists(), f"{name} links to {target}, which is not there"
        if anchor:
            text = DOCUMENTS[str(path.relative_to(PROJECT))]
            assert anchor in headings(text), f"{name} links to {target}, which has no such heading"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_a_document_names_are_there(name):
    for file in re.findall(r"`([\w/]+/[\w/]+\.(?:py|def|md))", DOCUMENTS[name]):
        assert (PROJECT / file).is_file(), f"{name} names {file}"


def _flat(config):
    """(name, value) of every field, `mask.fraction` and so on."""
    for name, value in config.items():
        if hasattr(value, "items"):
            yield from ((f"{name}.{inner}", one) for inner, one in _flat(value))
        else:
            yield name, value


def test_documents_name_only_flags_and_fields_that_exist():
    sources = "\n".join(
        path.read_text() for path in PROJECT.rglob("*.py") if ".venv" not in path.parts
    )
    text = "\n".join(DOCUMENTS.values())
    for flag in set(re.findall(r"--([a-z_]+)(?==|`| |\n)", text)) - OTHER_PROGRAMS:
        # --nochained: a bool is false
        spellings = (f'"{flag}"', f'"--{flag}"', f'"{flag.removeprefix("no")}"')
        known = any(spelling in sources for spelling in spellings)
        assert known or flag == "config", f"a document names --{flag}"
    fields = set()
    for recipe in recipe_names():
        config = load_recipe(recipe)
        fields |= {*config, *(name for name, _ in _flat(config))}
    for field in re.findall(r"--config\.([a-z_.]+)", text):
        assert field in fields, f"a document names config.{field}"


def test_the_tables_of_fields_are_those_of_the_recipes():
    """If not: write what `ctssl recipes --markdown` prints below the mark."""
    shown = DOCUMENTS["configs/README.md"].split("<!-- fields -->\n")[1]
    assert shown == recipe_pages.markdown() + "\n"


def test_the_citation_is_of_this_version():
    setup = ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    version = setup["metadata"]["version"]
    assert f"\nversion: {version}\n" in (PROJECT / "CITATION.cff").read_text()
    assert f"Version {version} " in DOCUMENTS["CHANGELOG.md"]


def test_every_bash_block_is_executed_or_says_why_not():
    """`tests.campaigns.document_commands` runs them, in `.ci/run`."""
    executed, aside = document_commands.plan()
    of_documents = [text for name, text in DOCUMENTS.items() if name.endswith(".md")]
    assert len(executed) + len(aside) >= sum(len(blocks(text)) for text in of_documents)
    assert len(executed) > len(aside) and all(why for _, why in aside)
