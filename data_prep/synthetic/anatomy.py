"""The anatomy of a synthetic patient: lungs between the organs that shape them, skeleton, vessel
trees. In the reference space of `patient`."""

import dataclasses

import numpy as np

from data_prep.synthetic.implants import Implant
from data_prep.synthetic.opacities import Opacity, opacity_distance
from data_prep.synthetic.patient import (
    PLEURA_FRONT,
    Patient,
    diaphragm,
    heart_distance,
    pleura_distance,
    pleura_outline,
    spine_y,
)
from data_prep.synthetic.shapes import (
    Capsules,
    ellipse,
    join,
    polyline,
    smooth_max,
    smooth_min,
    tube_distance,
)
from data_prep.synthetic.vessels import Vessels, great_vessels, grow_trees


@dataclasses.dataclass(frozen=True)
class Anatomy:
    """A patient with skeleton and vessel trees, in reference space."""

    patient: Patient
    ribs: Capsules
    cartilage: Capsules
    clavicles: Capsules
    colon: Capsules
    vessels: Vessels
    opacities: tuple[Opacity, ...] = ()
    implants: tuple[Implant, ...] = ()


def mediastinum(
    x: np.ndarray, y: np.ndarray, z: float, anatomy: Anatomy, heart: np.ndarray
) -> np.ndarray:
    """Signed distance to the mediastinum, from the distance to the heart with its fat."""
    patient = anatomy.patient
    spine = float(spine_y(z, patient))
    closing = float(np.sqrt(1 - np.clip((z + 45) / 143, 0, 0.9999) ** 2.7))
    half = 5 + 12 * np.exp(-(((y - spine + 45) / 34) ** 2)) + 40 * (1 - closing) ** 1.1
    lean = 6 * np.exp(-(((z + 60) / 50) ** 2))
    distance = np.abs(x - np.float32(lean)) - half
    distance = smooth_min(distance, ellipse(x, y, (0, spine + 6), (24, 24)), 9)
    distance = smooth_min(distance, heart, 10)
    return smooth_min(
        distance, tube_distance(x, y, z, anatomy.vessels.mediastinal) - 2.5, 10
    ).astype(np.float32)


def lungs(
    x: np.ndarray, y: np.ndarray, z: float, anatomy: Anatomy, pleura: np.ndarray
) -> np.ndarray:
    """Signed distance to the aerated lungs of a slice, from the distance to the pleura."""
    return aerated(lung_space(x, y, z, anatomy, pleura), x, y, z, anatomy, pleura)


def aerated(
    space: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    z: float,
    anatomy: Anatomy,
    pleura: np.ndarray,
) -> np.ndarray:
    """Signed distance to what the opacities leave of the lungs' space."""
    for opacity in anatomy.opacities:
        if opacity.low_z < z < opacity.high_z:
            space = smooth_max(space, -opacity_distance(opacity, x, y, z, pleura), 3)
    return space


def lung_space(
    x: np.ndarray, y: np.ndarray, z: float, anatomy: Anatomy, pleura: np.ndarray
) -> np.ndarray:
    """Signed distance to the space that healthy lungs fill."""
    patient = anatomy.patient
    heart = heart_distance(x, y, z, patient) - 5
    distance = smooth_max(pleura, -mediastinum(x, y, z, anatomy, heart), 6)
    if z < max(patient.dome_right_z, patient.dome_left_z) + 4:
        distance = smooth_max(distance, -diaphragm(x, y, z, patient), 3)
    return distance.astype(np.float32)


def build_anatomy(
    patient: Patient,
    opacities: tuple[Opacity, ...] = (),
    implants: tuple[Implant, ...] = (),
) -> Anatomy:
    """Skeleton and vessel trees of a patient. The trees fill the patient's own aerated lungs."""
    great = great_vessels(patient, lambda z: spine_y(z, patient))
    skeleton = (*_ribs(patient), _clavicles(patient), _colon(patient))
    anatomy = Anatomy(patient, *skeleton, great, opacities, implants)
    return dataclasses.replace(
        anatomy, vessels=grow_trees(great, _lung_points(anatomy), patient.seed)
    )


def _lung_points(anatomy: Anatomy) -> np.ndarray:
    """Points [N, 3] float32 spread evenly over both lungs, 3 mm or more inside."""
    rng = np.random.default_rng(anatomy.patient.seed)
    points = []
    for z in np.arange(-188.0, 98.0, 8.0):
        x, y = np.meshgrid(np.arange(-136.0, 137, 4.6), np.arange(-104.0, 105, 4.6))
        x = (x + rng.uniform(-2.3, 2.3, x.shape)).astype(np.float32)
        y = (y + rng.uniform(-2.3, 2.3, x.shape)).astype(np.float32)
        inside = lungs(x, y, z, anatomy, pleura_distance(x, y, z, anatomy.patient)) < -2
        heights = z + rng.uniform(-4, 4, inside.sum())
        points.append(np.stack([x[inside], y[inside], heights], axis=1))
    return np.concatenate(points).astype(np.float32)


def _on_pleura(
    angle: np.ndarray, z: np.ndarray, patient: Patient, outward_mm: float
) -> tuple[np.ndarray, np.ndarray]:
    """Points (x, y) at an angle from posterior (0) to anterior (pi) on the pleura at z, moved
    outward."""
    half_width, front, middle, back = pleura_outline(np.minimum(z, 84), patient)
    power = patient.roundness * np.where(angle > np.pi / 2, 2.2, 2.35)
    sin, cos = np.abs(np.sin(angle)), np.cos(angle)
    x = (half_width + outward_mm) * sin ** (2 / power)
    reach = np.where(cos < 0, middle - front, back - middle) + outward_mm
    return x, middle + np.sign(cos) * reach * np.abs(cos) ** (2 / power)


def _ribs(patient: Patient) -> tuple[Capsules, Capsules]:
    """Twelve pairs of ribs and the cartilage that joins the upper ten to the sternum."""
    bone, cartilage = [], []
    for number in range(1, 13):
        head_z = 84 - 23.0 * (number - 1)
        drop = np.interp(number, [1, 2, 4, 7, 10, 12], [28, 52, 76, 100, 104, 70])
        last = np.interp(number, [1, 7, 8, 10, 11, 12], [2.65, 2.62, 2.45, 2.2, 1.8, 1.25])
        angle = np.linspace(0.36, last, 22)
        z = head_z + 2 - drop * ((1 - np.cos(angle)) / 2) ** 0.65
        x, y = _on_pleura(angle, z, patient, 5.5)
        spine = float(spine_y(head_z, patient))
        head = [(19, spine + 9, head_z), (30, spine + 20, head_z + 2)]
        points = np.concatenate([head, np.stack([x, y, z], axis=1)])
        radius = np.concatenate([[4.2, 3.8], np.full(len(x), 4.0)])
        for side in (1, -1):
            bone.append(polyline(points * [side, 1, 1], radius))
        if number <= 10:
            start = points[-1]
            goal_z = np.interp(number, [1, 2, 7, 10], [48, 36, -74, -90])
            goal_y = float(PLEURA_FRONT(goal_z)) - 4
            goal = np.array([np.interp(number, [1, 7, 8, 10], [22, 14, 30, 52]), goal_y, goal_z])
            middle = (start + goal) / 2 + [0, -3, -4]
            for side in (1, -1):
                curve = np.array([start, middle, goal]) * [side, 1, 1]
                cartilage.append(polyline(curve, [4.2, 5.0, 5.0]))
    return join(bone), join(cartilage)


def _colon(patient: Patient) -> Capsules:
    """The transverse colon up to its splenic flexure, in front of and beside the stomach."""
    z = patient.dome_left_z
    points = [
        (-30, -68, z - 92),
        (14, -74, z - 84),
        (58, -72, z - 76),
        (92, -48, z - 62),
        (104, -16, z - 58),
    ]
    return polyline([*points, (108, 8, z - 76), (106, 10, z - 120)], [17, 16, 18, 17, 18, 16, 16])


def _clavicles(patient: Patient) -> Capsules:
    """Collar bones and the heads of the upper arms, raised with the arms."""
    front = float(PLEURA_FRONT(58)) - 8
    inner, outer = (24, front, 54), (118, front + 44, 112)
    points = np.array([inner, (48, front - 3, 66), (82, front + 14, 88), outer])
    arm = np.array([(158, front + 66, 116), (190, front + 40, 170)])
    return join(
        [polyline(points * [side, 1, 1], [8.0, 6.5, 5.5, 6.5]) for side in (1, -1)]
        + [polyline(arm * [side, 1, 1], [22.0, 14.0]) for side in (1, -1)]
    )
