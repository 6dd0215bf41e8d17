"""Age and sex of a person as headers and tables write them: one spelling for all.

A value that says nothing (a placeholder such as 999Y, an unknown sex) is missing. A text that
cannot be read is missing in a header and a ValueError in a table, where the user can correct it.
"""

import re

OLDEST = 90  # stands for every age above 89
_HIGHEST_AGE = 120  # years; no patient is older, so more is a placeholder
_FILLED = 999  # in any unit: the largest Age String
_AGE = re.compile(
    r"([-+]?[0-9]+(?:\.[0-9]*)?) ?(Y|YRS?|YEARS?|M|MONTHS?|W|WEEKS?|D|DAYS?)?", re.IGNORECASE
)
_YEARS = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25}
_SEXES = {
    **dict.fromkeys(("F", "FEMALE", "W", "WOMAN"), "F"),
    **dict.fromkeys(("M", "MALE", "MAN"), "M"),
    **dict.fromkeys(("O", "OTHER"), "O"),
    **dict.fromkeys(("", "U", "UNKNOWN", "UNDETERMINED"), ""),
}


def parse_age(text: str) -> int | None:
    """Age in whole years, 90 for an age above 89, from an Age String (nnnD, nnnW, nnnM or nnnY) or
    a number of years.

    None: no age. Placeholders are 0 years (infants have days, weeks or months), negative numbers,
    more than 120 years, and 999 of any unit.

    Raises:
        ValueError: another text.
    """
    text = " ".join(text.split())
    if not text:
        return None
    match = _AGE.fullmatch(text)
    if not match:
        raise ValueError("is not a number of years, nor like 061Y or 006M")
    number, unit = float(match[1]), (match[2] or "Y")[0].upper()
    years = number * _YEARS[unit]
    if not 0 <= years <= _HIGHEST_AGE or number == _FILLED or (number == 0 and unit == "Y"):
        return None
    return min(OLDEST, int(years + 1e-9))


def age_in_years(text: str) -> int | None:
    """`parse_age` of a header: None for any text that is no age."""
    try:
        return parse_age(text)
    except ValueError:
        return None


def parse_sex(text: str) -> str:
    """F, M or O; "" where it is unknown. `Female`, `male` and the like are read, too.

    Raises:
        ValueError: another text.
    """
    try:
        return _SEXES[text.strip().upper()]
    except KeyError:
        raise ValueError("is not F, M or O (nor Female, Male, Other)") from None


def sex_of(text: str) -> str:
    """`parse_sex` of a header: "" for any text that is no sex."""
    try:
        return parse_sex(text)
    except ValueError:
        return ""
