"""The time of a compiled step by operation: a trace of JAX's profiler, summed up.

Used by `experiments.benchmark_training --profile=FOLDER`.
"""

import collections
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\("
)
_TARGET = re.compile(r'custom_call_target="([^"]+)"')
_ORIGIN = re.compile(r'op_name="([^"]*)"')
_NUMBER = re.compile(r"\.?\d+$")


class Operation(NamedTuple):
    """All instructions of one kind in a step, and their time."""

    kind: str  # opcode, or the library function that a custom call goes to
    shape: str  # of the result, as XLA writes it
    origin: str  # the end of JAX's name of the operation
    count: float  # a step
    milliseconds: float  # a step; of all cores together on a CPU


def describe_instructions(program: str) -> dict[str, tuple[str, str, str]]:
    """The text of a compiled program -> (kind, shape, origin) of every instruction, by its name."""
    instructions = {}
    for line in program.splitlines():
        if instruction := _INSTRUCTION.match(line):
            target, origin = _TARGET.search(line), _ORIGIN.search(line)
            kind = target[1] if target else instruction["opcode"]
            if kind == "fusion":
                kind = _NUMBER.sub("", instruction["name"])
            path = origin[1].split("/") if origin else []
            # The pass and the primitive; modules between them differ from block to block.
            backward = "backward " if any(part.startswith("transpose(") for part in path) else ""
            shape = re.sub(r"\{[^}]*\}", "", instruction["shape"])
            instructions[instruction["name"]] = kind, shape, backward + (path[-1] if path else "")
    return instructions


def profile(
    step: Callable[[], Any], program: str, folder: Path, *, steps: int = 3
) -> list[Operation]:
    """Trace some steps and sum up.

    Args:
        step: takes one step, returns an array of it.
        program: the text of the compiled program, `jax.stages.Compiled.as_text()`.
        folder: gets the trace (TensorBoard's profile plugin and XProf open it) and `program.txt`.
        steps: how many are traced.

    Returns:
        operations, the longest first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "program.txt").write_text(program)
    with jax.profiler.trace(str(folder)):
        for _ in range(steps):
            last = step()
        jax.block_until_ready(last)
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return summarize(newest, program, steps)


def summarize(trace: Path, program: str, steps: int) -> list[Operation]:
    """The operations of a trace (`*.xplane.pb`) of so many steps, the longest first.

    Kernels that a GPU runs as part of a CUDA graph have their own names alone: the names of XLA's
    fusions, or of kernels of libraries.
    """
    instructions = describe_instructions(program)
    kernels = {
        name.replace(".", "_").replace("-", "_"): described
        for name, described in instructions.items()
    }
    counts, durations = collections.Counter(), collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            if on_device and not line.name.startswith("Stream"):
                continue  # summaries of the streams
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation in instructions:
                    described = instructions[operation]
                elif on_device:
                    described = kernels.get(event.name, (event.name[:70], "", ""))
                else:
                    continue
                counts[described] += 1
                durations[described] += event.duration_ns
    return [
        Operation(*described, counts[described] / steps, nanoseconds / steps / 1e6)
        for described, nanoseconds in durations.most_common()
    ]


def table(operations: list[Operation], rows: int = 25) -> str:
    """Markdown; operations beyond `rows` are summed in the last row."""
    total = sum(operation.milliseconds for operation in operations)
    lines = ["| operation | result | from | a step | ms | share |", "|---|---|---|---|---|---|"]
    rest = sum(operation.milliseconds for operation in operations[rows:])
    for kind, shape, origin, count, milliseconds in operations[:rows]:
        shape = shape if len(shape) < 60 else shape[:57] + "..."
        lines.append(
            f"| {kind} | {shape} | {origin} | {count:.0f} | {milliseconds:.2f} | "
            f"{milliseconds / total:.1%} |"
        )
    lines.append(f"| {len(operations[rows:])} others | | | | {rest:.2f} | {rest / total:.1%} |")
    return "\n".join(lines)
