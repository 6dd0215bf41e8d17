"""Where the time of a compiled step goes: a trace of JAX's profiler, summed by operation of the
program.

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
    """Instructions of one kind, of a step: what they compute, where they stem from, and what they
    took."""

    kind: str  # opcode, or the library function that a custom call goes to
    shape: str  # of the result, as XLA writes it
    origin: str  # the end of JAX's name of the operation
    count: float  # a step
    milliseconds: float  # a step; of all cores together on a CPU


def describe_instructions(program: str) -> dict[str, tuple[str, str, str]]:
    """The text of a compiled program -> (kind, shape, origin) of every instruction, by its name."""
    instructions = {}
    for line in program.splitlines():
        if found := _INSTRUCTION.match(line):
            target, origin = _TARGET.search(line), _ORIGIN.search(line)
            kind = target[1] if target else found["opcode"]
            if kind == "fusion":
                kind = _NUMBER.sub("", found["name"])
            path = origin[1].split("/") if origin else []
            # The pass and the primitive; modules between them differ from block to block.
            backward = "backward " if any(part.startswith("transpose(") for part in path) else ""
            shape = re.sub(r"\{[^}]*\}", "", found["shape"])
            instructions[found["name"]] = kind, shape, backward + (path[-1] if path else "")
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

    Kernels that a GPU runs as part of a CUDA graph are known by their own names alone, which are
    those of XLA's fusions; the kernels of libraries then stand under their names.
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
    """Markdown; what did not fit is summed in the last row."""
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
