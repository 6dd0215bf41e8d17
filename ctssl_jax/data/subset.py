"""A part of a split that stands for the whole: spread over patients, volumes and classes."""

from collections.abc import Sequence

import numpy as np

from ctssl_jax.data.slices import NeighbourSource

# Slices of each class, or with and without foreground, that a part holds at least: fewer positives
# tell little about AUROC and Dice.
FEWEST_OF_A_KIND = 64


def spread_items(source: NeighbourSource, number: int, seed: int) -> np.ndarray:
    """Items of a part of a split. They depend on the split, the number and the seed alone.

    Each class of the label, or slices with and without foreground, has its share of the split, but
    at least `FEWEST_OF_A_KIND` slices where there are so many (in a part that is too small for
    that, an equal share). All patients get the same number of slices, as far as they have so many.
    The slices of a patient lie at equal distances; the seed draws where they begin.

    Args:
      source: the split.
      number: size of the part; 0, or more than the split holds, takes the whole split.
      seed: `config.seed`.

    Returns:
      [min(number, N)] int64 items of `source`, in order; [N] if `number` is 0.
    """
    if number == 0 or number >= len(source):
        return np.arange(len(source))
    random = np.random.default_rng(seed)
    patients = source.patients
    num_patients = int(patients.max()) + 1
    order = random.permutation(num_patients)
    starts = random.random(num_patients)
    kinds = _kinds(source)
    taken, items = np.zeros(num_patients, np.int64), []
    # The rarest first, so that the others even out what each patient has.
    quotas = _quotas([len(kind) for kind in kinds], number)
    for kind, quota in sorted(zip(kinds, quotas, strict=True), key=lambda pair: len(pair[0])):
        kind = kind[np.argsort(patients[kind], kind="stable")]
        there = np.bincount(patients[kind], minlength=num_patients)
        wanted = _filled(taken, there, quota, order)
        firsts = np.cumsum(there) - there
        for patient in np.flatnonzero(wanted):
            places = (np.arange(wanted[patient]) + starts[patient]) * there[patient]
            items.append(kind[firsts[patient] + (places / wanted[patient]).astype(np.int64)])
        taken += wanted
    return np.sort(np.concatenate(items))


def _kinds(source: NeighbourSource) -> list[np.ndarray]:
    """Items of each class of the label, or with and without foreground; else all in one."""
    classes = source.positive if source.labels is None else source.labels
    if classes is None:
        return [np.arange(len(source))]
    return [np.flatnonzero(classes == value) for value in np.unique(classes)]


def _quotas(sizes: Sequence[int], number: int) -> list[int]:
    """Numbers that add up to `number` < sum of `sizes`: in proportion, with a least number each."""
    least = [min(size, FEWEST_OF_A_KIND, number // len(sizes)) for size in sizes]
    small: set[int] = set()
    while True:
        rest = number - sum(least[kind] for kind in small)
        total = sum(size for kind, size in enumerate(sizes) if kind not in small)
        shares = [
            float(least[kind]) if kind in small else rest * size / total
            for kind, size in enumerate(sizes)
        ]
        below = {kind for kind, share in enumerate(shares) if share < least[kind]}
        if not below:
            break
        small |= below
    quotas = [int(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda kind: quotas[kind] - shares[kind])
    for kind in by_remainder[: number - sum(quotas)]:
        quotas[kind] += 1
    return quotas


def _filled(taken: np.ndarray, there: np.ndarray, number: int, order: np.ndarray) -> np.ndarray:
    """How many of `there` each patient gives, so that `taken` and these are as even as possible.

    Args:
      taken: [P] items that the patients gave before.
      there: [P] items that they have.
      number: items to give, at most the sum of `there`.
      order: [P] permutation: who gives one more where they cannot all give the same.
    """
    low, high = 0, int((taken + there).max())
    while low < high:
        level = (low + high + 1) // 2
        if np.clip(level - taken, 0, there).sum() <= number:
            low = level
        else:
            high = level - 1
    given = np.clip(low - taken, 0, there)
    more = np.clip(low + 1 - taken, 0, there) > given
    given[order[more[order]][: number - given.sum()]] += 1
    return given
