"""Shapes of the phantom as signed distances, and the canvas that paints them with antialiased
edges.

A signed distance is in mm, negative inside. All shapes live in the reference space of `patient`: x
to the patient's left, y to posterior, z to superior, mm of a patient of average build.
"""

import dataclasses
import functools

import numpy as np

FAR = np.float32(60.0)
PATCH_SIZES = np.array([4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024])


@dataclasses.dataclass(frozen=True)
class Capsules:
    """Tapered tubes: segments from `start` [N, 3] to `end` [N, 3] with radii `start_radius`,
    `end_radius` [N], mm."""

    start: np.ndarray
    end: np.ndarray
    start_radius: np.ndarray
    end_radius: np.ndarray

    @functools.cached_property
    def extent(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(lowest z, highest z, largest radius) [N] of each segment."""
        low, high = (
            np.minimum(self.start[:, 2], self.end[:, 2]),
            np.maximum(self.start[:, 2], self.end[:, 2]),
        )
        return low, high, np.maximum(self.start_radius, self.end_radius)

    def __len__(self) -> int:
        return len(self.start)

    def select(self, keep: np.ndarray) -> "Capsules":
        """The segments that an index or mask [N] keeps."""
        return Capsules(
            self.start[keep], self.end[keep], self.start_radius[keep], self.end_radius[keep]
        )

    def blurred(self, edge_mm: float) -> "Capsules":
        """The same tubes; tubes thinner than the blur shrink until they have the peak of a blurred
        thin tube."""
        return dataclasses.replace(
            self,
            start_radius=np.minimum(
                self.start_radius, 2 * self.start_radius - np.float32(edge_mm / 2)
            ),
            end_radius=np.minimum(self.end_radius, 2 * self.end_radius - np.float32(edge_mm / 2)),
        )


def polyline(points: np.ndarray, radii: np.ndarray | float) -> Capsules:
    """A tube through points [N, 3] with radii [N] or one radius."""
    points = np.asarray(points, np.float32)
    radii = np.broadcast_to(np.asarray(radii, np.float32), len(points))
    return Capsules(points[:-1], points[1:], radii[:-1], radii[1:])


def join(parts: list[Capsules]) -> Capsules:
    """All segments of all parts."""
    return Capsules(
        *(
            np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(Capsules)
        )
    )


def smooth_min(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    """Union of two signed distances, arrays, whose seam is filleted over `blend_mm`."""
    h = (b - a) * np.float32(0.5 / blend_mm)
    h += np.float32(0.5)
    np.clip(h, 0, 1, out=h)
    result = (a - b) * h
    result += b
    rest = 1 - h
    h *= np.float32(blend_mm)
    h *= rest
    result -= h
    return result


def smooth_max(a: np.ndarray, b: np.ndarray, blend_mm: float) -> np.ndarray:
    """Intersection of two signed distances with a rounded seam."""
    return -smooth_min(-a, -b, blend_mm)


def ellipse(x: np.ndarray, y: np.ndarray, centre: tuple, radii: tuple) -> np.ndarray:
    """First-order signed distance to an ellipse."""
    u, v = (x - np.float32(centre[0])), (y - np.float32(centre[1]))
    a, b = np.float32(1 / radii[0]), np.float32(1 / radii[1])
    value = np.sqrt((u * a) ** 2 + (v * b) ** 2) + np.float32(1e-6)
    slope = np.sqrt((u * a * a) ** 2 + (v * b * b) ** 2) + np.float32(1e-6)
    return value * (value - 1) / slope


def ellipsoid(
    x: np.ndarray, y: np.ndarray, z: float, centre: tuple, radii: tuple, axis: tuple
) -> np.ndarray:
    """First-order signed distance to an ellipsoid whose first radius lies along `axis`; x and y are
    arrays of one shape."""
    u, v, w = x - np.float32(centre[0]), y - np.float32(centre[1]), float(z - centre[2])
    total, slope = np.full_like(u, 1e-6), np.full_like(u, 1e-6)
    for direction, radius in zip(_basis(axis), radii, strict=True):
        component = u * np.float32(direction[0] / radius)
        if direction[1]:
            component += v * np.float32(direction[1] / radius)
        component += np.float32(w * direction[2] / radius)
        component *= component
        total += component
        component *= np.float32(radius**-2)
        slope += component
    value = np.sqrt(total, out=total)
    distance = value - 1
    distance *= value
    distance /= np.sqrt(slope, out=slope)
    return distance


@functools.lru_cache(maxsize=256)
def _basis(axis: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three perpendicular unit vectors, the first along `axis`, the second level where it can
    be."""
    first = np.asarray(axis, float) / np.linalg.norm(axis)
    second = np.cross((0.0, 0.0, 1.0) if abs(first[2]) < 0.9 else (0.0, 1.0, 0.0), first)
    second /= np.linalg.norm(second)
    return first, second, np.cross(first, second)


def segment(x: np.ndarray, y: np.ndarray, start: tuple, end: tuple) -> np.ndarray:
    """Distance to a segment in the plane."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    u, v = x - np.float32(start[0]), y - np.float32(start[1])
    t = np.clip(
        (u * np.float32(dx) + v * np.float32(dy)) / np.float32(dx * dx + dy * dy + 1e-9), 0, 1
    )
    return np.hypot(u - t * np.float32(dx), v - t * np.float32(dy))


class Canvas:
    """One slice in HU, with the reference coordinates of its pixels and of a coarse grid for the
    large organs.

    `x`, `y` [H, W] and `coarse_x`, `coarse_y` [h, w] are float32 reference coordinates; `hu` [H, W]
    float32. `edge_mm` is the width over which an edge changes from one HU to the other. `artery`
    [H, W] float32, where it is set, is the share of each pixel that arterial blood fills: every
    later fill covers some of it.
    """

    def __init__(
        self,
        size: int,
        pixel_mm: float,
        centre_mm: tuple[float, float],
        rotation: float,
        scale: tuple[float, float],
        warp: tuple[float, float, float],
        edge_mm: float,
    ):
        self.size, self.pixel_mm, self.edge_mm = size, pixel_mm, edge_mm
        self.centre_mm, self.rotation, self.scale, self.warp = centre_mm, rotation, scale, warp
        self.step = max(1, int(3.2 / pixel_mm))
        nodes = np.arange(-self.step, size + 2 * self.step, self.step)
        self.x, self.y = self._reference(np.arange(size))
        self.coarse_x, self.coarse_y = self._reference(nodes)
        self.shift = 0.0
        self.hu = np.full((size, size), -1000, np.float32)
        self.artery: np.ndarray | None = None

    def _reference(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        along = (indices - (self.size - 1) / 2) * self.pixel_mm
        column, row = along + self.centre_mm[0], along + self.centre_mm[1]
        cos, sin = np.cos(self.rotation), np.sin(self.rotation)
        x = (column[None, :] * cos + row[:, None] * sin) / self.scale[0]
        y = (row[:, None] * cos - column[None, :] * sin) / self.scale[1]
        dx, dy = self._asymmetry(x, y)
        return (x + dx).astype(np.float32), (y + dy).astype(np.float32)

    def _asymmetry(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A smooth displacement of (amplitude in mm, two phases) that makes left and right
        differ."""
        amplitude, first, second = self.warp
        return amplitude * np.sin(y / 52 + x / 90 + first), amplitude * np.sin(
            x / 61 - y / 110 + second
        )

    def _pixel(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reference coordinates -> (row, column), fractional."""
        x = x + self.shift
        dx, dy = self._asymmetry(x, y)
        dx, dy = self._asymmetry(x - dx, y - dy)
        x, y = (x - dx) * self.scale[0], (y - dy) * self.scale[1]
        cos, sin = np.cos(self.rotation), np.sin(self.rotation)
        middle = (self.size - 1) / 2
        column = (x * cos - y * sin - self.centre_mm[0]) / self.pixel_mm + middle
        row = (x * sin + y * cos - self.centre_mm[1]) / self.pixel_mm + middle
        return row, column

    def move_to(self, shift: float) -> None:
        """Starts another slice whose anatomy is displaced by `shift` mm to the patient's left."""
        delta = np.float32(shift - self.shift)
        self.x -= delta
        self.coarse_x -= delta
        self.shift = shift
        self.hu.fill(-1000)
        if self.artery is not None:
            self.artery.fill(0)

    def box(self, x: float, y: float, reach_mm: float) -> tuple[slice, slice]:
        """The pixels within `reach_mm` of a point, as (rows, columns)."""
        row, column = self._pixel(np.float64(x), np.float64(y))
        reach = reach_mm * max(self.scale) / self.pixel_mm + 2
        rows, columns = (
            slice(*(min(max(0, int(edge)), self.size) for edge in (at - reach, at + reach + 1)))
            for at in (row, column)
        )
        return rows, columns

    def refine(self, coarse: np.ndarray) -> tuple[tuple[slice, slice], np.ndarray] | None:
        """The part of a coarse signed distance that is not far outside, at full resolution: (box,
        distance)."""
        near = coarse < self.edge_mm + 1.5 * self.step * self.pixel_mm
        rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
        if not len(rows):
            return None
        last = coarse.shape[0]
        r0, r1 = max(rows[0] - 2, 0), min(rows[-1] + 3, last)
        c0, c1 = max(columns[0] - 2, 0), min(columns[-1] + 3, last)
        box = (
            slice(max(r0 * self.step, 0), max(min((r1 - 3) * self.step, self.size), 0)),
            slice(max(c0 * self.step, 0), max(min((c1 - 3) * self.step, self.size), 0)),
        )
        if self.step == 1:
            return box, coarse[1:-2, 1:-2][box]
        fine = _interpolated(_interpolated(coarse[r0:r1, c0:c1], self.step).T, self.step).T
        return box, fine[: box[0].stop - box[0].start, : box[1].stop - box[1].start]

    def paint(
        self,
        coarse: np.ndarray,
        value: float | np.ndarray,
        edge_mm: float | None = None,
        inner: tuple[tuple[float, float], ...] = (),
    ) -> None:
        """Fills a coarse signed distance with a HU, or with HU per pixel [H, W]; then the
        part that lies deeper by the millimetres of each pair of `inner` with its HU."""
        refined = self.refine(coarse)
        if refined is not None:
            box, distance = refined
            self.fill(box, distance, value, edge_mm)
            for depth, deeper in inner:
                self.fill(box, distance + np.float32(depth), deeper, edge_mm)

    def fill(
        self,
        box: tuple[slice, slice],
        distance: np.ndarray,
        value: float | np.ndarray,
        edge_mm: float | None = None,
        opacity: float = 1.0,
        is_artery: bool = False,
    ) -> None:
        """Fills a full-resolution signed distance of a box; `value` is a HU or HU per pixel [H,
        W]."""
        cover = distance * np.float32(-1 / (edge_mm or self.edge_mm))
        cover += np.float32(0.5)
        np.clip(cover, 0, 1, out=cover)
        if opacity != 1.0:
            cover *= np.float32(opacity)
        target = self.hu[box]
        wanted = value[box] if isinstance(value, np.ndarray) else np.float32(value)
        target += (wanted - target) * cover
        if self.artery is not None:
            share = self.artery[box]
            share += (np.float32(is_artery) - share) * cover

    def tubes(
        self, capsules: Capsules, z: float, z_scale: float = 1.0, around_mm: float = 0.0
    ) -> tuple[tuple[slice, slice], np.ndarray] | None:
        """Signed distance of the slice at z to tubes: (box, distance), `FAR` away from them; None
        if none is near.

        A `z_scale` below 1 stretches the tubes' cross-section along z. The distance is right up to
        half an edge, and `around_mm`, outside the tubes.
        """
        low, high, radius = capsules.extent
        margin = np.float32(0.55 * self.edge_mm + around_mm)
        widest = (radius.max(initial=0) + margin) / z_scale
        near = np.flatnonzero((low < z + widest) & (high > z - widest))
        reach = np.maximum(radius[near] + margin, np.float32(0.3))
        near = near[(low[near] < z + reach / z_scale) & (high[near] > z - reach / z_scale)]
        if not len(near):
            return None
        part, reach = capsules.select(near), np.maximum(radius[near] + margin, np.float32(0.3))
        # The stretch of each segment that can touch the slice, and the square of pixels around it.
        run = part.end - part.start
        rise = np.where(np.abs(run[:, 2]) < 1e-3, np.float32(1e-3), run[:, 2])
        t = np.stack(
            [
                (z - reach / z_scale - part.start[:, 2]) / rise,
                (z + reach / z_scale - part.start[:, 2]) / rise,
            ]
        )
        t = np.clip(np.sort(t, axis=0), 0, 1)
        ends = part.start[None] + t[..., None] * run[None]
        row, column = self._pixel(ends[..., 0], ends[..., 1])
        half = (
            np.ptp(np.stack([row, column]), axis=1).max(axis=0) / 2
            + reach * max(self.scale) / self.pixel_mm
            + 1
        )
        row, column = row.mean(axis=0), column.mean(axis=0)
        visible = (
            (row > -half)
            & (row < self.size + half)
            & (column > -half)
            & (column < self.size + half)
        )
        if not visible.any():
            return None
        field = np.full((self.size, self.size), FAR, np.float32)
        width = PATCH_SIZES[
            np.minimum(np.searchsorted(PATCH_SIZES, 2 * half + 1), len(PATCH_SIZES) - 1)
        ]
        for size in np.unique(width[visible]):
            chosen = np.flatnonzero(visible & (width == size))
            self._stamp(
                field, part.select(chosen), row[chosen], column[chosen], int(size), z, z_scale
            )
        top, left = (
            max(0, int((row - half)[visible].min())),
            max(0, int((column - half)[visible].min())),
        )
        bottom, right = (
            int((row + half)[visible].max()) + 1,
            int((column + half)[visible].max()) + 1,
        )
        box = (slice(top, min(bottom, self.size)), slice(left, min(right, self.size)))
        return box, field[box]

    def _stamp(self, field, part, row, column, size, z, z_scale):
        """Takes the minimum of `field` with the distance to each tube, over squares of `size`
        pixels."""
        size = min(size, self.size)
        top = np.clip(np.rint(row - size / 2).astype(int), 0, self.size - size)
        left = np.clip(np.rint(column - size / 2).astype(int), 0, self.size - size)
        stretch = np.array([1, 1, z_scale], np.float32)
        start, run = part.start, (part.end - part.start) * stretch
        along = run / (np.square(run).sum(axis=1, keepdims=True) + np.float32(1e-9))
        u, v = (
            self._patches(plane, top, left, size) - start[:, k, None, None]
            for k, plane in enumerate((self.x, self.y))
        )
        w = ((z - start[:, 2]) * z_scale).astype(np.float32)
        along, run = along[:, :, None, None], run[:, :, None, None]
        t = u * along[:, 0]
        t += v * along[:, 1]
        t += w[:, None, None] * along[:, 2]
        np.clip(t, 0, 1, out=t)
        u -= t * run[:, 0]
        v -= t * run[:, 1]
        u *= u
        v *= v
        u += v
        u += (w[:, None, None] - t * run[:, 2]) ** 2
        distance = np.sqrt(u, out=u)
        distance -= part.start_radius[:, None, None]
        t *= (part.end_radius - part.start_radius)[:, None, None]
        distance -= t
        if size <= 24:
            # Many small squares: one scattered minimum beats a loop tenfold.
            offset = np.arange(size)
            rows, columns = (top[:, None] + offset) * self.size, left[:, None] + offset
            index = (rows[:, :, None] + columns[:, None, :]).reshape(-1)
            np.minimum.at(field.reshape(-1), index, distance.reshape(-1))
            return
        for r, c, patch in zip(top, left, distance, strict=True):
            view = field[r : r + size, c : c + size]
            np.minimum(view, patch, out=view)

    def _patches(
        self, plane: np.ndarray, top: np.ndarray, left: np.ndarray, size: int
    ) -> np.ndarray:
        """Squares [N, size, size] of a coordinate plane; small ones are taken as linear, which is
        much faster."""
        offset = np.arange(size)
        if size > 32:
            return plane[(top[:, None] + offset)[:, :, None], (left[:, None] + offset)[:, None, :]]
        corner = plane[top, left]
        down = (plane[top + size - 1, left] - corner) / (size - 1)
        across = (plane[top, left + size - 1] - corner) / (size - 1)
        offset = offset.astype(np.float32)
        rows = corner[:, None] + down[:, None] * offset
        return rows[:, :, None] + (across[:, None] * offset)[:, None, :]


def around(
    distance: np.ndarray, box: tuple[slice, slice], wanted: tuple[slice, slice]
) -> np.ndarray:
    """A field known in `box`, cut to `wanted`; `FAR` where it is unknown."""
    shape = (wanted[0].stop - wanted[0].start, wanted[1].stop - wanted[1].start)
    result = np.full(shape, FAR, np.float32)
    r0, r1 = max(box[0].start, wanted[0].start), min(box[0].stop, wanted[0].stop)
    c0, c1 = max(box[1].start, wanted[1].start), min(box[1].stop, wanted[1].stop)
    if r1 > r0 and c1 > c0:
        result[
            r0 - wanted[0].start : r1 - wanted[0].start, c0 - wanted[1].start : c1 - wanted[1].start
        ] = distance[r0 - box[0].start : r1 - box[0].start, c0 - box[1].start : c1 - box[1].start]
    return result


def tube_distance(x: np.ndarray, y: np.ndarray, z: float, capsules: Capsules) -> np.ndarray:
    """Signed distance of points of a slice to a few tubes, everywhere (for the coarse grid)."""
    result = np.full(x.shape, FAR, np.float32)
    low, high, reach = capsules.extent
    reach = reach + 12
    # Points far from all of them stay at FAR.
    centre = (np.abs(x) < 85) & (np.abs(y + 5) < 80)
    whole, x, y = result, x[centre], y[centre]
    result = whole[centre]
    for i in np.flatnonzero((low - reach < z) & (high + reach > z)):
        start, run = capsules.start[i], capsules.end[i] - capsules.start[i]
        u, v, w = x - start[0], y - start[1], np.float32(z - start[2])
        t = np.clip((u * run[0] + v * run[1] + w * run[2]) / np.float32(run @ run + 1e-9), 0, 1)
        distance = np.sqrt((u - t * run[0]) ** 2 + (v - t * run[1]) ** 2 + (w - t * run[2]) ** 2)
        taper = capsules.end_radius[i] - capsules.start_radius[i]
        np.minimum(result, distance - capsules.start_radius[i] - t * taper, out=result)
    whole[centre] = result
    return whole


def _interpolated(nodes: np.ndarray, step: int) -> np.ndarray:
    """Catmull-Rom interpolation along the first axis: `step` values from each of the inner nodes
    [N, M] on, [(N - 3) * step, M] float32; the first and the last two nodes shape it alone."""
    count = len(nodes) - 3
    values = np.empty((count, step, nodes.shape[1]), np.float32)
    values[:, 0] = nodes[1:-2]
    for part in range(1, step):
        t = part / step
        weights = (
            ((-0.5 * t + 1) * t - 0.5) * t,
            (1.5 * t - 2.5) * t * t + 1,
            ((-1.5 * t + 2) * t + 0.5) * t,
            (0.5 * t - 0.5) * t * t,
        )
        values[:, part] = sum(
            np.float32(weight) * nodes[at : at + count] for at, weight in enumerate(weights)
        )
    return values.reshape(count * step, -1)
