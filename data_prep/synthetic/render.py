"""Renders a synthetic patient's anatomy into HU volumes: organ by organ, slice by slice, then
noise."""

import dataclasses

import numpy as np

from data_prep.synthetic.bones import paint_skeleton
from data_prep.synthetic.findings import (
    Findings,
    cut_nodule,
    paint_embolus,
    paint_haze,
    paint_nodule,
)
from data_prep.synthetic.noise import noise_tiles, texture_tile
from data_prep.synthetic.patient import (
    BODY_FRONT,
    BODY_HALF_WIDTH,
    GROUPS,
    HEART_WALLS_MM,
    Anatomy,
    Patient,
    body_back,
    diaphragm,
    egg,
    heart_chambers,
    heart_distance,
    lungs,
    pleura_distance,
    pleura_outline,
    shoulder_blade,
    spine_x,
    spine_y,
)
from data_prep.synthetic.shapes import (
    FAR,
    Canvas,
    around,
    ellipse,
    ellipsoid,
    join,
    segment,
    smooth_max,
    smooth_min,
)
from data_prep.synthetic.vessels import Vessels

# HU of tissues that the contrast medium does not reach, and lengths in mm of the reference space.
# All are made up within the usual ranges of chest CT of adults: no patient was measured for them.
FAT, MUSCLE, SKIN = -102.0, 56.0, 18.0
GLAND, PERICARDIUM, VESSEL_WALL, OESOPHAGUS, PLAQUE = 25, -20, 40, 42.0, 620
STOMACH_WALL, STOMACH_CONTENTS, STOMACH_AIR, COLON_WALL = 48, 22, -970, 42
FISSURE, AIRWAY_WALL, AIRWAY_AIR, TRACHEA_AIR = -560, -150, -960, -985
# Fat within and between organs holds small vessels that are not drawn one by one.
PLEURAL_FAT, ARMPIT_FAT, MUSCLE_PLANE_FAT = FAT + 6, FAT + 8, FAT + 15
HEART_FAT, GROOVE_FAT, RENAL_SINUS_FAT = FAT + 12, FAT + 20, FAT + 30
SKIN_MM, PERICARDIUM_MM, HEART_FAT_MM, DIAPHRAGM_MM, STOMACH_WALL_MM = 2.2, 0.8, 4.4, 2.6, 3.2
AIRWAY_WALL_MM, VESSEL_WALL_MM, TRACHEA_WALL_MM, COLON_WALL_MM = 1.0, 1.2, 1.6, 2.2
FISSURE_HALF_MM = 0.25
MUSCLE_LAYER_MM, MUSCLE_BELLY_MM = 17, 66
# Lung is denser where it is dependent and in a thin layer below the pleura; its grain is finer than
# a voxel.
DEPENDENT_HU_PER_MM, SUBPLEURAL_HU, SUBPLEURAL_MM, LUNG_GRAIN_HU = 0.28, 60, 4, 14
LIVER_GRAIN_HU, STOMACH_GRAIN_HU, COLON_GRAIN_HU = 5, 9, 80
# Opacities below 1: the voxels hold the tissue behind, too.
LUNG_VESSEL_OPACITY, AIRWAY_WALL_OPACITY, FISSURE_OPACITY = 0.92, 0.8, 0.6
# How far inside the pleura the airways and the vessels of the lung end.
AIRWAY_MARGIN_MM, LUNG_VESSEL_MARGIN_MM, FISSURE_MARGIN_MM = 4, 2, 2
# The trace of a patient's group: fat HU, and the direction of faint stripes in the muscles.
GROUP_FAT_HU = (-4.0, 0.0, 4.0)
STRIPES_HU, STRIPES_MM = 9.0, 30.0


@dataclasses.dataclass(frozen=True)
class Scan:
    """One acquisition and reconstruction. `z_mm` are slice positions towards superior in the
    patient's mm.

    `contrast` is "none", "pulmonary" (arterial, dense pulmonary arteries) or "venous", `bolus` the
    enhancement relative to the usual; `kernel` is "soft" or "sharp"; `noise_hu` the standard
    deviation of a soft reconstruction's noise inside the body.
    """

    image_size: int
    field_of_view_mm: float
    centre_mm: tuple[float, float]
    z_mm: tuple[float, ...]
    slice_spacing_mm: float
    slice_thickness_mm: float
    contrast: str
    bolus: float
    kernel: str
    noise_hu: float
    rotation_degrees: float
    circular: bool
    prone: bool
    flat_table: bool
    motion_mm: float = 0.0  # how far the patient moves between slices

    @property
    def pixel_spacing_mm(self) -> float:
        return self.field_of_view_mm / self.image_size

    @property
    def first_voxel_mm(self) -> tuple[float, float]:
        """(x, y) of the centre of pixel (0, 0)."""
        half = (self.image_size - 1) / 2 * self.pixel_spacing_mm
        return round(self.centre_mm[0] - half, 4), round(self.centre_mm[1] - half, 4)


@dataclasses.dataclass(frozen=True)
class Enhancement:
    """HU of blood and organs at a contrast phase."""

    pulmonary_artery: float
    left_heart: float
    aorta: float
    superior_cava: float
    right_heart: float
    muscle: float
    liver: float
    liver_vessels: float
    spleen: float
    kidney: float


ENHANCEMENTS = {
    "none": Enhancement(41, 41, 41, 41, 41, 44, 56, 44, 48, 34),
    "pulmonary": Enhancement(390, 320, 260, 480, 400, 85, 66, 60, 95, 110),
    "venous": Enhancement(165, 165, 170, 160, 160, 105, 108, 165, 122, 185),
}


def enhancement(scan: Scan) -> Enhancement:
    """HU of blood and organs in this scan."""
    plain, usual = ENHANCEMENTS["none"], ENHANCEMENTS[scan.contrast]
    names = [field.name for field in dataclasses.fields(Enhancement)]
    return Enhancement(
        *(getattr(plain, n) + scan.bolus * (getattr(usual, n) - getattr(plain, n)) for n in names)
    )


def outside_field_of_view(scan: Scan) -> np.ndarray:
    """[H, W] bool: the pixels beyond the circular field of view, if the scanner has one."""
    offset = (np.arange(scan.image_size) - (scan.image_size - 1) / 2) / (scan.image_size / 2)
    return (np.hypot(offset[:, None], offset[None, :]) > 1) & scan.circular


@dataclasses.dataclass(frozen=True)
class NoduleField:
    """Where a nodule truly is: `distance` [s, h, w] float32, signed, mm, from voxel `origin`
    (slice, row, column) on; negative inside the nodule's body, chest wall left out."""

    origin: tuple[int, int, int]
    distance: np.ndarray

    def paste(self, mask: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
        """A mask [s, h, w] of the field's box in a volume of this shape, False elsewhere."""
        whole = np.zeros(shape, bool)
        whole[tuple(slice(o, o + n) for o, n in zip(self.origin, mask.shape, strict=True))] = mask
        return whole


@dataclasses.dataclass(frozen=True)
class Rendering:
    """A rendered scan with the truth about its findings: `hu` [S, H, W] int16, slices to superior,
    rows to posterior, columns to the left; `nodules` and `dots` in the order of the findings, None
    for one that no voxel shows; `embolus_area_mm2` [S, E] float32, the area of each slice that each
    embolus covers."""

    hu: np.ndarray
    nodules: tuple[NoduleField | None, ...]
    dots: tuple[NoduleField | None, ...]
    embolus_area_mm2: np.ndarray


def render_volume(anatomy: Anatomy, scan: Scan, rng: np.random.Generator) -> np.ndarray:
    """The scan of a patient without findings: [S, H, W] int16 HU, oriented as in `Rendering`."""
    return render_scan(anatomy, scan, Findings(), rng).hu


def render_scan(
    anatomy: Anatomy, scan: Scan, findings: Findings, rng: np.random.Generator
) -> Rendering:
    """The scan of a patient with findings. The noise depends on `rng` alone, not on the
    findings."""
    patient = anatomy.patient
    pixel = scan.pixel_spacing_mm
    sharp = scan.kernel == "sharp"
    blood = enhancement(scan)
    scale = patient.scale
    in_plane = (scale[0] * scale[1]) ** 0.5
    canvas = Canvas(
        scan.image_size,
        pixel,
        scan.centre_mm,
        np.deg2rad(scan.rotation_degrees),
        (scale[0], scale[1]),
        patient.asymmetry,
        max(pixel, 0.75 if sharp else 1.25) / in_plane,
    )
    anatomy = dataclasses.replace(anatomy, vessels=_as_seen(anatomy.vessels, blood, canvas.edge_mm))
    tiles = noise_tiles(scan.image_size, pixel, sharp, rng)
    sigma = scan.noise_hu * (2.2 if sharp else 1.0) * min(1.0, 0.75 / pixel) ** 0.3
    texture = texture_tile(canvas.size, pixel, patient.seed)
    # Photons are fewest in the middle of the body.
    loudness = np.exp(-0.5 * (np.hypot(canvas.x, canvas.y * 1.3) / 150) ** 2)
    loudness = (sigma * (0.45 + 0.75 * loudness)).astype(np.float32)
    table = table_layer(anatomy, scan)
    volume = np.empty((len(scan.z_mm), scan.image_size, scan.image_size), np.int16)
    noise = np.empty_like(canvas.hu)
    canvas.artery = np.zeros_like(canvas.hu) if findings.emboli else None
    muscle = muscle_layer(canvas, patient)
    shown = [[] for _ in findings.nodules + findings.dots]
    areas = np.zeros((len(scan.z_mm), len(findings.emboli)), np.float32)
    sway = np.random.default_rng(patient.seed + 2).uniform(-1, 1, len(scan.z_mm)) * scan.motion_mm
    room = (tiles[0].shape[0] - scan.image_size + 1,) * 2
    for index, z_mm in enumerate(scan.z_mm):
        z = z_mm / scale[2]
        canvas.move_to(float(spine_x(z, patient)) + float(sway[index]))
        canvas.hu += table
        grain = int(1.3 * z_mm / pixel) % scan.image_size
        fields, covered = render_slice(
            canvas, anatomy, findings, z, blood, texture[grain : grain + scan.image_size], muscle
        )
        for pieces, field in zip(shown, fields, strict=True):
            pieces += [] if field is None else [(index, *field)]
        areas[index] = covered
        which, top, left = rng.integers(0, (2 * len(tiles), *room))
        patch = tiles[which // 2][top : top + scan.image_size, left : left + scan.image_size]
        np.multiply(patch[:: 1 - 2 * (which % 2)], loudness, out=noise)
        noise += canvas.hu
        np.clip(noise, -1024, 3071, out=noise)
        volume[index] = np.rint(noise, out=noise)
    fields = tuple(_gather(pieces) for pieces in shown)
    count = len(findings.nodules)
    return Rendering(volume, fields[:count], fields[count:], areas)


def _gather(pieces: list[tuple[int, tuple[slice, slice], np.ndarray]]) -> NoduleField | None:
    """One field of the distances (slice, box, [h, w]) of consecutive slices."""
    if not any((distance < 0).any() for _, _, distance in pieces):
        return None
    first, last = pieces[0][0], pieces[-1][0]
    top, left = (min(box[axis].start for _, box, _ in pieces) for axis in (0, 1))
    bottom, right = (max(box[axis].stop for _, box, _ in pieces) for axis in (0, 1))
    whole = np.full((last - first + 1, bottom - top, right - left), FAR, np.float32)
    for index, (rows, columns), distance in pieces:
        whole[
            index - first,
            rows.start - top : rows.stop - top,
            columns.start - left : columns.stop - left,
        ] = distance
    return NoduleField((first, top, left), whole)


def muscle_layer(canvas: Canvas, patient: Patient) -> np.ndarray:
    """[H, W] float32: HU of muscle, with the faint stripes of the patient's group."""
    angle = np.pi / 3 * GROUPS.index(patient.group)
    phase = (
        2 * np.pi / STRIPES_MM * (canvas.x * np.cos(angle) + canvas.y * np.sin(angle))
        + patient.seed % 7
    )
    return (MUSCLE + STRIPES_HU * np.sin(phase)).astype(np.float32)


def _as_seen(vessels: Vessels, blood: Enhancement, edge_mm: float) -> Vessels:
    """The trees with thin branches faded by the blur, and in one piece where arteries and veins
    look the same."""
    arteries, veins = vessels.arteries_tree.blurred(edge_mm), vessels.veins_tree.blurred(edge_mm)
    if blood.pulmonary_artery == blood.left_heart:
        arteries, veins = join([arteries, veins]), veins.select(np.zeros(0, int))
    return dataclasses.replace(vessels, arteries_tree=arteries, veins_tree=veins)


def render_slice(
    canvas: Canvas,
    anatomy: Anatomy,
    findings: Findings,
    z: float,
    blood: Enhancement,
    texture: np.ndarray,
    muscle: np.ndarray,
) -> tuple[list[tuple | None], list[float]]:
    """Paints one slice on the canvas, from the skin inward; returns (box, distance) of each nodule
    and dot that the slice may cut, else None, and the mm^2 that each embolus covers."""
    patient = anatomy.patient
    x, y = canvas.coarse_x, canvas.coarse_y
    pleura = pleura_distance(x, y, z, patient)
    lung = lungs(x, y, z, anatomy, pleura)
    paint_body_wall(canvas, anatomy, z, pleura, muscle)
    canvas.paint(pleura, PLEURAL_FAT)
    paint_abdomen(canvas, anatomy, z, blood, pleura, texture)
    paint_heart(canvas, anatomy, z, blood)
    fields = paint_lungs(canvas, anatomy, findings, z, blood, lung, texture)
    paint_great_vessels(canvas, anatomy, z, blood)
    areas = [
        paint_embolus(canvas, embolus, z, blood.pulmonary_artery) for embolus in findings.emboli
    ]
    paint_skeleton(canvas, anatomy, z, texture)
    return fields, areas


def body_outlines(
    x: np.ndarray, y: np.ndarray, z: float, anatomy: Anatomy
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signed distances to (muscle, skin, breasts) of a slice."""
    patient = anatomy.patient
    back = float(body_back(z, patient))
    front = float(BODY_FRONT(z)) - 2 * (patient.muscle - 1) * 3
    half_width = float(BODY_HALF_WIDTH(z)) + 8 * (patient.muscle - 1)
    muscle = egg(x, y, (half_width, front, front + 0.58 * (back - front), back), 2.3, 2.7)
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
        wave = 7 * np.sin(x / 7.3 + z / 11) * np.sin(y / 6.1 - z / 9) + 5 * np.sin(
            (x + y) / 4.7 + z / 6
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
        pit = pit + 3 * np.sin(x / 6 + z / 8) * np.sin(y / 7 - z / 9)
        canvas.paint(np.maximum(pit, muscle + 9), ARMPIT_FAT, edge_mm=3)
    phase = patient.seed % 7
    around = np.arctan2(x, -y - 10) * 95
    depth = 5 * np.sin(around / 37 + z / 43 + phase) + 2.5 * np.sin(around / 13 - z / 29) - muscle
    layer = np.rint(depth / MUSCLE_LAYER_MM)
    between_layers = np.abs(depth - MUSCLE_LAYER_MM * layer)
    along = (around + 9 * np.sin(depth / 13 + z / 31 + phase)) / MUSCLE_BELLY_MM
    along = along + 0.41 * np.floor(depth / MUSCLE_LAYER_MM) + 0.004 * z
    between_bellies = MUSCLE_BELLY_MM * np.abs(along - np.rint(along))
    planes = (
        smooth_min(between_layers, between_bellies, 7) - 0.9 + 0.7 * np.sin(around / 29 - z / 19)
    )
    planes = np.maximum(np.maximum(planes, muscle + 5), 15 - pleura)
    canvas.paint(planes.astype(np.float32), MUSCLE_PLANE_FAT, edge_mm=2.5)


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
                phase = anatomy.patient.seed % 7
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
    wave = 2.5 * np.sin(x / 9 + z / 13) * np.sin(y / 11 - z / 17 + patient.seed % 5)
    stomach = smooth_max(
        ellipsoid(x, y, z, (58, -22, centre), (56, 43, 48), (0.8, -0.5, -0.3)) + wave, inside + 4, 4
    )
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
    branch = np.abs(np.sin(x / 26 + z / 19 + 0.6) * 14 + np.sin(y / 31 + z / 23) * 9) - 1.6
    canvas.paint(np.maximum(branch, liver + 9), blood.liver_vessels, edge_mm=3)
    canvas.paint(spleen, blood.spleen)
    canvas.paint(stomach, STOMACH_WALL)
    contents = stomach + STOMACH_WALL_MM
    canvas.paint(contents, (STOMACH_CONTENTS + STOMACH_GRAIN_HU * texture).astype(np.float32))
    canvas.paint(smooth_max(contents, y + 38, 2), STOMACH_AIR)
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


def table_layer(anatomy: Anatomy, scan: Scan) -> np.ndarray:
    """[H, W] float32: HU above air of the patient table and its mattress, which lie below the
    patient, supine or prone."""
    along = (np.arange(scan.image_size) - (scan.image_size - 1) / 2) * scan.pixel_spacing_mm
    x, y = along[None, :] + scan.centre_mm[0], along[:, None] + scan.centre_mm[1]
    patient = anatomy.patient
    z = np.array(scan.z_mm) / patient.scale[2]
    if scan.prone:
        y = -y
        contact = -(BODY_FRONT(z).min() - patient.fat_mm * 0.7) * patient.scale[1]
        contact += 0.6 * patient.breast_mm
    else:
        contact = (body_back(z, patient).max() + patient.fat_mm * 0.6 + 6) * patient.scale[1]
    sag = 0 if scan.flat_table else 0.0011
    pad = y - contact - 8 + sag * x**2
    shell = pad - 14 - (0 if scan.flat_table else 6)
    edge = max(scan.pixel_spacing_mm, 1.2)

    def cover(distance):
        return np.clip(0.5 - distance / edge, 0, 1)

    inside = cover(np.abs(x) - 205)
    layer = 55 * cover(np.abs(pad) - 1.0) + 40 * cover(np.abs(pad - 8) - 8)
    layer += 760 * cover(np.abs(shell - 6) - 1.4) + 60 * cover(np.abs(shell - 22) - 14)
    layer += 520 * cover(np.abs(shell - 37) - 1.2)
    return (layer * inside).astype(np.float32)
