"""Opacities that take the place of aerated lung: fluid, collapsed and consolidated lung.

Shapes in reference space. Findings are placed in what they leave of the lungs, so that none hides a
nodule or an embolus.
"""

import dataclasses

import numpy as np

from data_prep.synthetic.shapes import ellipsoid, smooth_max


@dataclasses.dataclass(frozen=True)
class Opacity:
    """One opacity between two heights, of some HU.

    `kind` "effusion": free fluid of the side `side` (1 left, -1 right), behind the level `level` at
    the height `low_z` and climbing along the pleura; `up` is 1 if the patient lies on the back, -1
    on the front. Other kinds are ellipsoids of `centre`, `radii` and `axis` whose border waves by
    `phase`.
    """

    kind: str
    low_z: float
    high_z: float
    hu: float
    side: int = 1
    level: float = 0.0
    up: int = 1
    centre: tuple[float, float, float] = (0.0, 0.0, 0.0)
    radii: tuple[float, float, float] = (1.0, 1.0, 1.0)
    axis: tuple[float, float, float] = (1.0, 0.0, 0.0)
    phase: float = 0.0


def opacity_distance(
    opacity: Opacity, x: np.ndarray, y: np.ndarray, z: float, pleura: np.ndarray
) -> np.ndarray:
    """Signed distance to an opacity, from the distance to the pleura; lungs are not cut out."""
    if opacity.kind == "effusion":
        level = opacity.level + 0.35 * (z - opacity.low_z)
        climbing = 14 * np.exp(np.clip(pleura, -60, 0) / 8)
        fluid = np.float32(level) - opacity.up * y - climbing
        return smooth_max(fluid, -opacity.side * x, 6).astype(np.float32)
    wave = 4 * np.sin(x / 11 + z / 9 + opacity.phase) * np.sin(y / 9 - z / 13)
    shape = ellipsoid(x, y, z, opacity.centre, opacity.radii, opacity.axis)
    return (shape + wave * min(1.0, min(opacity.radii) / 20)).astype(np.float32)


def sample_opacities(
    base_z: float, prone: bool, share: float, rng: np.random.Generator
) -> tuple[Opacity, ...]:
    """The opacities of one patient.

    Args:
      base_z: top of the diaphragm's domes, reference space.
      prone: whether the patient lies on the front.
      share: factor of all frequencies, 1 as in a mixed archive.
      rng: random numbers.
    """
    opacities: list[Opacity] = []
    up, back = (-1, -55.0) if prone else (1, 60.0)
    if rng.random() < 0.2 * share:
        sides = ((1,), (-1,), (1, -1))[int(rng.integers(3))]
        for side in sides:
            level = float(rng.uniform(15, 75)) if up == 1 else float(rng.uniform(40, 85))
            height = float(rng.uniform(70, 190))
            hu = float(rng.normal(12, 6))
            opacities.append(Opacity("effusion", -200.0, -200 + height + 60, hu, side, level, up))
    if rng.random() < 0.22 * share:  # lung that has collapsed where it is dependent, or a plate
        for _ in range(int(rng.integers(1, 3))):
            side = int(rng.choice([-1, 1]))
            flat = float(rng.uniform(4, 16))
            centre = (
                side * float(rng.uniform(55, 95)),
                back * float(rng.uniform(0.2, 1.1)),
                base_z - float(rng.uniform(-15, 40)),
            )
            opacities.append(
                _ellipsoid(
                    "atelectasis",
                    centre,
                    (float(rng.uniform(24, 48)), float(rng.uniform(14, 32)), flat),
                    float(rng.normal(50, 15)),
                    rng,
                )
            )
    if rng.random() < 0.2 * share:
        for _ in range(int(rng.integers(1, 4))):
            side = int(rng.choice([-1, 1]))
            centre = (
                side * float(rng.uniform(45, 105)),
                float(rng.uniform(-55, 65)),
                float(rng.uniform(base_z - 40, 70)),
            )
            radii = tuple(float(r) for r in rng.uniform(16, 46, 3))
            opacities.append(
                _ellipsoid("consolidation", centre, radii, float(rng.normal(35, 18)), rng)
            )
    return tuple(opacities)


def _ellipsoid(kind, centre, radii, hu, rng) -> Opacity:
    axis = rng.normal((1.0, 0.0, 0.0), 0.35)
    reach = max(radii) + 6
    return Opacity(
        kind,
        centre[2] - reach,
        centre[2] + reach,
        hu,
        centre=centre,
        radii=radii,
        axis=tuple(float(v) for v in axis),
        phase=float(rng.uniform(0, 2 * np.pi)),
    )
