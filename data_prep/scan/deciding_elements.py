"""The elements of the headers that decide a refusal, with their values, for the archive's owner."""

import collections
from collections.abc import Callable, Sequence

from data_prep.scan.headers import NIFTI, Header
from data_prep.scan.image_kinds import fault, foreign
from data_prep.scan.series import Rejection

# element -> its value in a header; None and "" are missing
_VALUES: dict[str, Callable[[Header], object]] = {
    "Transfer Syntax UID (0002,0010)": lambda header: header.transfer_syntax,
    "Image Type (0008,0008)": lambda header: "\\".join(header.image_type),
    "SOP Class UID (0008,0016)": lambda header: header.sop_class_uid,
    "Modality (0008,0060)": lambda header: header.modality,
    "Body Part Examined (0018,0015)": lambda header: header.body_part,
    "Slice Thickness (0018,0050)": lambda header: header.slice_thickness,
    "Convolution Kernel (0018,1210)": lambda header: header.kernel,
    "Series Instance UID (0020,000E)": lambda header: header.series_instance_uid,
    "Image Position (Patient) (0020,0032)": lambda header: _numbers(header.position),
    "Image Orientation (Patient) (0020,0037)": lambda header: _numbers(header.orientation),
    "Samples per Pixel (0028,0002)": lambda header: header.samples_per_pixel,
    "Photometric Interpretation (0028,0004)": lambda header: header.photometric,
    "Rows (0028,0010)": lambda header: header.rows,
    "Columns (0028,0011)": lambda header: header.columns,
    "Pixel Spacing (0028,0030)": lambda header: _numbers(header.pixel_spacing),
    "Burned In Annotation (0028,0301)": lambda header: "YES" if header.burned_in_annotation else "",
    "Rescale Intercept (0028,1052)": lambda header: header.rescale_intercept,
    "Rescale Slope (0028,1053)": lambda header: header.rescale_slope,
    "Rescale Type (0028,1054)": lambda header: header.rescale_type,
}
_PIXELS = "Pixel Data (7FE0,0010)"
_POSITION = "Image Position (Patient) (0020,0032)"
_RESCALE = ("Rescale Slope (0028,1053)", "Rescale Intercept (0028,1052)")
_GRID = ("Rows (0028,0010)", "Columns (0028,0011)", "Pixel Spacing (0028,0030)")
# reason -> elements that decide it; reasons that no element decides are left out
DECIDING = {
    "missing_series_uid": ("Series Instance UID (0020,000E)",),
    "not_ct": ("Modality (0008,0060)",),
    "localizer": ("Image Type (0008,0008)",),
    "not_axial": ("Image Orientation (Patient) (0020,0037)",),
    "unknown_orientation": ("Image Orientation (Patient) (0020,0037)",),
    "rotated": ("Image Orientation (Patient) (0020,0037)",),
    "missing_position": (_POSITION,),
    "missing_pixel_spacing": ("Pixel Spacing (0028,0030)",),
    "implausible_spacing": _GRID,
    "secondary_capture": ("SOP Class UID (0008,0016)",),
    "derived_image": ("Image Type (0008,0008)", "Rescale Type (0028,1054)"),
    "not_grey": ("Photometric Interpretation (0028,0004)", "Samples per Pixel (0028,0002)"),
    "burned_in_annotation": ("Burned In Annotation (0028,0301)",),
    "no_chest": (_PIXELS, "Body Part Examined (0018,0015)"),
    "grid_varies": _GRID,
    "mixed_stacks": (_POSITION,),
    "too_thick": ("Slice Thickness (0018,0050)",),
    "too_many_lost": (_POSITION,),
    "irregular": (_POSITION,),
    "other_reconstruction": ("Convolution Kernel (0018,1210)", "Slice Thickness (0018,0050)"),
    "undecodable_pixels": (_PIXELS, "Transfer Syntax UID (0002,0010)"),
    "unsupported_transfer_syntax": ("Transfer Syntax UID (0002,0010)",),
    "truncated_pixel_data": (_PIXELS, *_GRID[:2]),
    "missing_rescale": (*_RESCALE, _PIXELS),
    "implausible_hu": (_PIXELS, *_RESCALE),
    "other_scale": (_PIXELS, *_RESCALE),
    "contradictory_duplicates": (_PIXELS, _POSITION),
}


def deciding(rejection: Rejection) -> str:
    """The elements that decide a refusal, with their most frequent values among the images that
    show the reason; "" if no element does.

    Private: values of headers are as the scanner or a person wrote them. Positions, which differ
    from slice to slice, and pixels are named without a value.
    """
    reason, headers = rejection.reason, rejection.headers
    if headers[0].transfer_syntax == NIFTI:
        return ""
    shown = [header for header in headers if reason in (foreign(header), fault(header))] or headers
    texts = []
    for element in DECIDING.get(reason, ()):
        if element == _PIXELS and rejection.thumbnail is None:
            continue  # the headers were enough
        if element == _PIXELS or (element == _POSITION and reason != "missing_position"):
            texts.append(element)
            continue
        values = collections.Counter(_VALUES[element](header) for header in shown)
        value, number = values.most_common(1)[0]
        text = f"{value:g}" if isinstance(value, float) else str(value)
        text = "missing" if value in (None, "") else text
        rest = f" ({number} of {len(shown)} images)" if len(values) > 1 else ""
        texts.append(f"{element} = {text}{rest}")
    return "; ".join(texts)


def _numbers(values: Sequence[float] | None) -> str:
    return "\\".join(f"{value:g}" for value in values or ())
