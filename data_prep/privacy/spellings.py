"""Words and spellings that vendors use for kernels, and words for ethnic groups.

A free text of a header is published only if all of it is made of them, since people write names and
numbers into any field. The sources are the vendors' DICOM conformance statements and the kernels of
public archives (LIDC-IDRI, NLST, RSNA, CT-RATE).
"""

import re

_WORDS = set(
    # GE
    "standard std stand stnd soft lung lungs bone boneplus plus detail detl chst chest edge "
    "ultra hd "
    "asir asirv ss asir-v truefidelity veo mbir gen1 i30s dlir high medium low h m l performix "
    # Canon and Toshiba
    "aidr aidr3d qds 3d aice enhanced first body cardiac mild strong str weak standardplus boost "
    # Philips
    "idose imr ximr det smooth smoother sharp sharper bodyroutine brainroutine routine "
    "softtissue tissue sharpplus "
    "softplus y-sharp y-detail y-edge ysharp ydetail brilliance spectral level "
    # Siemens, and reconstructions in words
    "safire admire iris mono qir monoplus medium vmi "
    # United Imaging, Neusoft, Hitachi, Fujifilm, Samsung
    "vsharp vsoft vvsharp karl clearview ipv intelli ip nr ai hybrid quantum vivid "
    # common words
    "head brain neuro neck ear inner iac spine abdomen abdo abdominal pelvis thorax thoracic "
    "mediastinum vascular angio cta cta1 ct heart liver airway airways extremity pediatric "
    "paediatric "
    "child adult infant filter kernel asa algorithm recon general normal fine extra very "
    "super large "
    "small x off on no none unknown default fbp iterative ir conventional multi purpose "
    "denoise denoised noise reduction quality image resolution res hires high-res contrast".split()
)
_SPELLINGS = re.compile(
    r"""
    [ABCDEHIJQSTU][0-9]{2}[a-z]?          # Siemens B30f, H31s, I31f, U90u
    | [BHQSTU][a-z][0-9]{2}[a-z]?       # Siemens Br40d, Hr38, Qr44, Sa36f
    | F[CL][0-9]{2}[A-Z]?               # Toshiba, Canon FC08
    | [A-Z]                             # Philips A, B, D, L; suffixes as in FC51-H
    | [YUESCL][A-F]                     # Philips YA, EB
    | i?[0-9]{1,2}                      # Hitachi 31; iteration levels
    | [A-Z]{1,2}[0-9]{1,2}              # Neusoft F20, UIH
    | (?:SS|SR|AR|AV|ASV?|AR?)[0-9]{2,3}%?  # GE SS50, AR50
    | (?:idose|imr|v|lv|level|asir|dlir)[0-9]{1,3}
    """,
    re.VERBOSE | re.IGNORECASE,
)
_SUFFIX = re.compile(r"[A-F]{2}")  # behind another word: United Imaging B_SOFT_AB
_LEVELS = set("h m l x s".split())
_MOST_WORDS = 6
_GROUPS = set(
    "aboriginal african afr afro amer asn alaska alaskan american amerindian arab arabian "
    "asian australian black "
    "brown caribbean caucasian caucasoid chinese coloured colored declined east eastern ethnic "
    "ethnicity european filipino group hawaiian hispanic indian indigenous islander "
    "japanese jewish "
    "korean latin latina latino latinx maori malay mexican middle mixed mongoloid more mulatto "
    "multi multiple multiracial native negroid non none north northern not oriental or and other "
    "others pacific persian polynesian puerto rican race races romani refused south southeast "
    "southern spanish specified stated than thai torres strait turkish two unavailable undisclosed "
    "unknown unreported unspecified vietnamese west western white".split()
)


def is_known_kernel(text: str) -> bool:
    """Whether a kernel is a vendor's spelling, such as `B30f`, `FC51-H` or `Smooth (iDose 4)`."""
    words = [word for word in re.split(r"[ .,_+/()-]+", text) if word]
    known = [
        word.casefold() in _WORDS
        or bool(_SPELLINGS.fullmatch(word))
        or (number > 0 and bool(_SUFFIX.fullmatch(word)))
        for number, word in enumerate(words)
    ]
    # initials and an age, or a date, are made of short words alone
    telling = [word for word in words if len(word) > 2 or word.casefold() in _WORDS - _LEVELS]
    numbers = [word for word in words if word.isdigit()]
    return (
        text[:1].isalnum()
        and (text.casefold() in _WORDS or all(known))
        and len(words) <= _MOST_WORDS
        and (len(words) == 1 or bool(telling))
        and len(numbers) <= 2
    )


def is_known_group(text: str) -> bool:
    """Whether an ethnic group is made of words for such groups and a code, as in `group_a`."""
    *words, last = re.split(r"[ _/-]+", text)
    is_code = (
        last.isascii() and last.isalnum() and len(last) <= (2 if words else 1 + last[0].isalpha())
    )
    return all(word.casefold() in _GROUPS for word in words) and (
        last.casefold() in _GROUPS or is_code
    )
