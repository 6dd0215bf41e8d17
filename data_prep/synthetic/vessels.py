"""Vessels and airways of the phantom: great vessels by their centre lines, trees grown into the
lungs.

The trees follow the volume-filling rule of Tawhai and others: a branch runs part of the way to the
centre of the points that it supplies, splits them by a plane and repeats until one point a branch
is left. Radii follow Murray's law: r is proportional to a power of the number of points supplied.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from data_prep.synthetic.shapes import Capsules, join, polyline


@dataclasses.dataclass(frozen=True)
class Vessels:
    """Tubes by their content, in reference space. `mediastinal` are the large tubes that push the
    lungs aside; `arteries_parent` [N] is the index of the segment that each segment of
    `arteries_tree` comes from, -1 at a root."""

    aorta: Capsules
    pulmonary_arteries: Capsules
    caval_veins: Capsules
    pulmonary_veins: Capsules
    oesophagus: Capsules
    trachea: Capsules
    mediastinal: Capsules
    arteries_tree: Capsules
    arteries_parent: np.ndarray
    veins_tree: Capsules
    airways_tree: Capsules


def great_vessels(patient: Any, spine_y: Callable[[float], float]) -> Vessels:
    """The large vessels, oesophagus and trachea of a `patient.Patient`; the trees are still
    empty."""
    s = patient.aorta_scale
    descending = [
        (24 - 0.09 * max(0, -60 - z), float(spine_y(z)) - 25 + 0.03 * max(0, -60 - z), z)
        for z in range(4, -240, -18)
    ]
    arch = [
        (2, -26, -56),
        (-12, -36, -36),
        (-19, -40, -14),
        (-17, -38, 10),
        (-9, -28, 27),
        (3, -13, 35),
        (14, 3, 34),
        (21, 14, 24),
    ]
    radii = [15 * s, 16 * s, 16 * s, 15.5 * s, 14.5 * s, 14 * s, 13.5 * s, 13 * s]
    aorta = join(
        [
            polyline(
                np.array(arch + descending),
                radii + [12.5 * s] * 5 + [11.5 * s] * (len(descending) - 5),
            ),
            polyline(
                [(-7, -24, 32), (-15, -20, 50), (-24, -12, 75), (-34, -6, 118)], [7, 6.5, 6, 5.5]
            ),
            polyline([(2, -14, 38), (8, -12, 62), (16, -8, 120)], [5, 4.5, 4.5]),
            polyline([(12, 2, 38), (20, 4, 62), (32, 4, 88), (60, -2, 106)], [5.5, 5, 5, 4.5]),
        ]
    )
    arteries = join(
        [
            polyline([(18, -52, -48), (19, -44, -26), (14, -30, -16)], [15, 14.5, 13.5]),
            polyline(
                [(16, -34, -18), (28, -14, -10), (40, 8, -12), (46, 20, -26)], [12.5, 11.5, 10, 8]
            ),
            polyline(
                [(12, -28, -18), (-12, -18, -20), (-34, -12, -22), (-44, -2, -30), (-47, 8, -44)],
                [12, 11, 10, 8.5, 7.5],
            ),
        ]
    )
    cava = join(
        [
            polyline(
                [(-25, -30, 46), (-30, -32, 20), (-31, -28, -16), (-30, -24, -50)],
                [9, 9.5, 9.5, 10],
            ),
            polyline(
                [(-25, -30, 46), (-32, -24, 66), (-44, -14, 84), (-70, -18, 104)], [8, 7, 7, 6]
            ),
            polyline(
                [(-24, -32, 44), (-4, -40, 52), (22, -34, 62), (40, -18, 84), (70, -20, 104)],
                [7.5, 7, 7, 7, 6],
            ),
            polyline(
                [(-25, -8, -97), (-24, -4, -108), (-22, 6, -140), (-20, 18, -240)],
                [12, 12, 12, 11.5],
            ),
            polyline(
                [(-29, -24, -6), (-20, 8, -2), (-10, float(spine_y(-30)) - 20, -22)], [4.5, 4, 4]
            ),
            polyline([(-7, float(spine_y(z)) - 21, z) for z in range(-22, -240, -30)], 3.4),
        ]
    )
    veins = join(
        [
            polyline([(-16, 6, -46), (-34, -8, -40), (-46, -14, -34)], [8, 7, 6]),
            polyline([(-18, 16, -54), (-34, 22, -60), (-44, 26, -66)], [8, 7, 6.5]),
            polyline([(24, 6, -42), (40, -8, -34), (48, -14, -26)], [8, 7, 6]),
            polyline([(26, 16, -52), (38, 24, -58), (46, 30, -66)], [8, 7, 6.5]),
        ]
    )
    oesophagus = polyline(
        [
            (2 + 5 * np.sin(z / 60), float(spine_y(z)) - 28 + (4 if z > 0 else 0), z)
            for z in range(125, -150, -15)
        ]
        + [(30, 0, -158)],
        7.0,
    )
    trachea = join(
        [
            polyline(
                [(1, float(spine_y(z)) - 42, z) for z in (125, 90, 60)] + [(0, 6, 30), (0, 12, 2)],
                8.8,
            ),
            polyline([(0, 12, 2), (-18, 15, -12), (-34, 14, -22)], [8, 7.2, 6.6]),
            polyline([(0, 12, 2), (20, 17, -14), (38, 19, -24)], [7.4, 6.4, 6.0]),
        ]
    )
    empty = Capsules(*(np.zeros(shape, np.float32) for shape in ((0, 3), (0, 3), 0, 0)))
    # Neck vessels stay out: the mediastinum's own width covers them.
    large = join(
        [
            aorta.select(np.arange(len(arch) + len(descending) - 1)),
            arteries,
            cava,
            veins,
            oesophagus,
            trachea,
        ]
    )
    large = large.select(np.maximum(large.start[:, 2], large.end[:, 2]) < 70)
    return Vessels(
        aorta,
        arteries,
        cava,
        veins,
        oesophagus,
        trachea,
        large,
        empty,
        np.zeros(0, int),
        empty,
        empty,
    )


def grow_trees(great: Vessels, points: np.ndarray, seed: int) -> Vessels:
    """`great` with arterial, venous and bronchial trees that reach the points [N, 3] of the
    lungs."""
    rng = np.random.default_rng(seed + 1)
    chosen = rng.permutation(len(points))[:12000]
    arterial, venous = points[chosen[: len(chosen) // 2]], points[chosen[len(chosen) // 2 :]]
    hila = np.array([(-46, 4, -38), (46, 18, -22)], np.float32)
    arteries, parent, supplied = _grow(hila, arterial, (arterial[:, 0] > 0).astype(int), rng)
    low = venous[:, 2] < -52 + 0.55 * (-venous[:, 1])
    ostia = np.array([(-46, -14, -34), (-44, 26, -66), (48, -14, -26), (46, 30, -66)], np.float32)
    veins, _, _ = _grow(ostia, venous, 2 * (venous[:, 0] > 0) + low, rng)
    roots, airways = _airways(arteries, parent, supplied)
    return dataclasses.replace(
        great,
        trachea=join([great.trachea, roots]),
        arteries_tree=arteries,
        arteries_parent=parent,
        veins_tree=veins,
        airways_tree=airways,
    )


def _grow(
    roots: np.ndarray, points: np.ndarray, group: np.ndarray, rng
) -> tuple[Capsules, np.ndarray, np.ndarray]:
    """One tree a root [G, 3]; point i [N, 3] belongs to the tree `group[i]`, all trees grow
    together.

    Returns the segments, the index of each one's parent (-1: a root), and the number of points
    behind each.
    """
    node = roots
    parent, parent_radius = np.full(len(roots), -1), np.full(len(roots), 6.0, np.float32)
    starts, ends, first, last, parents, behind = [], [], [], [], [], []
    total = 0
    for generation in range(18):
        count = np.bincount(group, minlength=len(node))
        centroid = np.stack([np.bincount(group, points[:, k], len(node)) for k in range(3)], axis=1)
        centroid /= np.maximum(count, 1)[:, None]
        toward = centroid - node
        length = np.linalg.norm(toward, axis=1, keepdims=True) + 1e-6
        fraction = (np.where(count == 1, 0.9, 0.36 if generation < 2 else 0.42) * (count > 0))[
            :, None
        ]
        jitter = rng.normal(0, 0.03, node.shape) * length
        tip = node + toward * fraction + jitter * (generation > 0)
        # About 5.5 mm for a whole lung, 0.4 mm for one point.
        radius = np.maximum(0.36 * count ** (1 / 2.8), 0.36).astype(np.float32)
        radius = np.minimum(radius, parent_radius)
        starts.append(node)
        ends.append(tip)
        first.append(np.minimum(parent_radius, radius * 1.15))
        last.append(radius)
        parents.append(parent)
        behind.append(count)
        # Split the points of every branch by a plane along its direction, across an axis that
        # favours their widest spread.
        direction = toward / length
        centred = points - centroid[group]
        spread = np.stack(
            [np.bincount(group, np.abs(centred[:, k]), len(node)) for k in range(3)], axis=1
        )
        axis = spread / np.maximum(count, 1)[:, None] + rng.normal(0, 1.0, node.shape)
        widest = np.zeros_like(node)
        widest[np.arange(len(node)), axis.argmax(axis=1)] = 1
        widest += rng.normal(0, 0.25, node.shape)
        normal = widest - 0.6 * (widest * direction).sum(axis=1, keepdims=True) * direction
        # An uneven split makes a main branch that runs on and a side branch.
        along = np.einsum("nk,nk->n", centred, normal[group])
        reach = np.bincount(group, np.abs(along), len(node)) / np.maximum(count, 1)
        side = along > (reach * rng.uniform(-0.7, 0.7, len(node)))[group]
        alive = count[group] > 1
        if not alive.any():
            break
        points, group, side = points[alive], group[alive], side[alive]
        key, group = np.unique(2 * group + side, return_inverse=True)
        node, parent, parent_radius = (
            tip[key // 2].astype(np.float32),
            total + key // 2,
            radius[key // 2],
        )
        total += len(tip)
    tree = Capsules(*(np.concatenate(v).astype(np.float32) for v in (starts, ends, first, last)))
    return tree, np.concatenate(parents), np.concatenate(behind)


def _airways(
    arteries: Capsules, parent: np.ndarray, supplied: np.ndarray
) -> tuple[Capsules, Capsules]:
    """(tubes from the main bronchi into the lungs, bronchi beside the larger arteries)."""
    large = supplied >= 12
    side = np.where(arteries.start[large, :1] > 0, 1.0, -1.0)
    away = np.concatenate([-0.45 * side, np.full_like(side, 0.35), np.full_like(side, 0.7)], axis=1)
    radius = 0.78 * arteries.end_radius[large]
    before = np.where(
        parent[large] < 0, 5.2, np.minimum(0.78 * arteries.end_radius[parent[large]], 5.2)
    )
    start = arteries.start[large] + away * (2.6 * before[:, None] + 0.8)
    end = arteries.end[large] + away * (2.6 * radius[:, None] + 0.8)
    tree = Capsules(
        *(v.astype(np.float32) for v in (start, end, np.minimum(before, radius * 1.2), radius))
    )
    roots = join(
        [
            polyline([(-34, 14, -22), tree.start[i]], [6.2, 5.0])
            if tree.start[i, 0] < 0
            else polyline([(38, 19, -24), tree.start[i]], [5.8, 5.0])
            for i in range(2)
        ]
    )
    return roots, tree
