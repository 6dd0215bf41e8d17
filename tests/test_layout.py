"""The house: doors at the top of a package, wings (folders) in an order, imports that run one
way."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]

# From the ground up: a wing imports itself and the wings before it. Doors import any wing, nothing
# imports a door.
ORDER = {
    "data_prep": "system scan masks dataset labels privacy raw synthetic pipeline".split(),
    "ctssl_jax": "models ops data tasks runs stats torch_bridge parallel training evaluation "
    "release inference probes".split(),
}
# What ctssl_jax may import of data_prep.
OF_DATA_PREP = ("system", "scan", "masks", "privacy", "dataset", "raw", "synthetic.exam")
# May be imported inside a function: the packages of extras, TFDS, which would cost every worker
# process a second, and the one file that cannot be imported without its extra.
EXTRAS = (
    *(
        "aiohttp",
        "apache_beam",
        "dask",
        "distributed",
        "google",
        "highdicom",
        "huggingface_hub",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "pyarrow",
        "safetensors",
        "skimage",
    ),
    *("tensorboardX", "torch", "tensorflow_datasets", "data_prep.pipeline.beam"),
)


def sources() -> dict[str, str]:
    """Path -> text of every file of both packages; not of `ctssl_torch.py`, which leaves the house
    alone."""
    files = (path for package in ORDER for path in (PROJECT / package).rglob("*.py"))
    return {
        str(path.relative_to(PROJECT)): path.read_text()
        for path in files
        if path.name != "ctssl_torch.py"
    }


def imports(text: str) -> Iterator[tuple[str, bool]]:
    """Every import, `from a.b import c` as `a.b.c`, and whether it stands inside a function."""
    tree = ast.parse(text)
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            name = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            yield name, node in inside


def wrong_imports(files: dict[str, str]) -> list[str]:
    wrong = []
    for path, text in files.items():
        package, *rest = path.split("/")
        order, is_wing = ORDER[package], len(rest) > 1
        for name, inside in imports(text):
            top, wing, *_ = [*name.split("."), ""]
            if f"{top}/{wing}.py" in files:
                wrong.append(f"{path} imports the door {name}")
            elif is_wing and top == package and wing in order[order.index(rest[0]) + 1 :]:
                wrong.append(f"{path} imports {name}, a wing above its own")
            elif top in ("configs", "experiments", "tests") or (package, top) == (
                "data_prep",
                "ctssl_jax",
            ):
                wrong.append(f"{path} imports {name}")
            elif (package, top) == ("ctssl_jax", "data_prep") and not f"{name}.".removeprefix(
                "data_prep."
            ).startswith(tuple(f"{allowed}." for allowed in OF_DATA_PREP)):
                wrong.append(f"{path} imports {name} of data_prep")
            elif is_wing and inside and rest[-1] != "__init__.py" and not name.startswith(EXTRAS):
                wrong.append(f"{path} imports {name} inside a function")
    return wrong


def test_imports_run_one_way():
    assert wrong_imports(sources()) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("ctssl_jax/models/planted.py", "from ctssl_jax.training import step"),
        ("ctssl_jax/models/planted.py", "def f():\n    from ctssl_jax.training import step"),
        ("ctssl_jax/models/planted.py", "def f():\n    import jax"),
        ("data_prep/scan/planted.py", "from data_prep.dataset.reader.schema import SPLITS"),
        ("data_prep/scan/planted.py", "import ctssl_jax.ops.losses"),
        ("ctssl_jax/tasks/planted.py", "from data_prep.pipeline import options"),
        ("ctssl_jax/evaluation/planted.py", "from ctssl_jax import train"),
        ("ctssl_jax/planted.py", "from ctssl_jax.evaluate import main"),
        ("ctssl_jax/planted.py", "def start():\n    from configs import rotation"),
    ],
)
def test_a_planted_import_is_found(path, text):
    assert len(wrong_imports({**sources(), path: text})) == 1


def test_no_circle_between_files():
    files = sources()
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): text
        for path, text in files.items()
    }
    graph = {
        module: {
            target
            for name, _ in imports(text)
            for target in (name, name.rpartition(".")[0])
            if target in modules
        }
        - {module, *([] if module.count(".") else modules)}
        for module, text in modules.items()
    }
    graph = {
        module: {t for t in targets if t.count(".") > 1}
        for module, targets in graph.items()
        if module.count(".") > 1
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the files


def test_doors_are_short():
    for path, text in sources().items():
        if path.count("/") == 1 and not path.endswith("__init__.py"):
            assert len(text.splitlines()) <= 200, f"{path}: its core belongs in a wing"
            functions = {
                node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)
            }
            assert "main" in functions or "start" in functions, path


def test_doors_hear_a_request_to_stop_before_their_other_imports():
    for path in sources():
        if path.count("/") == 1 and not path.endswith(("__init__.py", "__main__.py")):
            first = ast.unparse(ast.parse((PROJECT / path).read_text()).body[1])
            assert first.endswith("early_stop.leave_at_once()"), path


def test_public_signatures_are_typed():
    untyped = []
    for path, text in sources().items():
        tree = ast.parse(text)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(inner for one in classes for inner in one.body)]:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                types = [one.annotation for one in arguments if one.arg not in ("self", "cls")]
                if None in (*types, node.returns):
                    untyped.append(f"{path}:{node.lineno} {node.name}")
    assert untyped == []
