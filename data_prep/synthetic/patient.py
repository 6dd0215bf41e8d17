"""The anatomy of a synthetic patient: parameters, outlines of body, lungs and diaphragm, skeleton,
vessel trees.

Everything is defined in a reference space (x to the patient's left, y to posterior, z to superior,
mm, z = 0 at the carina of an average adult) and scaled per patient by `Patient.scale`.
"""

import dataclasses

import numpy as np
from scipy.interpolate import PchipInterpolator

from data_prep.synthetic.shapes import (
    FAR,
    ellipse,
    ellipsoid,
    smooth_max,
    smooth_min,
)

APEX_Z, BASE_Z = 108.0, -196.0
VERTEBRA_HEIGHT = 23.0
GROUPS = ("group_a", "group_b", "group_c")
DISC_Z = 8.0


@dataclasses.dataclass(frozen=True)
class Patient:
    """Parameters of one synthetic patient. Lengths in mm of the reference space unless said; angles
    in degrees."""

    age: int
    sex: str
    # one of GROUPS: a made-up attribute with a faint trace in muscle and fat, see `render`
    group: str
    # build: factors along x, y, z from the reference space to the patient
    scale: tuple[float, float, float]
    fat_mm: float  # subcutaneous fat at the flank
    muscle: float  # 1 is average
    heart_scale: float
    heart_shift: tuple[float, float, float]  # of the heart, mm
    heart_turn: tuple[float, float]  # of its axis, in the axial and in the frontal plane
    right_ventricle_scale: float  # width relative to the usual; a strained one is wide
    dome_right_z: float  # top of the right dome of the diaphragm (inspiration depth)
    dome_left_z: float
    liver_scale: float  # of the left lobe
    stomach_scale: float
    stomach_shift: tuple[float, float, float]
    breast_mm: float  # radius of a breast; 0 for none
    breast_density: float  # share of fibroglandular tissue
    bone_hu: float  # trabecular bone of the vertebrae
    aorta_scale: float
    aortic_calcification: float  # 0 to 1
    lung_hu: float
    scoliosis_mm: float
    asymmetry: tuple[float, float, float]  # amplitude in mm and two phases of a smooth displacement
    kyphosis: float
    roundness: float  # of the chest: 1 is usual, below it is a diamond, above it a box
    phases: tuple[float, ...]  # by which the patterns in tissues are displaced, radians
    seed: int  # of the vessel trees and textures

    @property
    def chest_extent_mm(self) -> tuple[float, float]:
        """z of the lowest and the highest slice that cover the lungs from base to apex, mm of the
        patient."""
        return BASE_Z * self.scale[2], APEX_Z * self.scale[2]

    @property
    def lung_extent_mm(self) -> tuple[float, float]:
        """z between which both lungs fill much of the slice, mm of the patient."""
        return (self.dome_left_z - 32) * self.scale[2], 78 * self.scale[2]

    @property
    def body_width_mm(self) -> float:
        """Approximate width of the body at the lung base, mm of the patient."""
        return (2 * 150 + 2.4 * self.fat_mm) * self.scale[0]


def sample_patient(rng: np.random.Generator) -> Patient:
    """Draws a patient: adults, both sexes, builds and body fat over the range seen in chest CT. Age
    and sex shape the anatomy; the group is independent of both."""
    sex = str(rng.choice(["F", "M"]))
    age = int(np.clip(rng.normal(60, 15), 19, 94))
    height = rng.normal(0.95 if sex == "F" else 1.03, 0.05)
    girth = rng.normal(0, 0.06)
    lung_shift = float(np.clip(rng.normal(0, 15), -30, 30))
    return Patient(
        age=age,
        sex=sex,
        group=str(rng.choice(GROUPS)),
        scale=(
            float(np.clip(height * (1 + girth), 0.8, 1.18)),
            float(np.clip(height * (1 + girth + rng.normal(0, 0.08)), 0.76, 1.22)),
            float(np.clip(height * (1 + rng.normal(0, 0.05)), 0.82, 1.16)),
        ),
        fat_mm=float(np.clip(rng.lognormal(2.6, 0.5), 5, 42)),
        muscle=float(
            np.clip(rng.normal(1.0 if sex == "M" else 0.82, 0.12) - 0.003 * (age - 60), 0.5, 1.4)
        ),
        heart_scale=float(np.clip(rng.normal(1.0, 0.08) + 0.002 * (age - 60), 0.82, 1.25)),
        heart_shift=(float(rng.normal(0, 7)), float(rng.normal(0, 4)), float(rng.normal(0, 8))),
        heart_turn=(
            float(np.clip(rng.normal(0, 10), -22, 22)),
            float(np.clip(rng.normal(0, 10), -22, 22)),
        ),
        right_ventricle_scale=float(np.clip(rng.normal(1.0, 0.04), 0.9, 1.08)),
        dome_right_z=-92 + lung_shift,
        dome_left_z=-102 + lung_shift + float(np.clip(rng.normal(0, 9), -20, 20)),
        liver_scale=float(np.clip(rng.normal(1.0, 0.2), 0.5, 1.45)),
        stomach_scale=float(np.clip(rng.normal(0.95, 0.18), 0.55, 1.25)),
        stomach_shift=(float(rng.normal(0, 8)), float(rng.normal(0, 8)), float(rng.normal(0, 10))),
        breast_mm=float(np.clip(rng.normal(50, 9), 32, 72)) if sex == "F" else 0.0,
        breast_density=float(np.clip(rng.beta(2, 3) - 0.005 * (age - 55), 0.05, 0.9)),
        bone_hu=float(np.clip(rng.normal(200 - 2.3 * (age - 40), 22), 45, 270)),
        aorta_scale=float(np.clip(rng.normal(1.0, 0.06) + 0.006 * (age - 60), 0.76, 1.35)),
        aortic_calcification=float(np.clip((age - 50) / 35 + rng.normal(0, 0.15), 0, 1)),
        lung_hu=float(rng.normal(-858, 16)),
        scoliosis_mm=float(rng.normal(0, 4)),
        asymmetry=(
            float(rng.uniform(2, 7)),
            float(rng.uniform(0, 6.3)),
            float(rng.uniform(0, 6.3)),
        ),
        kyphosis=float(np.clip(rng.normal(1.0, 0.22) + 0.004 * (age - 60), 0.5, 1.7)),
        roundness=float(np.clip(rng.normal(1.0, 0.1), 0.8, 1.25)),
        phases=tuple(float(angle) for angle in rng.uniform(0, 2 * np.pi, 9)),
        seed=int(rng.integers(2**31)),
    )


def sample_illness(patient: Patient, rng: np.random.Generator) -> Patient:
    """The patient, one in six with a large heart, one in six with emphysema: dark, large lungs in a
    deep chest above a flat diaphragm."""
    if rng.random() < 1 / 6:
        factor = float(rng.uniform(1.12, 1.35))
        patient = dataclasses.replace(patient, heart_scale=min(patient.heart_scale * factor, 1.42))
    if rng.random() < 1 / 6:
        drop = float(rng.uniform(6, 16))
        x, y, z = patient.scale
        patient = dataclasses.replace(
            patient,
            lung_hu=float(rng.uniform(-945, -905)),
            dome_right_z=patient.dome_right_z - drop,
            dome_left_z=patient.dome_left_z - drop,
            scale=(x, min(1.24, y * float(rng.uniform(1.03, 1.12))), z),
        )
    return patient


def _profile(*knots: tuple[float, float]) -> PchipInterpolator:
    return PchipInterpolator(*np.array(sorted(knots), float).T)


# Half widths and front and back borders (mm) of the muscular body wall and of the pleural space
# along z.
BODY_HALF_WIDTH = _profile(
    (-230, 142), (-150, 145), (-60, 145), (0, 147), (45, 158), (80, 174), (130, 174)
)
BODY_FRONT = _profile(
    (-230, -112), (-140, -116), (-90, -113), (0, -97), (50, -80), (90, -62), (130, -50)
)
PLEURA_FRONT = _profile(
    (-230, -96), (-120, -98), (-60, -93), (0, -80), (50, -62), (100, -40), (130, -34)
)
PLEURA_HALF_WIDTH = _profile((-230, 128), (-150, 131), (-90, 130), (-40, 126), (0, 119))


HEART_WALLS_MM = {"right_atrium": 3, "right_ventricle": 4, "left_ventricle": 9, "left_atrium": 3}


def spine_y(z: np.ndarray | float, patient: Patient) -> np.ndarray:
    """y of the middle of the vertebral bodies at z."""
    z = np.asarray(z, float)
    return 60 - patient.kyphosis * np.where(z > -50, 0.0014 * (z + 50) ** 2, 0.0010 * (z + 50) ** 2)


def spine_x(z: np.ndarray | float, patient: Patient) -> np.ndarray:
    """Sideways displacement of the whole anatomy at z: mild scoliosis."""
    return patient.scoliosis_mm * np.sin((np.asarray(z, float) + 60) / 70)


def body_back(z: np.ndarray | float, patient: Patient) -> np.ndarray:
    """y of the back muscles' surface."""
    return spine_y(z, patient) * 0.75 + 66


def pleura_outline(z: np.ndarray | float, patient: Patient) -> tuple[np.ndarray, ...]:
    """(half width, front y, widest y, back y) of the pleural space at z; it closes to two domes at
    the apices."""
    z = np.asarray(z, float)
    closing = np.sqrt(1 - np.clip((z + 45) / 143, 0, 0.9999) ** 2.7)
    spine = spine_y(z, patient)
    top_y = spine - 8
    half_width = 50 + (PLEURA_HALF_WIDTH(np.minimum(z, 0)) - 50) * closing
    front = top_y + (PLEURA_FRONT(z) - top_y) * closing**0.8
    back = top_y + (spine + 35 - top_y) * closing**0.7
    return half_width, front, front + 0.56 * (back - front), back


def egg(
    x: np.ndarray, y: np.ndarray, outline: tuple, front_power: float, back_power: float
) -> np.ndarray:
    """Signed distance to a closed outline of two half superellipses: (half width, front y, widest
    y, back y)."""
    half_width, front, middle, back = (np.float32(v) for v in outline)
    v = y - middle
    ahead = v < 0
    power = np.where(ahead, np.float32(front_power), np.float32(back_power))
    depth = np.where(ahead, middle - front, back - middle)
    u = np.abs(x) / half_width + np.float32(1e-4)
    w = np.abs(v) / depth + np.float32(1e-4)
    value = np.exp(np.log(np.exp(power * np.log(u)) + np.exp(power * np.log(w))) / power)
    slope = np.hypot(u / half_width, w / depth) / value
    return (value - 1) / np.maximum(slope, value / np.maximum(np.hypot(x, v), 1))


def pleura_distance(x: np.ndarray, y: np.ndarray, z: float, patient: Patient) -> np.ndarray:
    """Signed distance to the inside of the rib cage."""
    spine = float(spine_y(z, patient))
    cage = egg(x, y, pleura_outline(z, patient), 2.2 * patient.roundness, 2.35 * patient.roundness)
    return smooth_max(cage, -ellipse(x, y, (0, spine + 38), (43, 37)), 16)


def diaphragm(x: np.ndarray, y: np.ndarray, z: float, patient: Patient) -> np.ndarray:
    """Signed distance to the diaphragm's two domes and the saddle under the heart: negative below
    them."""
    right = _dome(x, y, z, patient.dome_right_z, (-66, -10), (80, 108, 96), 96)
    left = _dome(x, y, z, patient.dome_left_z, (70, -10), (80, 108, 96), 96)
    saddle = _dome(x, y, z, patient.dome_right_z - 9, (6, -38), (66, 70, 40), 60)
    return smooth_min(smooth_min(right, left, 8), saddle, 14)


def _dome(x, y, z, top, centre, radii, height):
    """Upper half of an ellipsoid with its own radii to the sides, to the front and to the back."""
    below = np.clip((top - z) / height, 0, 1)
    opening = max(np.sqrt(1 - (1 - below) ** 2), 0.02)
    front = ellipse(x, y, centre, (radii[0] * opening, radii[1] * opening))
    back = ellipse(x, y, centre, (radii[0] * opening, radii[2] * opening))
    return np.where(y < centre[1], front, back) + np.float32(max(z - top, 0))


def heart_chambers(patient: Patient) -> dict[str, tuple]:
    """Chambers of the heart as (centre, radii, axis) of ellipsoids."""
    s = patient.heart_scale
    base = np.array([4.0, -22.0, -62.0])
    wide = patient.right_ventricle_scale
    sink = 0.45 * (patient.dome_right_z + 92)
    axial, frontal = np.deg2rad(patient.heart_turn)
    turn = np.array(
        [
            [np.cos(axial) * np.cos(frontal), -np.sin(axial), np.sin(frontal)],
            [np.sin(axial), np.cos(axial), 0],
            [-np.sin(frontal), 0, np.cos(frontal)],
        ]
    )

    def place(x, y, height):
        offset = turn @ (np.array([x, y, height + sink]) - base)
        return tuple(base + patient.heart_shift + s * offset)

    def along(*axis):
        return tuple(turn @ np.array(axis))

    return {
        "right_atrium": (place(-30, -22, -68), (36 * s, 23 * s, 25 * s), (0.1, 0.2, 1)),
        "right_ventricle": (
            place(8, -54, -82),
            (46 * s, 22 * s * wide, 34 * s * wide),
            along(0.85, -0.1, -0.4),
        ),
        "left_ventricle": (
            place(44, -28, -84),
            (46 * s, 29 * s / wide**0.5, 29 * s / wide**0.5),
            along(0.72, -0.5, -0.42),
        ),
        "left_atrium": (place(4, 12, -48), (32 * s, 19 * s, 21 * s), (1, 0.05, 0.1)),
    }


def ventricle_ratio(patient: Patient) -> float:
    """Width of the right ventricle's blood over the left's: 1 or more is a strained right heart."""
    chambers = heart_chambers(patient)
    widths = {
        name: chambers[name][1][1] - HEART_WALLS_MM[name]
        for name in ("right_ventricle", "left_ventricle")
    }
    return widths["right_ventricle"] / widths["left_ventricle"]


def heart_distance(x: np.ndarray, y: np.ndarray, z: float, patient: Patient) -> np.ndarray:
    """Signed distance to the outside of the heart muscle."""
    distance = np.full(x.shape, FAR, np.float32)
    for centre, radii, axis in heart_chambers(patient).values():
        if abs(z - centre[2]) < max(radii) + 25:
            distance = smooth_min(distance, ellipsoid(x, y, z, centre, radii, axis), 14)
    # The valves' plane and the septum fill the middle.
    centre, radii, _ = heart_chambers(patient)["right_ventricle"]
    middle = (centre[0] + 8, centre[1] + 32, centre[2] + 18)
    return smooth_min(distance, ellipsoid(x, y, z, middle, (34, 30, 32), (1, 0.0, 0.0)), 8)


def shoulder_blade(z: float, patient: Patient) -> tuple[tuple[float, float], tuple[float, float]]:
    """Inner and outer border (x, y) of the left scapula's section at z, for -62 < z < 125."""
    lift = min((z + 62) / 130, 1.0)
    spine = float(spine_y(z, patient))
    x = float(np.interp(z, [-62, 20, 125], [112, 86, 76]))
    y = spine + float(np.interp(z, [-62, 20, 125], [10, 30, 38]))
    return (x, y), (x + 10 + 60 * lift, y - 16 - 42 * lift)
