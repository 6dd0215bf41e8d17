"""`score.json` of a checkpoint: the means of its validation, and the one that chooses the best.

It is written when the validation of a checkpoint that is already there is complete. So SHA256SUMS
of the checkpoint does not cover it, and it holds a checksum of its own.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.system.files import write_json

SCORE = "score.json"


class Score(NamedTuple):
    """The result of a validation.

    name: the score that chooses the best checkpoint, `config.best_by`.
    value: its mean over the validation slices; None if it is undefined or not finite. Such a
      checkpoint is never the best.
    higher_is_better: the direction of the choice.
    scores: all means by name; None where one is not finite.
    """

    name: str
    value: float | None
    higher_is_better: bool
    scores: dict[str, float | None]


def make_score(name: str, higher_is_better: bool, means: Mapping[str, float]) -> Score:
    """The score of a validation with these means; NaN, infinity and a missing mean become None."""
    finite = {key: float(value) if math.isfinite(value) else None for key, value in means.items()}
    return Score(name, finite.get(name), higher_is_better, finite)


def write_score(checkpoint: Path, score: Score) -> None:
    """Write the score beside the files of a complete checkpoint, whole or not at all."""
    content = {"step": int(checkpoint.name), **score._asdict()}
    write_json(checkpoint / SCORE, content | {"sha256": _checksum(content)})


def read_score(checkpoint: Path) -> tuple[Score | None, str]:
    """The score of a checkpoint, or None and why it cannot be used; ("" if it has none yet)."""
    path = checkpoint / SCORE
    try:
        content = json.loads(path.read_text())
        found = content.pop("sha256")
        step, score = content.pop("step"), Score(**content)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{path} cannot be read ({type(error).__name__})"
    if found != _checksum({"step": step, **content}):
        return None, f"{path} has another checksum"
    if str(step) != checkpoint.name:
        return None, f"{path} is of step {step}"
    return score, ""


def is_of_score(name: str) -> bool:
    """Whether a file of a checkpoint, by its name, is its score or an unfinished one."""
    return name.startswith(SCORE)


def best_step(scores: Mapping[int, Score]) -> int | None:
    """The step with the best score; None if there is none to choose by.

    Step 0 is never a candidate: nothing was learned. Of equal scores the later step is taken. The
    score of the newest checkpoint says by which name, which a resumed run may have changed.
    """
    if not scores:
        return None
    newest = scores[max(scores)]
    values = {step: score.scores.get(newest.name) for step, score in scores.items() if step > 0}
    sign = 1 if newest.higher_is_better else -1
    candidates = [(sign * value, step) for step, value in values.items() if value is not None]
    return max(candidates)[1] if candidates else None


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
