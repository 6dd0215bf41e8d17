"""What a compiled TPU program does in a step, counted in its text, loops included.

`Compiled.cost_analysis` counts the body of a loop once. Here each computation is counted as often
as it runs: the body of a loop by the number of its turns, which XLA writes beside it, or with which
its condition compares (the loops of JAX count from 0); of the branches of a condition the one that
moves the least (in a training step the other one places or revives codes, which is rare).
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([\d,]*)((?::[^}]*)?)\})?")
_COLLECTIVES = (
    *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
)
# Nothing is moved: names of values, and the ends of what a `-start` began.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_PARTS = ("dynamic-slice", "slice", "gather")  # read as much as they return


@dataclasses.dataclass
class Work:
    """What one device does in a run of a program.

    operations: of convolutions and matrix products, a multiply-add counted as two.
    traffic: bytes to and from the main memory, tiles padded as they are stored.
    cycles: as XLA's compiler estimates its instructions, one after the other; 0 if it says nothing.
    collectives: kind -> number.
    collective_bytes: kind -> bytes of their results.
    largest_map: images of the largest batch that a convolution of the forward pass takes.
    untold_loops: loops of which nothing tells how often they run; counted as once.
    """

    operations: float = 0.0
    traffic: float = 0.0
    cycles: float = 0.0
    collectives: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collective_bytes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    largest_map: int = 0
    untold_loops: int = 0

    def add(self, other: "Work", times: int = 1) -> None:
        """Add the work of a part of the program that runs so many times."""
        self.operations += times * other.operations
        self.traffic += times * other.traffic
        self.cycles += times * other.cycles
        for mine, more in (
            (self.collectives, other.collectives),
            (self.collective_bytes, other.collective_bytes),
        ):
            mine.update({kind: times * value for kind, value in more.items()})
        self.largest_map = max(self.largest_map, other.largest_map)
        self.untold_loops += other.untold_loops


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of an instruction's result: its sides, stored bytes and place."""

    sides: tuple[int, ...]
    stored: int
    in_main_memory: bool


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    shape: str
    rest: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> list[_Array]:
        return list(_arrays(self.shape))

    @functools.cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")", 1)[0])

    @property
    def moved(self) -> int:
        """Stored bytes of the result in the main memory."""
        return sum(array.stored for array in self.arrays if array.in_main_memory)

    @property
    def size(self) -> int:
        """Stored bytes of the result, wherever it lies."""
        return sum(array.stored for array in self.arrays)

    def called(self, attribute: str) -> list[str]:
        found = re.search(attribute + r"=\{?((?:%[\w.\-]+(?:, )?)+)", self.rest)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []


def _arrays(shape: str) -> Iterator[_Array]:
    """The arrays of a shape such as `bf16[4,128]{1,0:T(8,128)(2,1)S(1)}`, or of a tuple of them."""
    for kind, bits, sides, order, place in _ARRAY.findall(shape):
        lengths = [int(side) for side in sides.split(",") if side]
        padded = list(lengths)
        tile = re.search(r":T\(([\d,]+)\)", place)
        if tile and order:  # the first tile holds the sides that vary fastest
            tile_sides = reversed([int(side) for side in tile[1].split(",")])
            for axis, side in zip(order.split(","), tile_sides, strict=False):
                padded[int(axis)] = -(-lengths[int(axis)] // side) * side
        size = 1 if kind == "pred" else int(bits or 0) / 8
        in_main_memory = not re.search(r"S\([1-9]", place)
        yield _Array(tuple(lengths), math.ceil(math.prod(padded) * size), in_main_memory)


def count_work(text: str) -> Work:
    """The work of one device.

    Args:
        text: from `jax.stages.Compiled.as_text`, of a program for TPUs.
    """
    computations: dict[str, dict[str, _Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            computations[name] = {}
            entry = name if start[1] else entry
        elif name and (found := _INSTRUCTION.match(line)):
            root, instruction, shape, opcode, rest = found.groups()
            computations[name][instruction] = _Instruction(
                instruction, opcode, shape, rest, bool(root)
            )
    return _Counter(computations).work(entry)


class _Counter:
    """Counts computations, each once."""

    def __init__(self, computations: dict[str, dict[str, _Instruction]]):
        self._computations = computations
        self._counted: dict[str, Work] = {}

    def work(self, name: str) -> Work:
        """Work of one run of a computation."""
        if name not in self._counted:
            total = Work()
            for instruction in self._computations.get(name, {}).values():
                total.add(self._work_of(instruction, self._computations[name]))
            self._counted[name] = total
        return self._counted[name]

    def _work_of(self, one: _Instruction, siblings: dict[str, _Instruction]) -> Work:
        kind = one.opcode.removesuffix("-start")
        if one.opcode in _FREE or one.opcode.endswith(("-done", "-update")):
            return Work()
        total = Work()
        if one.opcode == "while":
            turns = self._turns(one)
            total.add(self.work(one.called("body")[0]), turns or 1)
            total.untold_loops += turns is None
            return total
        if one.opcode == "conditional":
            branches = one.called("branch_computations") or [
                *one.called("true_computation"),
                *one.called("false_computation"),
            ]
            return min((self.work(branch) for branch in branches), key=lambda work: work.traffic)
        if one.opcode in ("call", "async-start"):
            for name in one.called("to_apply") or one.called("calls"):
                total.add(self.work(name))
            return total
        cycles = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
        total.cycles = float(cycles[1]) if cycles else 0.0
        if kind in _COLLECTIVES:
            total.collectives[kind] = 1
            total.collective_bytes[kind] = one.size if one.opcode == kind else one.size // 2
        if one.opcode.endswith("-start"):  # a copy of the last array but the context
            moved = min(
                array.stored for array in one.arrays if len(array.sides) or array.stored > 4
            )
            total.traffic = moved * sum(array.in_main_memory for array in one.arrays[:2])
        elif one.opcode in _PARTS:
            total.traffic = one.size + one.moved
        elif one.opcode == "dynamic-update-slice":
            total.traffic = 2 * siblings[one.operands[1]].size
        elif one.opcode == "fusion":
            self._add_fusion(total, one, siblings)
        else:
            read = [siblings[name] for name in one.operands if name in siblings]
            total.traffic = one.moved + sum(operand.moved for operand in read)
            self._add_products(total, one, siblings)
        return total

    def _turns(self, loop: _Instruction) -> int | None:
        """How often a loop runs; None if nothing tells it."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
            return int(known[1])
        condition = self._computations.get(loop.called("condition")[0], {})
        for one in condition.values():
            if one.is_root and one.opcode == "compare" and "direction=LT" in one.rest:
                bound = condition.get(one.operands[1])
                if (
                    bound
                    and bound.opcode == "constant"
                    and (limit := re.match(r"(\d+)\)", bound.rest))
                ):
                    return int(limit[1])
        return None

    def _add_fusion(
        self, total: Work, one: _Instruction, siblings: dict[str, _Instruction]
    ) -> None:
        """Add what a fusion reads, writes and multiplies."""
        inside = self._computations[one.called("calls")[0]]
        users = collections.defaultdict(list)
        for instruction in inside.values():
            for name in instruction.operands:
                users[name].append(instruction)
            self._add_products(total, instruction, inside)
        parameters = sorted(
            (i for i in inside.values() if i.opcode == "parameter"),
            key=lambda parameter: int(parameter.rest.split(")")[0]),
        )
        updated = 0
        for name, parameter in zip(one.operands, parameters, strict=False):
            if name not in siblings or not siblings[name].moved:
                continue
            uses = users[parameter.name]
            if uses and all(
                use.opcode in _PARTS and use.operands[0] == parameter.name for use in uses
            ):
                total.traffic += min(sum(use.size for use in uses), siblings[name].moved)
            elif uses and all(
                use.opcode == "dynamic-update-slice" and use.operands[0] == parameter.name
                for use in uses
            ):  # written in place
                updated += siblings[name].moved
                total.traffic += sum(inside[use.operands[1]].size for use in uses)
            else:
                total.traffic += siblings[name].moved
        total.traffic += max(one.moved - updated, 0)

    def _add_products(
        self, total: Work, one: _Instruction, siblings: dict[str, _Instruction]
    ) -> None:
        """Add a convolution or matrix product; on TPUs both are `convolution`s, also in fusions."""
        if one.opcode == "fusion":
            for instruction in (inside := self._computations[one.called("calls")[0]]).values():
                self._add_products(total, instruction, inside)
        labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
        if one.opcode != "convolution" or not labels:
            return
        window = re.search(r"window=\{size=([\dx]+)", one.rest)
        spread = re.search(r"lhs_dilate=([\dx]+)", one.rest)  # zeros between pixels
        result, kernel = one.arrays[0].sides, siblings[one.operands[1]].arrays[0].sides
        sums = kernel[labels[2].index("i")]
        for sides, sign in ((window, 1), (spread, -1)):
            sums *= math.prod(int(side) for side in sides[1].split("x")) ** sign if sides else 1
        total.operations += 2 * math.prod(result) * sums
        name = re.search(r'op_name="([^"]*)"', one.rest)
        if name and "conv_general_dilated" in name[1] and "transpose" not in name[1]:
            total.largest_map = max(total.largest_map, result[labels[3].index("b")])
