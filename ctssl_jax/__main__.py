"""`ctssl COMMAND ...`: every command of the project by one name, `python -m ctssl_jax COMMAND ...`.

A command is a module of `data_prep`, `ctssl_jax` or `experiments` that `python -m` runs, too.
"""

import ast
import importlib
import importlib.metadata
import runpy
import sys
from pathlib import Path

from data_prep.system import silence
from data_prep.system.early_stop import ending_with_the_reader

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = (_PACKAGE / "experiments").is_dir()  # setup.cfg puts them there in a wheel
_EXPERIMENTS = _PACKAGE / "experiments" if _INSTALLED else _PACKAGE.parent / "experiments"
_FOLDERS = {  # title -> package, folder
    "Scans and datasets": ("data_prep", _PACKAGE.parent / "data_prep"),
    "Models": ("ctssl_jax", _PACKAGE),
    "Studies": ("ctssl_jax.experiments" if _INSTALLED else "experiments", _EXPERIMENTS),
}
_COMPLETION = {
    "bash": """\
_ctssl() {  # bash makes three words of --config=NAME
  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[*]:0:COMP_CWORD}"
  [ "$word" = = ] && before="$before =" word=
  case "$before" in
    ctssl) COMPREPLY=($(compgen -W "COMMANDS" -- "$word"));;
    *" --config =") COMPREPLY=($(compgen -W "RECIPES" -- "$word"));;
    *) COMPREPLY=($(compgen -f -- "$word"));;
  esac
}
complete -o default -F _ctssl ctssl
""",
    "zsh": """\
_ctssl() { _arguments '1:command:(COMMANDS)' '--config=:recipe:(RECIPES)' '*:file:_files' }
compdef _ctssl ctssl
""",
    "fish": """\
complete -c ctssl -n __fish_use_subcommand -f -a "COMMANDS"
""",
}


def commands() -> dict[str, dict[str, tuple[str, Path]]]:
    """Title -> name of a command -> its module and file."""
    return {
        title: {
            path.stem: (f"{package}.{path.stem}", path)
            for path in sorted(folder.glob("*.py"))
            if not path.stem.startswith("_")
        }
        for title, (package, folder) in _FOLDERS.items()
    }


def summary(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]


def help_text() -> str:
    """All commands with what each does."""
    lines = ["ctssl COMMAND [--help]: self-supervised pretraining for chest CT, with its benchmark"]
    for title, named in commands().items():
        lines += ["", title]
        lines += [f"  {name:<22} {summary(path)}" for name, (_, path) in named.items()]
    lines += [
        "",
        'ctssl --version; shell completion: eval "$(ctssl completion bash)" (or zsh, fish)',
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command that the arguments name, as `python -m` would; returns an exit code."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv), ""]
    if name in ("", "help", "-h", "--help", "--helpshort", "--helpfull"):
        with ending_with_the_reader():  # `ctssl --help | head` is no error
            print(help_text())
        return 0
    if name in ("version", "--version"):
        print(f"ctssl {importlib.metadata.version('ctssl_jax')}")
        return 0
    known = {key: module for named in commands().values() for key, (module, _) in named.items()}
    if name == "completion" and rest[0] in _COMPLETION:
        recipes = importlib.import_module("ctssl_jax.training.recipe_files").recipe_names()
        script = _COMPLETION[rest[0]].replace("COMMANDS", " ".join(known))
        with ending_with_the_reader():
            print(script.replace("RECIPES", " ".join(recipes)), end="")
        return 0
    module = known.get(name.replace("-", "_"))
    if module is None:
        print(f"error: no command {name!r}; ctssl --help lists them", file=sys.stderr)
        return 2
    silence.watch()
    sys.argv = [f"ctssl {name}", *rest[:-1]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
