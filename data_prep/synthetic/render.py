"""Renders a synthetic patient's anatomy into HU volumes: organ by organ, slice by slice, then
noise."""

import dataclasses

import numpy as np

from data_prep.synthetic.abdomen import paint_abdomen
from data_prep.synthetic.anatomy import Anatomy, aerated, lung_space
from data_prep.synthetic.bones import paint_skeleton
from data_prep.synthetic.findings import Findings, paint_embolus
from data_prep.synthetic.implants import paint_implants
from data_prep.synthetic.noise import SliceNoise, noise_tiles, texture_tile
from data_prep.synthetic.opacities import opacity_distance
from data_prep.synthetic.organs import paint_great_vessels, paint_heart, paint_lungs
from data_prep.synthetic.patient import pleura_distance, spine_x
from data_prep.synthetic.scan import (
    LOUDNESS,
    LOUDNESS_Z,
    Enhancement,
    Scan,
    enhancement,
    table_layer,
)
from data_prep.synthetic.shapes import FAR, Canvas, join, smooth_max
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
    tiles = noise_tiles(scan.image_size, pixel, sharp, scan.sharpness, rng)
    noise = SliceNoise(tiles, scan.image_size, scan.correlation)
    texture = texture_tile(canvas.size, pixel, patient.seed)
    loudness = scan.loudness(canvas.x, canvas.y)
    table = table_layer(anatomy, scan)
    count = len(scan.z_mm)
    volume = np.empty((count, scan.image_size, scan.image_size), np.int16)
    canvas.artery = np.zeros_like(canvas.hu) if findings.emboli else None
    muscle = muscle_layer(canvas, patient)
    shown = [[] for _ in findings.nodules + findings.dots]
    areas = np.zeros((count, len(findings.emboli)), np.float32)
    sway = np.random.default_rng(patient.seed + 2).uniform(-1, 1, count) * scan.motion_mm
    # Three slices are kept, for each shows some of its neighbours.
    planes, result = [np.empty_like(canvas.hu) for _ in range(3)], np.empty_like(canvas.hu)
    share = np.float32(scan.partial_volume)
    for index, z_mm in enumerate([*scan.heights(), None]):
        if z_mm is not None:
            z = z_mm / scale[2]
            canvas.hu = planes[index % 3]
            canvas.move_to(float(spine_x(z, patient)) + float(sway[index]))
            canvas.hu += table
            grain = int(1.3 * z_mm / pixel) % scan.image_size
            grains = texture[grain : grain + scan.image_size]
            fields, covered = render_slice(canvas, anatomy, findings, z, blood, grains, muscle)
            for pieces, field in zip(shown, fields, strict=True):
                pieces += [] if field is None else [(index, *field)]
            areas[index] = covered
        if index:
            done = index - 1
            np.add(planes[max(done - 1, 0) % 3], planes[min(index, count - 1) % 3], out=result)
            result *= share
            result += (1 - 2 * share) * planes[done % 3]
            level = np.interp(scan.z_mm[done] / scale[2], LOUDNESS_Z, LOUDNESS)
            result += np.float32(level) * loudness * noise.next(rng)
            np.clip(result, -1024, 3071, out=result)
            volume[done] = np.rint(result, out=result)
    beside = np.pad(areas, ((1, 1), (0, 0)), mode="edge")
    areas = (1 - 2 * share) * areas + share * (beside[:-2] + beside[2:])
    fields = tuple(_gather(pieces) for pieces in shown)
    large = len(findings.nodules)
    return Rendering(volume, fields[:large], fields[large:], areas)


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
    space = lung_space(x, y, z, anatomy, pleura)
    lung = aerated(space, x, y, z, anatomy, pleura)
    paint_body_wall(canvas, anatomy, z, pleura, muscle)
    canvas.paint(pleura, PLEURAL_FAT)
    paint_abdomen(canvas, anatomy, z, blood, pleura, texture)
    paint_heart(canvas, anatomy, z, blood)
    for opacity in anatomy.opacities:
        if opacity.low_z < z < opacity.high_z:
            shape = opacity_distance(opacity, x, y, z, pleura)
            canvas.paint(smooth_max(space, shape, 2), opacity.hu)
    fields = paint_lungs(canvas, anatomy, findings, z, blood, lung, texture)
    paint_great_vessels(canvas, anatomy, z, blood)
    areas = [
        paint_embolus(canvas, embolus, z, blood.pulmonary_artery) for embolus in findings.emboli
    ]
    paint_skeleton(canvas, anatomy, z, texture)
    paint_implants(canvas, anatomy.implants, z)
    return fields, areas
