"""Paints what lies below the diaphragm."""

import numpy as np

from data_prep.synthetic.anatomy import Anatomy
from data_prep.synthetic.patient import diaphragm, spine_y
from data_prep.synthetic.scan import Enhancement
from data_prep.synthetic.shapes import Canvas, ellipse, ellipsoid, smooth_max, smooth_min
from data_prep.synthetic.tissues import FAT, MUSCLE

# HU, and lengths in mm of the reference space.
STOMACH_WALL, STOMACH_CONTENTS, STOMACH_AIR, COLON_WALL = 48, 22, -970, 42
RENAL_SINUS_FAT = FAT + 30
DIAPHRAGM_MM, STOMACH_WALL_MM, COLON_WALL_MM = 2.6, 3.2, 2.2
LIVER_GRAIN_HU, STOMACH_GRAIN_HU, COLON_GRAIN_HU = 5, 9, 80


def paint_abdomen(
    canvas: Canvas,
    anatomy: Anatomy,
    z: float,
    blood: Enhancement,
    pleura: np.ndarray,
    texture: np.ndarray,
) -> None:
    """Diaphragm, liver, stomach, spleen and kidneys below the domes."""
    patient = anatomy.patient
    if z > max(patient.dome_right_z, patient.dome_left_z) + 2:
        return
    x, y = canvas.coarse_x, canvas.coarse_y
    spine = float(spine_y(z, patient))
    inside = smooth_max(diaphragm(x, y, z, patient), pleura, 3)
    canvas.paint(inside, MUSCLE, inner=((DIAPHRAGM_MM, FAT),))
    centre = patient.dome_left_z - 50
    first, second = patient.phases[7], patient.phases[8]
    wave = 2.5 * np.sin(x / 9 + z / 13 + first) * np.sin(y / 11 - z / 17 + second)
    s, (right, back, up) = patient.stomach_scale, patient.stomach_shift
    stomach = ellipsoid(
        x,
        y,
        z,
        (58 + right, -22 + back, centre + up),
        (56 * s, 43 * s, 48 * s),
        (0.8, -0.5, -0.3),
    )
    stomach = smooth_max(stomach + wave, inside + 4, 4)
    spleen = smooth_max(
        ellipsoid(x, y, z, (94, 44, centre - 6), (50, 30, 54), (0.5, -0.8, 0)) - wave, inside + 3, 4
    )
    spleen = smooth_max(spleen, -(stomach - 4), 4)
    lobe_radii = tuple(radius * patient.liver_scale for radius in (78, 34, 44))
    lobe = ellipsoid(x, y, z, (8, -46, patient.dome_right_z - 52), lobe_radii, (1, -0.15, -0.1))
    liver = smooth_min(x + np.float32(22 + 0.17 * z) + 0.004 * (y + 25) ** 2, lobe, 12)
    liver = smooth_max(liver, inside + 1.4, 3)
    cava_side = ellipse(x, y, (-6, spine - 22), (24, 22))
    liver = smooth_max(liver, -cava_side, 6)
    kidneys = ellipsoid(np.abs(x), y, z, (58, spine - 2, -214), (46, 27, 23), (0.1, 0.1, 1))
    liver = smooth_max(liver, -(kidneys - 4), 6)
    liver = smooth_max(liver, -(stomach - 4), 4)
    canvas.paint(liver, (blood.liver + LIVER_GRAIN_HU * texture).astype(np.float32))
    branch = np.sin(x / 26 + z / 19 + first) * 14 + np.sin(y / 31 + z / 23 + second) * 9
    branch = np.abs(branch) - 1.6
    canvas.paint(np.maximum(branch, liver + 9), blood.liver_vessels, edge_mm=3)
    canvas.paint(spleen, blood.spleen)
    canvas.paint(stomach, STOMACH_WALL)
    contents = stomach + STOMACH_WALL_MM
    canvas.paint(contents, (STOMACH_CONTENTS + STOMACH_GRAIN_HU * texture).astype(np.float32))
    canvas.paint(smooth_max(contents, y + np.float32(38 - back), 2), STOMACH_AIR)
    colon = canvas.tubes(anatomy.colon, z, around_mm=1.0)
    if colon is not None:
        canvas.fill(*colon, COLON_WALL)
        canvas.fill(
            colon[0],
            colon[1] + COLON_WALL_MM,
            (COLON_GRAIN_HU * texture - 10).clip(-700, 110).astype(np.float32),
        )
    canvas.paint(kidneys, blood.kidney)
    sinus = ellipsoid(np.abs(x), y, z, (50, spine - 4, -214), (24, 9, 10), (0.1, 0.1, 1))
    canvas.paint(sinus, RENAL_SINUS_FAT, edge_mm=4)
    crus = np.abs(ellipse(x, y, (4, spine - 14), (26, 24))) - 2.2
    canvas.paint(np.maximum(crus, y - np.float32(spine)), MUSCLE)
