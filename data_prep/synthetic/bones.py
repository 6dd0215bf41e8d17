"""Paints the skeleton of the phantom: vertebrae, ribs, sternum, clavicles and shoulder blades."""

import numpy as np

from data_prep.synthetic.anatomy import Anatomy
from data_prep.synthetic.patient import (
    DISC_Z,
    PLEURA_FRONT,
    VERTEBRA_HEIGHT,
    shoulder_blade,
    spine_y,
)
from data_prep.synthetic.shapes import Canvas, ellipse, segment, smooth_max, smooth_min

CORTEX = 520.0


def paint_skeleton(canvas: Canvas, anatomy: Anatomy, z: float, texture: np.ndarray) -> None:
    """All bones of a slice."""
    patient = anatomy.patient
    marrow = (patient.bone_hu + 22 * texture).astype(np.float32)
    paint_shoulder_blades(canvas, anatomy, z)
    cartilage = canvas.tubes(anatomy.cartilage, z, 0.7)
    if cartilage is not None:
        canvas.fill(*cartilage, 95 + 1.2 * max(0, patient.age - 50))
        if patient.age > 55:
            canvas.fill(cartilage[0], np.abs(cartilage[1] + 1) - 0.5, 330, opacity=0.7)
    for bones, z_scale in ((anatomy.ribs, 0.6), (anatomy.clavicles, 0.9)):
        cut = canvas.tubes(bones, z, z_scale)
        if cut is not None:
            canvas.fill(*cut, CORTEX + 150)
            canvas.fill(cut[0], cut[1] + 1.4, marrow - 50)
    paint_sternum(canvas, z, marrow)
    paint_vertebra(canvas, anatomy, z, marrow)


def paint_sternum(canvas: Canvas, z: float, marrow: np.ndarray) -> None:
    """Manubrium and body of the sternum: a flat box in front of the pleura."""
    if not -96 < z < 62:
        return
    half_width = float(np.interp(z, [-96, -80, -40, 14, 20, 50, 62], [6, 15, 18, 15, 21, 30, 24]))
    y = float(PLEURA_FRONT(z)) - 7.5
    box = canvas.box(0, y, 40)
    u = np.abs(canvas.x[box]) - np.float32(half_width - 5)
    v = np.abs(canvas.y[box] - np.float32(y) - 0.004 * canvas.x[box] ** 2) - np.float32(0.5)
    distance = (
        np.hypot(np.maximum(u, 0), np.maximum(v, 0))
        + np.minimum(np.maximum(u, v), 0)
        - np.float32(5.0)
    )
    canvas.fill(box, distance, CORTEX)
    canvas.fill(box, distance + 1.6, marrow - 30)


def paint_shoulder_blades(canvas: Canvas, anatomy: Anatomy, z: float) -> None:
    """Scapulae, turned outward by the raised arms, each a thin blade with a thicker outer border
    and a spine."""
    if not -62 < z < 125:
        return
    lift = (z + 62) / 160
    inner, outer = shoulder_blade(z, anatomy.patient)
    for side in (1, -1):
        ends = ((side * inner[0], inner[1]), (side * outer[0], outer[1]))
        box = canvas.box((ends[0][0] + ends[1][0]) / 2, (inner[1] + outer[1]) / 2, 22 + 27 * lift)
        x, y = canvas.x[box], canvas.y[box]
        blade = segment(x, y, *ends) - 2.2
        blade = smooth_min(blade, np.hypot(x - ends[1][0], y - ends[1][1]) - (4 + 5 * lift), 6)
        if 40 < z < 100:
            tip = (side * (outer[0] - 4), outer[1] + 34)
            middle = ((ends[0][0] * 0.55 + ends[1][0] * 0.45), inner[1] * 0.55 + outer[1] * 0.45)
            blade = smooth_min(blade, segment(x, y, middle, tip) - 2.6, 5)
        canvas.fill(box, blade, CORTEX)
        canvas.fill(box, blade + 2.0, 220)


def paint_vertebra(canvas: Canvas, anatomy: Anatomy, z: float, marrow: np.ndarray) -> None:
    """The vertebra or disc at z: body, arch around the canal, transverse and spinous processes."""
    patient = anatomy.patient
    level = ((z - DISC_Z) / VERTEBRA_HEIGHT) % 1.0
    grow = float(np.interp(z, [-200, 110], [1.22, 0.82]))
    spine = float(spine_y(z, patient))
    box = canvas.box(0, spine + 22, 46)
    x, y = canvas.x[box], canvas.y[box] - np.float32(spine)
    waist = 1 - 0.09 * np.sin(np.pi * level)
    body = ellipse(x, y, (0, 0), (18.5 * grow * waist, 15.5 * grow * waist))
    back = 12.5 * grow
    body = smooth_max(body, y - np.float32(back), 3)
    canal_y = back + 8.5
    canal = ellipse(x, y, (0, canal_y), (10 * grow**0.5, 8.2 * grow**0.5))
    arch = np.abs(canal - 3.2) - np.float32(2.6 + 1.6 * np.sin(np.pi * level) ** 2)
    arch = smooth_max(arch, 4 - y, 3)
    open_side = 0.42 < level < 0.92
    if not open_side:
        # Below the pedicles the arch is open towards the sides: the foramina of the nerves.
        arch = np.maximum(arch, canal_y - 2 - y)
    wing = segment(np.abs(x), y, (10 * grow, canal_y + 4), (33 * grow, canal_y + 13)) - np.float32(
        4.3
    )
    run = (0.75 - level) % 1.0
    start = canal_y + 6 + 11 * run
    process = segment(x, y, (0, start), (0, start + 9)) - np.float32(2.6 + 1.2 * run)
    bone = smooth_min(arch, process, 4)
    if 0.45 < level < 0.85:
        bone = smooth_min(bone, wing, 5)
    canvas.fill(box, bone, CORTEX)
    canvas.fill(box, bone + 1.6, marrow + 30)
    edge = min(level, 1 - level) * VERTEBRA_HEIGHT
    if edge < 2.3:
        canvas.fill(box, body - 0.5, 82)
    else:
        plate = float(np.clip((5 - edge) / 2.5, 0, 1))
        canvas.fill(box, body, CORTEX - 60)
        canvas.fill(box, body + 1.5, marrow + 100 * plate)
    canvas.fill(box, canal, -20)
    canvas.fill(box, canal + 2.2, 32)
