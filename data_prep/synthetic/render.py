"""Renders a synthetic patient's anatomy into HU volumes: organ by organ, slice by slice, then
noise."""

import dataclasses

import numpy as np

from data_prep.synthetic.abdomen import paint_abdomen
from data_prep.synthetic.bones import paint_skeleton
from data_prep.synthetic.findings import Findings, paint_embolus
from data_prep.synthetic.noise import noise_tiles, texture_tile
from data_prep.synthetic.organs import paint_great_vessels, paint_heart, paint_lungs
from data_prep.synthetic.patient import Anatomy, lungs, pleura_distance, spine_x
from data_prep.synthetic.scan import Enhancement, Scan, enhancement, table_layer
from data_prep.synthetic.shapes import FAR, Canvas, join
from data_prep.synthetic.tissues import FAT
from data_prep.synthetic.vessels import Vessels
from data_prep.synthetic.wall import muscle_layer, paint_body_wall

PLEURAL_FAT = FAT + 6  # with small vessels that are not drawn one by one


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
