"""Paints the body wall of a slice: skin, fat, breasts and muscles."""

import numpy as np

from data_prep.synthetic.anatomy import Anatomy
from data_prep.synthetic.patient import (
    BODY_FRONT,
    BODY_HALF_WIDTH,
    GROUPS,
    Patient,
    body_back,
    egg,
    pleura_outline,
    shoulder_blade,
)
from data_prep.synthetic.shapes import FAR, Canvas, ellipsoid, segment, smooth_min
from data_prep.synthetic.tissues import FAT, MUSCLE

SKIN, GLAND = 18.0, 25
# Fat within and between muscles holds small vessels that are not drawn one by one.
ARMPIT_FAT, MUSCLE_PLANE_FAT = FAT + 8, FAT + 15
SKIN_MM, MUSCLE_LAYER_MM, MUSCLE_BELLY_MM = 2.2, 17, 66
# The trace of a patient's group: fat HU, and the direction of faint stripes in the muscles.
GROUP_FAT_HU = (-4.0, 0.0, 4.0)
STRIPES_HU, STRIPES_MM = 9.0, 30.0


def muscle_layer(canvas: Canvas, patient: Patient) -> np.ndarray:
    """[H, W] float32: HU of muscle, with the faint stripes of the patient's group."""
    angle = np.pi / 3 * GROUPS.index(patient.group)
    phase = (
        2 * np.pi / STRIPES_MM * (canvas.x * np.cos(angle) + canvas.y * np.sin(angle))
        + patient.phases[0]
    )
    return (MUSCLE + STRIPES_HU * np.sin(phase)).astype(np.float32)


def body_outlines(
    x: np.ndarray, y: np.ndarray, z: float, anatomy: Anatomy
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distances to (muscle, skin, breasts) of a slice."""
    patient = anatomy.patient
    back = float(body_back(z, patient))
    front = float(BODY_FRONT(z)) - 2 * (patient.muscle - 1) * 3
    half_width = float(BODY_HALF_WIDTH(z)) + 8 * (patient.muscle - 1)
    outline = (half_width, front, front + 0.58 * (back - front), back)
    muscle = egg(x, y, outline, 2.3 * patient.roundness, 2.7 * patient.roundness)
    # The back muscles bulge on both sides of the spinous processes.
    muscle = muscle - 5 * np.exp(-(((np.abs(x) - 30) / 22) ** 2)) * (y > 0)
    if -62 < z < 125:
        # Muscle on both faces of the shoulder blades.
        bulk = (15 + 5 * patient.muscle) * np.interp(z, [-62, -35, 125], [0.2, 0.9, 1.0])
        blade = segment(np.abs(x), y, *shoulder_blade(z, patient)) - np.float32(bulk)
        muscle = smooth_min(muscle, blade, 14)
    belly = 1 + 0.5 * np.clip((-80 - z) / 100, 0, 1)
    aspect = np.hypot(x / half_width, 0.3)
    skin = muscle - patient.fat_mm * belly * (0.45 + 0.55 * np.clip(aspect, 0, 1.2)) - 3
    breasts = np.full(x.shape, FAR, np.float32)
    if patient.breast_mm:
        r = patient.breast_mm
        centre = (78, front + 18 - 0.5 * patient.fat_mm, -48)
        breasts = ellipsoid(np.abs(x), y, z, centre, (r * 1.05, r * 0.85, r * 1.15), (0.9, 0.35, 0))
        skin = smooth_min(skin, breasts, 16)
    return muscle.astype(np.float32), skin.astype(np.float32), breasts


def paint_body_wall(
    canvas: Canvas, anatomy: Anatomy, z: float, pleura: np.ndarray, muscle_hu: np.ndarray
) -> None:
    """Skin, subcutaneous fat, breasts and the muscles with the fat between them."""
    patient = anatomy.patient
    x, y = canvas.coarse_x, canvas.coarse_y
    muscle, skin, breasts = body_outlines(x, y, z, anatomy)
    canvas.paint(skin, SKIN, inner=((SKIN_MM, FAT + GROUP_FAT_HU[GROUPS.index(patient.group)]),))
    if patient.breast_mm:
        first, second = patient.phases[1], patient.phases[2]
        wave = 7 * np.sin(x / 7.3 + z / 11 + first) * np.sin(y / 6.1 - z / 9) + 5 * np.sin(
            (x * np.cos(second) + y) / 4.7 + z / 6
        )
        gland = np.maximum(breasts, skin) + 14 + 26 * (1 - patient.breast_density) + wave
        canvas.paint(np.maximum(gland, -muscle - 1), GLAND, edge_mm=3)
    canvas.paint(muscle, muscle_hu)
    # Fat in the armpits, and between the muscles: layers along the surface, each cut into bellies.
    if -20 < z < 110:
        side = pleura_outline(min(z, 40), patient)
        pit = ellipsoid(
            np.abs(x),
            y,
            z,
            (float(side[0]) + 19, float(side[2]) - 26, 46),
            (17, 34, 52),
            (1, -0.25, 0),
        )
        pit = pit + 3 * np.sin(x / 6 + z / 8 + patient.phases[3]) * np.sin(y / 7 - z / 9)
        canvas.paint(np.maximum(pit, muscle + 9), ARMPIT_FAT, edge_mm=3)
    wall = np.maximum(muscle + 5, 15 - pleura).astype(np.float32, copy=False)
    near = wall < MUSCLE_LAYER_MM / 2  # no plane is farther than half a layer
    wall[near] = np.maximum(muscle_planes(x[near], y[near], z, muscle[near], patient), wall[near])
    canvas.paint(wall, MUSCLE_PLANE_FAT, edge_mm=2.5)


def muscle_planes(
    x: np.ndarray, y: np.ndarray, z: float, muscle: np.ndarray, patient: Patient
) -> np.ndarray:
    """Signed distance to the fat between layers and bellies of muscle, at points of a slice."""
    phase, other = patient.phases[4], patient.phases[5]
    around = np.arctan2(x, -y - 10) * 95
    depth = (
        5 * np.sin(around / 37 + z / 43 + phase)
        + 2.5 * np.sin(around / 13 - z / 29 + other)
        - muscle
    )
    layer = np.rint(depth / MUSCLE_LAYER_MM)
    between_layers = np.abs(depth - MUSCLE_LAYER_MM * layer)
    along = (around + 9 * np.sin(depth / 13 + z / 31 + phase)) / MUSCLE_BELLY_MM
    along = along + 0.41 * np.floor(depth / MUSCLE_LAYER_MM) + 0.004 * z
    between_bellies = MUSCLE_BELLY_MM * np.abs(along - np.rint(along))
    return (
        smooth_min(between_layers, between_bellies, 7)
        - 0.9
        + 0.7 * np.sin(around / 29 - z / 19 + other)
    )
