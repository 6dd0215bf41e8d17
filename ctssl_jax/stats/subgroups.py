"""Whether a model works alike in groups of patients: sex, age, ethnic group."""

from collections.abc import Sequence

import numpy as np

from ctssl_jax.stats import bootstrap
from ctssl_jax.stats.binary import binary_statistic
from ctssl_jax.stats.units import UNITS
from data_prep.system.errors import InputError

# Patients with a positive item, and as many with a negative item: with fewer, the measure of a
# group is chance.
LEAST_PATIENTS = 5


def age_band(age: int | None) -> str:
    """`60-69` for 60 to 69 whole years; `90+`, since ages above 89 are stored as 90; None: ""."""
    if age is None:
        return ""
    return "90+" if age >= 90 else f"{age // 10 * 10}-{age // 10 * 10 + 9}"


def performance_by_group(
    labels: np.ndarray,
    probabilities: np.ndarray,
    patient_ids: Sequence[str],
    groups: Sequence[str],
    metric: str = "auroc",
    threshold: float | None = None,
    *,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, object]:
    """A measure within each group of patients, and the largest difference between groups, with
    bootstrap intervals by patient.

    Args:
      labels: [N] 0 or 1.
      probabilities: [N] in [0, 1].
      patient_ids: N patients.
      groups: N names; "" leaves an item out, since its group is not known.
      metric: one of `binary.MEASURES`.
      threshold: for sensitivity and specificity, from validation data: the same for all groups.
      num_resamples, seed: as in `bootstrap.patient_bootstrap`.

    Returns:
      {"groups": name -> summary as `bootstrap.summaries`,
      "gap": summary of the highest minus the lowest value, with the names "highest" and "lowest"
      (None with fewer than two groups),
      "too_small": name -> {"num_positive_patients", "num_negative_patients"} of groups left out,
      "num_without_group": items}.
      A gap is never below 0, and groups of equal performance differ by chance, so its interval
      cannot show that groups perform equally.

    Raises:
      InputError: lengths that differ, an unknown measure, or no group that is large enough.
    """
    if not len(labels) == len(probabilities) == len(patient_ids) == len(groups) > 0:
        raise InputError(
            "subgroups need one label, probability, patient and group for each item, and at least "
            "one item"
        )
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    patient_ids, groups = np.asarray(patient_ids, str), np.asarray(groups, str)
    members, too_small = {}, {}
    for name in sorted(set(groups.tolist()) - {""}):
        chosen = np.flatnonzero(groups == name)
        patients = [
            len(set(patient_ids[chosen][labels[chosen] == label].tolist())) for label in (1, 0)
        ]
        if min(patients) < LEAST_PATIENTS:
            too_small[name] = {
                "num_positive_patients": patients[0],
                "num_negative_patients": patients[1],
            }
        else:
            members[name] = chosen
    if not members:
        raise InputError(
            f"no group has {LEAST_PATIENTS} patients with a positive and {LEAST_PATIENTS} with a "
            f"negative item (groups: {', '.join(too_small) or 'none'}); evaluate on a larger split"
        )
    statistics = {
        name: binary_statistic(labels[chosen], probabilities[chosen], threshold, [metric])
        for name, chosen in members.items()
    }

    def of_patients(patient_index: np.ndarray, num_patients: int) -> bootstrap.Draws:
        of_groups = {
            f"group {name}": statistics[name].of_patients(patient_index[chosen], num_patients)
            for name, chosen in members.items()
        }

        def values(times: np.ndarray) -> dict[str, np.ndarray]:
            by_name = {name: draws(times)[metric] for name, draws in of_groups.items()}
            spread = np.stack(list(by_name.values()))  # NaN where one is undefined
            return {**by_name, "gap": spread.max(axis=0) - spread.min(axis=0)}

        return values

    units = {
        **{f"group {name}": UNITS[metric] for name in members},
        "gap": f"highest minus lowest {metric} of a group",
    }
    statistic = bootstrap.Statistic(len(labels), of_patients)
    summaries = bootstrap.summaries(
        statistic, patient_ids, units, num_resamples=num_resamples, seed=seed
    )
    gap, by_group = summaries.pop("gap"), {}
    for name, chosen in members.items():
        counts = {
            "num_items": len(chosen),
            "num_positive": int(np.count_nonzero(labels[chosen] == 1)),
        }
        summary = summaries[f"group {name}"]
        summary.pop("num_volumes")
        by_group[name] = summary | counts | {"num_patients": len(set(patient_ids[chosen].tolist()))}
    gap.pop("num_volumes")
    gap["num_patients"] = len(set(patient_ids[np.concatenate(list(members.values()))].tolist()))
    ordered = sorted(by_group, key=lambda name: by_group[name]["mean"])
    return {
        "groups": by_group,
        "gap": gap | {"highest": ordered[-1], "lowest": ordered[0]} if len(members) > 1 else None,
        "too_small": too_small,
        "num_without_group": int(np.count_nonzero(groups == "")),
    }
