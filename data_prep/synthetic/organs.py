"""Paints what lies in the chest: lungs with bronchi and vessels, heart, great vessels."""

import numpy as np

from data_prep.synthetic.anatomy import Anatomy
from data_prep.synthetic.findings import Findings, cut_nodule, paint_haze, paint_nodule
from data_prep.synthetic.patient import HEART_WALLS_MM, heart_chambers, heart_distance
from data_prep.synthetic.scan import Enhancement
from data_prep.synthetic.shapes import Canvas, around, ellipsoid
from data_prep.synthetic.tissues import FAT

# HU, and lengths in mm of the reference space.
PERICARDIUM, VESSEL_WALL, OESOPHAGUS, PLAQUE = -20, 40, 42.0, 620
FISSURE, AIRWAY_WALL, AIRWAY_AIR, TRACHEA_AIR = -560, -150, -960, -985
# Fat on the heart holds small vessels that are not drawn one by one.
HEART_FAT, GROOVE_FAT = FAT + 12, FAT + 20
PERICARDIUM_MM, HEART_FAT_MM = 0.8, 4.4
AIRWAY_WALL_MM, VESSEL_WALL_MM, TRACHEA_WALL_MM = 1.0, 1.2, 1.6
FISSURE_HALF_MM = 0.25
# Lung is denser where it is dependent and in a thin layer below the pleura; its grain is finer than
# a voxel.
DEPENDENT_HU_PER_MM, SUBPLEURAL_HU, SUBPLEURAL_MM, LUNG_GRAIN_HU = 0.28, 60, 4, 14
# Opacities below 1: the voxels hold the tissue behind, too.
LUNG_VESSEL_OPACITY, AIRWAY_WALL_OPACITY, FISSURE_OPACITY = 0.92, 0.8, 0.6
# How far inside the pleura the airways and the vessels of the lung end.
AIRWAY_MARGIN_MM, LUNG_VESSEL_MARGIN_MM, FISSURE_MARGIN_MM = 4, 2, 2


def paint_lungs(
    canvas: Canvas,
    anatomy: Anatomy,
    findings: Findings,
    z: float,
    blood: Enhancement,
    lung: np.ndarray,
    texture: np.ndarray,
) -> list[tuple | None]:
    """Aerated lung, denser where it is dependent, with its bronchi, vessels and nodules; returns
    (box, distance) of each nodule and dot that the slice may cut."""
    patient = anatomy.patient
    nodules = findings.nodules + findings.dots
    refined = canvas.refine(lung)
    if refined is None:
        return [None] * len(nodules)
    box, distance = refined
    value = patient.lung_hu + DEPENDENT_HU_PER_MM * canvas.y[box] + LUNG_GRAIN_HU * texture[box]
    value += SUBPLEURAL_HU * np.exp(np.clip(distance, -30, 0) / SUBPLEURAL_MM)
    whole = np.empty_like(canvas.hu)
    whole[box] = value
    canvas.fill(box, distance, whole, edge_mm=canvas.edge_mm * 1.2)
    # The oblique fissures: sheets much thinner than a voxel.
    x, y = canvas.coarse_x, canvas.coarse_y
    oblique = (
        y + np.where(x < 0, 0.85, 0.95) * np.float32(z + 40) - 8 + 0.0016 * (np.abs(x) - 70) ** 2
    ) * 0.75
    behind = canvas.refine(oblique)
    if behind is not None:
        line = np.abs(around(behind[1], behind[0], box)) - np.float32(FISSURE_HALF_MM)
        canvas.fill(
            box, np.maximum(line, distance + FISSURE_MARGIN_MM), FISSURE, opacity=FISSURE_OPACITY
        )
    fields = [cut_nodule(canvas, nodule, z, patient.scale, box, distance) for nodule in nodules]
    for nodule, field in zip(nodules, fields, strict=True):
        if field is not None:
            paint_haze(canvas, nodule, *field)
    vessels = anatomy.vessels
    airways = canvas.tubes(vessels.airways_tree, z, around_mm=AIRWAY_WALL_MM)
    if airways is not None:
        airways = (
            airways[0],
            np.maximum(airways[1], around(distance, box, airways[0]) - AIRWAY_MARGIN_MM),
        )
        canvas.fill(
            airways[0], airways[1] - AIRWAY_WALL_MM, AIRWAY_WALL, opacity=AIRWAY_WALL_OPACITY
        )
    for tree, hu in (
        (vessels.veins_tree, blood.left_heart),
        (vessels.arteries_tree, blood.pulmonary_artery),
    ):
        tubes = canvas.tubes(tree, z, z_scale=0.6)
        if tubes is not None:
            canvas.fill(
                tubes[0],
                np.maximum(tubes[1], around(distance, box, tubes[0]) - LUNG_VESSEL_MARGIN_MM),
                hu,
                opacity=LUNG_VESSEL_OPACITY,
                is_artery=tree is vessels.arteries_tree,
            )
    if airways is not None:
        canvas.fill(airways[0], airways[1], AIRWAY_AIR)
    for nodule, field in zip(nodules, fields, strict=True):
        if field is not None:
            paint_nodule(canvas, nodule, *field)
    return [None if field is None else field[:2] for field in fields]


def paint_heart(canvas: Canvas, anatomy: Anatomy, z: float, blood: Enhancement) -> None:
    """Pericardium, fat, heart muscle and the chambers' blood."""
    x, y = canvas.coarse_x, canvas.coarse_y
    heart = heart_distance(x, y, z, anatomy.patient)
    layers = ((PERICARDIUM_MM, HEART_FAT), (HEART_FAT_MM, blood.muscle))
    canvas.paint(heart - HEART_FAT_MM, PERICARDIUM, inner=layers)
    for name, (centre, radii, axis) in heart_chambers(anatomy.patient).items():
        inner = tuple(radius - HEART_WALLS_MM[name] for radius in radii)
        if abs(z - centre[2]) < max(inner):
            hu = blood.left_heart if name.startswith("left") else blood.right_heart
            canvas.paint(ellipsoid(x, y, z, centre, inner, axis), hu, edge_mm=3)
    # Fat in the groove between the atria and the ventricles.
    if -95 < z < -40:
        groove = ellipsoid(x, y, z, (-16, -48, -60), (17, 3.5, 16), (1, -0.8, 0))
        canvas.paint(np.maximum(groove, heart), GROOVE_FAT, edge_mm=3)


def paint_great_vessels(canvas: Canvas, anatomy: Anatomy, z: float, blood: Enhancement) -> None:
    """Oesophagus, veins, arteries, trachea, in this order, and calcium in the aortic wall."""
    vessels = anatomy.vessels
    tubes = (
        (vessels.oesophagus, OESOPHAGUS),
        (vessels.caval_veins, blood.superior_cava if z > -60 else blood.muscle),
        (vessels.pulmonary_veins, blood.left_heart),
        (vessels.pulmonary_arteries, blood.pulmonary_artery),
        (vessels.aorta, blood.aorta),
    )
    for capsules, hu in tubes:
        cut = canvas.tubes(capsules, z, around_mm=VESSEL_WALL_MM)
        if cut is not None:
            canvas.fill(cut[0], cut[1] - VESSEL_WALL_MM, VESSEL_WALL)
            canvas.fill(*cut, hu, is_artery=capsules is vessels.pulmonary_arteries)
            if capsules is vessels.aorta and anatomy.patient.aortic_calcification > 0.1:
                box, distance = cut
                phase = anatomy.patient.phases[6]
                patches = np.sin(canvas.x[box] / 6 + z / 9 + phase) + np.sin(
                    canvas.y[box] / 7 - z / 11 - phase
                )
                rare = 5 * (1.9 - 0.75 * anatomy.patient.aortic_calcification - patches)
                plaque = np.maximum(np.abs(distance + np.float32(0.5)) - 1, rare)
                canvas.fill(box, plaque.astype(np.float32), PLAQUE)
    cut = canvas.tubes(vessels.trachea, z, around_mm=TRACHEA_WALL_MM)
    if cut is not None:
        canvas.fill(cut[0], cut[1] - TRACHEA_WALL_MM, VESSEL_WALL)
        canvas.fill(*cut, TRACHEA_AIR)
