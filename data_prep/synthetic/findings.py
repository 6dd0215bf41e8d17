"""Findings of the phantom: lung nodules and pulmonary emboli, their sampling, shapes and HU.

Nodules are defined in the patient's millimetres around a centre in reference space (`patient`), so
that a diameter is a diameter whatever the patient's build; emboli are tubes inside the arteries, in
reference space.
"""

import dataclasses

import numpy as np

from data_prep.synthetic.anatomy import Anatomy, lungs
from data_prep.synthetic.patient import pleura_distance
from data_prep.synthetic.shapes import Canvas, Capsules, around, polyline

# Typical diameter (mm) of a nodule by malignancy 1 to 5, and how often each malignancy occurs.
DIAMETER_MM = (7.0, 9.0, 12.0, 16.0, 21.0)
MALIGNANCY_SHARES = (0.16, 0.2, 0.24, 0.2, 0.2)
SOLID, PART_SOLID, GROUND_GLASS = 5, 3, 1
# Segments of `Vessels.pulmonary_arteries`: the trunk, then the left and the right artery.
TRUNK, LEFT_ARTERY, RIGHT_ARTERY = (0, 1), (2, 3, 4), (5, 6, 7, 8)


@dataclasses.dataclass(frozen=True)
class Nodule:
    """A lung nodule. `centre` in reference space; `texture` 1 (ground glass) to 5 (solid),
    `malignancy` 1 to 5 on the LIDC-IDRI scales; `lobulation` and `spiculation` are relative heights
    of bumps and spicules; `cavity_mm` is the radius of an air-filled cavity (0: solid);
    `directions` [K, 3] point where the bumps and spicules are."""

    centre: tuple[float, float, float]
    radii_mm: tuple[float, float, float]
    malignancy: int
    texture: int
    calcified: bool
    lobulation: float
    spiculation: float
    cavity_mm: float
    hu: float
    directions: tuple[tuple[float, float, float], ...]

    @property
    def diameter_mm(self) -> float:
        """Diameter of the sphere of the same volume, bumps left out."""
        return 2 * float(np.prod(self.radii_mm)) ** (1 / 3)

    @property
    def reach_mm(self) -> float:
        """Nothing of the nodule lies farther from its centre."""
        return max(self.radii_mm) * (1 + self.lobulation + 1.2 * self.spiculation) + 2


@dataclasses.dataclass(frozen=True)
class Embolus:
    """A clot: tubes inside pulmonary arteries. `sides` holds "left", "right" or both, none for one
    in the trunk only; `central` is one in the trunk or a main artery; a `chronic` one is denser and
    lies along the wall."""

    tubes: Capsules
    central: bool
    sides: tuple[str, ...]
    chronic: bool
    hu: float


@dataclasses.dataclass(frozen=True)
class Findings:
    """All findings of a patient. `dots` are nodules under 3 mm."""

    nodules: tuple[Nodule, ...] = ()
    dots: tuple[Nodule, ...] = ()
    emboli: tuple[Embolus, ...] = ()


def nodule_distance(
    nodule: Nodule, x: np.ndarray, y: np.ndarray, z: float, scale: tuple
) -> tuple[np.ndarray, ...]:
    """Signed distances [H, W] in mm of reference points to the nodule's body, and to its
    spicules."""
    offset = [
        (np.asarray(along - centre, np.float32) * np.float32(factor))
        for along, centre, factor in zip((x, y, z), nodule.centre, scale, strict=True)
    ]
    away = np.sqrt(sum(part**2 for part in offset)) + np.float32(1e-3)
    stretched = np.sqrt(
        sum((part / radius) ** 2 for part, radius in zip(offset, nodule.radii_mm, strict=True))
    )
    # of the ellipsoid, in each point's direction
    radius = away / np.maximum(stretched, np.float32(1e-3))
    bump = np.zeros_like(away)
    spicule = np.zeros_like(away)
    for number, direction in enumerate(nodule.directions):
        cosine = sum(part * np.float32(d) for part, d in zip(offset, direction, strict=True)) / away
        if number < 4:
            bump += np.float32(0.5) * np.cos(np.float32(4) * cosine + number)
        np.maximum(spicule, np.maximum(cosine, 0) ** 60, out=spicule)
    body = (away - radius * (1 + np.float32(nodule.lobulation) * bump)) * np.float32(0.95)
    spikes = away - radius * (1 + np.float32(nodule.spiculation) * spicule)
    return body, np.minimum(body, spikes)


def sample_nodule(
    anatomy: Anatomy, z_range: tuple[float, float], taken: list[Nodule], rng: np.random.Generator
) -> Nodule | None:
    """A nodule in lung tissue whose centre lies between two heights of reference space, clear of
    those `taken`; None if there is no such place. Growing malignancy makes it larger, spiculated,
    less sharp and less often calcified."""
    malignancy = int(rng.choice(5, p=MALIGNANCY_SHARES)) + 1
    diameter = float(np.clip(DIAMETER_MM[malignancy - 1] * rng.lognormal(0, 0.28), 3.6, 30))
    texture = int(rng.choice([SOLID, PART_SOLID, GROUND_GLASS], p=[0.76, 0.16, 0.08]))
    calcified = bool(
        texture == SOLID and rng.random() < (0.5, 0.12, 0.03, 0.0, 0.0)[malignancy - 1]
    )
    directions = rng.normal(size=(4 + 2 * malignancy, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    solid_hu = rng.uniform(230, 520) if calcified else rng.uniform(25, 70)
    nodule = Nodule(
        centre=(0.0, 0.0, 0.0),
        radii_mm=tuple(float(r) for r in diameter / 2 * rng.lognormal(0, 0.09, 3)),
        malignancy=malignancy,
        texture=texture,
        calcified=calcified,
        lobulation=float(
            np.clip(0.03 + 0.03 * (malignancy - 1) + rng.normal(0, 0.015), 0.01, 0.18)
        ),
        spiculation=float(np.clip(0.22 * (malignancy - 2.4) + rng.normal(0, 0.06), 0, 0.8)),
        cavity_mm=float(0.14 * diameter)
        if diameter > 16 and texture == SOLID and rng.random() < 0.1
        else 0.0,
        hu=float(solid_hu if texture != GROUND_GLASS else rng.uniform(-560, -420)),
        directions=tuple(tuple(float(v) for v in d) for d in directions),
    )
    return _place(nodule, anatomy, z_range, taken, rng)


def sample_dot(
    anatomy: Anatomy, z_range: tuple[float, float], taken: list[Nodule], rng: np.random.Generator
) -> Nodule | None:
    """A solid nodule of less than 3 mm, as `sample_nodule`."""
    radius = float(rng.uniform(0.9, 1.4))
    dot = Nodule((0.0, 0.0, 0.0), (radius,) * 3, 2, SOLID, False, 0.0, 0.0, 0.0, 40.0, ())
    return _place(dot, anatomy, z_range, taken, rng)


def _place(nodule, anatomy, z_range, taken, rng) -> Nodule | None:
    """The nodule at a random place of the lungs, one in four against the pleura."""
    scale = anatomy.patient.scale
    x, y = np.meshgrid(np.arange(-132.0, 133, 4), np.arange(-100.0, 105, 4))
    radius = max(nodule.radii_mm) / scale[0]
    for _ in range(12):
        at_pleura = rng.random() < 0.25
        xs = (x + rng.uniform(-2, 2)).astype(np.float32)
        ys = (y + rng.uniform(-2, 2)).astype(np.float32)
        z = float(rng.uniform(*z_range))
        inside, pleura = np.full(xs.shape, -np.inf), np.full(xs.shape, -np.inf)
        for height in (z - radius, z, z + radius):
            wall = pleura_distance(xs, ys, height, anatomy.patient)
            pleura = np.maximum(pleura, wall)
            inside = np.maximum(inside, lungs(xs, ys, height, anatomy, wall))
        possible = inside < -(radius + 3)
        if at_pleura:
            # The nodule may bulge from the chest wall but not from the mediastinum or the
            # diaphragm.
            possible = (inside < -0.75 * radius) & (inside > -1.05 * radius) & (pleura > inside - 2)
        for other in taken:
            gap = nodule.reach_mm + other.reach_mm + 4
            far = (
                np.hypot((xs - other.centre[0]) * scale[0], (ys - other.centre[1]) * scale[1]) > gap
            )
            possible &= far | (abs(z - other.centre[2]) * scale[2] > gap)
        places = np.argwhere(possible)
        if len(places):
            row, column = places[rng.integers(len(places))]
            return dataclasses.replace(
                nodule, centre=(float(xs[row, column]), float(ys[row, column]), z)
            )
    return None


def sample_nodules(
    anatomy: Anatomy, z_range: tuple[float, float], count: int, dots: int, rng: np.random.Generator
) -> Findings:
    """Findings with up to `count` nodules and `dots` of less than 3 mm between two heights of
    reference space."""
    nodules, small = [], []
    for _ in range(count):
        nodule = sample_nodule(anatomy, z_range, nodules, rng)
        nodules += [] if nodule is None else [nodule]
    for _ in range(dots):
        dot = sample_dot(anatomy, z_range, nodules + small, rng)
        small += [] if dot is None else [dot]
    return Findings(nodules=tuple(nodules), dots=tuple(small))


def sample_emboli(
    anatomy: Anatomy, z_range: tuple[float, float], strained: bool, rng: np.random.Generator
) -> tuple[Embolus, ...]:
    """Emboli of one patient whose arteries run between two heights of reference space: acute,
    chronic or both; a patient with a strained right heart has more and more central ones."""
    kind = str(rng.choice(["acute", "chronic", "both"], p=[0.8, 0.1, 0.1]))
    emboli = []
    central = int(rng.random() < (0.95 if strained else 0.6)) + int(strained and rng.random() < 0.4)
    peripheral = (
        int(rng.integers(1, 4))
        if strained
        else int(rng.integers(0, 2) if central else rng.integers(1, 3))
    )
    for number in range(central + peripheral):
        chronic = kind == "chronic" or (kind == "both" and number % 2 == 1)
        make = _central_embolus if number < central else _peripheral_embolus
        embolus = make(anatomy, z_range, chronic, rng)
        emboli += [] if embolus is None else [embolus]
    return tuple(emboli)


def _central_embolus(anatomy, z_range, chronic, rng) -> Embolus | None:
    """A clot in a main artery, or a saddle over the division of the trunk."""
    arteries = anatomy.vessels.pulmonary_arteries
    left, right = (_chain(arteries, segments) for segments in (LEFT_ARTERY, RIGHT_ARTERY))
    which = rng.choice(["left", "right", "saddle"], p=[0.37, 0.43, 0.2])
    if which == "saddle":
        points, radii = (
            np.concatenate([a[:3][::-1], b[:3]]) for a, b in zip(left, right, strict=True)
        )
        share, sides = (0.15, 0.85), ("left", "right")
    else:
        points, radii = left if which == "left" else right
        begin = float(rng.uniform(0, 0.6))
        share, sides = (begin, min(1.0, begin + float(rng.uniform(0.3, 0.5)))), (str(which),)
    return _clot(points, radii, share, True, sides, chronic, rng)


def _peripheral_embolus(anatomy, z_range, chronic, rng) -> Embolus | None:
    """A clot in a lobar or segmental artery."""
    tree, parent = anatomy.vessels.arteries_tree, anatomy.vessels.arteries_parent
    middle = (tree.start[:, 2] + tree.end[:, 2]) / 2
    radius = tree.start_radius
    long_enough = np.linalg.norm(tree.end - tree.start, axis=1) > 6
    possible = (radius > 2.3) & (middle > z_range[0]) & (middle < z_range[1]) & long_enough
    candidates = np.flatnonzero(possible)
    if not len(candidates):
        return None
    last = int(rng.choice(candidates, p=radius[candidates] / radius[candidates].sum()))
    path = [last]
    while parent[path[-1]] >= 0 and len(path) < 3:
        path.append(int(parent[path[-1]]))
    points, radii = _chain(tree, tuple(path[::-1]))
    side = "left" if tree.end[last, 0] > 0 else "right"
    return _clot(points, radii, (float(rng.uniform(0.2, 0.5)), 1.0), False, (side,), chronic, rng)


def _chain(tubes: Capsules, segments: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Points [N + 1, 3] and radii [N + 1] along N consecutive segments."""
    chosen = list(segments)
    points = np.concatenate([tubes.start[chosen[:1]], tubes.end[chosen]])
    return points, np.concatenate([tubes.start_radius[chosen[:1]], tubes.end_radius[chosen]])


def _clot(points, radii, share, central, sides, chronic, rng) -> Embolus:
    """A clot along a part of a centre line: filling the artery or, smaller, off its axis; rounded
    at both ends."""
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))])
    where = np.linspace(share[0] * along[-1], share[1] * along[-1], 9)
    centre = np.stack([np.interp(where, along, points[:, k]) for k in range(3)], axis=1)
    lumen = np.interp(where, along, radii)
    if chronic:
        fill = float(rng.uniform(0.4, 0.55))
    elif rng.random() < (0.12 if central else 0.4):
        fill = 0.97
    else:  # blood flows around most clots
        fill = float(rng.uniform(0.5, 0.8))
    thickness = fill * lumen * np.sin(np.linspace(0.25 * np.pi, 0.75 * np.pi, 9)) ** 0.5
    aside = rng.normal(size=3)
    run = centre[-1] - centre[0]
    aside -= run * (aside @ run) / (run @ run + 1e-9)
    aside /= np.linalg.norm(aside) + 1e-9
    slack = (lumen - thickness) * (1.0 if chronic else float(rng.uniform(0.1, 0.8)))
    tubes = polyline(centre + aside * slack[:, None], thickness)
    return Embolus(
        tubes,
        central,
        sides,
        chronic,
        float(rng.uniform(55, 85) if chronic else rng.uniform(30, 65)),
    )


def cut_nodule(
    canvas: Canvas, nodule: Nodule, z: float, scale: tuple, lung_box: tuple, lung: np.ndarray
) -> tuple | None:
    """(box, distance to the body, distance to body and spicules) of a nodule near the slice at z,
    else None."""
    if abs(z - nodule.centre[2]) * scale[2] > nodule.reach_mm:
        return None
    box = canvas.box(*nodule.centre[:2], (nodule.reach_mm + 3) / min(scale))
    body, spiky = nodule_distance(nodule, canvas.x[box], canvas.y[box], z, scale)
    inside = around(lung, lung_box, box)
    return box, np.maximum(body, inside), np.maximum(spiky, inside)


def paint_haze(
    canvas: Canvas, nodule: Nodule, box: tuple[slice, slice], body: np.ndarray, spiky: np.ndarray
) -> None:
    """The ground glass of a nodule; vessels are painted over it and stay visible."""
    if nodule.texture == GROUND_GLASS:
        canvas.fill(box, body, nodule.hu, edge_mm=canvas.edge_mm + 2)
    elif nodule.texture == PART_SOLID:
        canvas.fill(box, body, -420, edge_mm=canvas.edge_mm + 1.5)


def paint_nodule(
    canvas: Canvas, nodule: Nodule, box: tuple[slice, slice], body: np.ndarray, spiky: np.ndarray
) -> None:
    """The solid part of a nodule with its spicules, and its cavity."""
    if nodule.texture == GROUND_GLASS:
        return
    if nodule.texture == PART_SOLID:
        canvas.fill(box, body + np.float32(0.2 * nodule.diameter_mm), nodule.hu)
        return
    canvas.fill(box, spiky, nodule.hu * 0.5, opacity=0.7)
    # Malignant nodules have a blurred margin.
    canvas.fill(box, body, nodule.hu, edge_mm=canvas.edge_mm + 0.35 * (nodule.malignancy - 1))
    if nodule.cavity_mm:
        canvas.fill(box, body + np.float32(nodule.diameter_mm / 2 - nodule.cavity_mm), -900)


def paint_embolus(canvas: Canvas, embolus: Embolus, z: float, blood_hu: float) -> float:
    """Puts an embolus in the place of arterial blood of some HU; returns the mm^2 that it takes.
    It takes only blood that the slice shows, so that no embolus counts that a reader could not
    see."""
    cut = canvas.tubes(embolus.tubes, z, z_scale=1.0 if embolus.central else 0.6)
    if cut is None:
        return 0.0
    box, distance = cut
    taken = np.clip(0.5 - distance / np.float32(canvas.edge_mm), 0, 1) * canvas.artery[box]
    canvas.hu[box] += (np.float32(embolus.hu) - np.float32(blood_hu)) * taken
    canvas.artery[box] -= taken
    return float(taken.sum()) * canvas.pixel_mm**2
