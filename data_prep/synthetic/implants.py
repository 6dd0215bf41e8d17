"""Metal and plastic in the chest: pacemakers with leads, ports with catheters, wires and clips.

In reference space.
"""

import dataclasses

import numpy as np

from data_prep.synthetic.patient import PLEURA_FRONT, Patient
from data_prep.synthetic.shapes import Canvas, Capsules, ellipsoid, join, polyline
from data_prep.synthetic.tissues import METAL

SHARES = {"pacemaker": 0.05, "port": 0.07, "sternotomy": 0.08}
# From a subclavian vein through the upper caval vein into the right heart.
CAVA = ((-25, -30, 46), (-30, -32, 20), (-31, -28, -16))


@dataclasses.dataclass(frozen=True)
class Implant:
    """Tubes of some HU, and a case: an ellipsoid of `centre` and `radii`, None for none."""

    tubes: Capsules
    hu: float
    centre: tuple[float, float, float] | None = None
    radii: tuple[float, float, float] = (1.0, 1.0, 1.0)


def sample_implants(patient: Patient, rng: np.random.Generator) -> tuple[Implant, ...]:
    """The implants of a patient, mostly none."""
    implants = []
    draws = {name: rng.random() < share for name, share in SHARES.items()}
    front = float(PLEURA_FRONT(44)) - 20
    if draws["pacemaker"] and patient.age > 45:
        side = 1 if rng.random() < 0.8 else -1
        case = (side * float(rng.uniform(66, 86)), front - 2, float(rng.uniform(36, 54)))
        apex = (18 + patient.heart_shift[0], -58.0, -92.0)
        leads = polyline([case, (side * 52, -22, 74), (-4, -38, 54), *CAVA, apex], 1.3)
        implants.append(Implant(leads, METAL, case, (21.0, 5.0, 19.0)))
    if draws["port"]:
        case = (-float(rng.uniform(58, 80)), front - 4, float(rng.uniform(30, 50)))
        catheter = polyline([case, (-50, -20, 76), *CAVA], 1.3)
        implants.append(Implant(catheter, 420.0, case, (12.0, 6.0, 12.0)))
    if draws["sternotomy"]:
        wires = []
        for z in np.linspace(40, -70, 6) + rng.normal(0, 3, 6):
            y = float(PLEURA_FRONT(z)) - 8
            loop = [(-13, y, z), (-9, y - 8, z + 1), (9, y - 8, z - 1), (13, y, z), (0, y + 7, z)]
            wires.append(polyline([*loop, loop[0]], 0.8))
        for _ in range(int(rng.integers(0, 6))):
            start = np.array([rng.normal(25, 18), rng.normal(-62, 8), rng.uniform(-70, -10)])
            wires.append(polyline([start, start + rng.normal(0, 3, 3)], 1.0))
        implants.append(Implant(join(wires), METAL))
    return tuple(implants)


def paint_implants(canvas: Canvas, implants: tuple[Implant, ...], z: float) -> None:
    """The implants that a slice cuts."""
    for implant in implants:
        cut = canvas.tubes(implant.tubes, z)
        if cut is not None:
            canvas.fill(*cut, implant.hu)
        if implant.centre is None or abs(z - implant.centre[2]) > implant.radii[2]:
            continue
        box = canvas.box(*implant.centre[:2], max(implant.radii) + 3)
        x, y = canvas.x[box], canvas.y[box]
        case = ellipsoid(x, y, z, implant.centre, implant.radii, (1.0, 0.0, 0.0))
        canvas.fill(box, case.astype(np.float32), METAL)
