"""Names and explanations of refusals and of remarkable properties.

`REASONS`: why a file, a slice or a series is not taken. `NOTES`: remarkable properties of a volume
that is taken. `LEFT_OUT`: why a file of masks or annotations is not used.
"""

from typing import NamedTuple

FAILED_FOR_NOW = "failed_for_now"  # the only reason that is not final: the next run tries again

REASONS = {
    # files without an image
    "not_dicom": "The file is not a DICOM file.",
    "dicomdir": "The file is a DICOMDIR index; the images it lists are read where they lie.",
    "no_pixel_data": "The file is a DICOM object without an image, such as a dose report.",
    "unreadable": "The file or its DICOM header cannot be read.",
    "bad_zip": "The zip file or its member is damaged, has an unsound or a second name, or shares "
    "bytes with another.",
    "encrypted": "The zip member is protected by a password.",
    "packed": "The file is compressed in a way that is not read in place (.tar.gz, .xz, .7z ...); "
    "unpack it first.",
    "bad_packed": "The tar or gzip file is damaged, or its member has an unsound or a second name.",
    "nested_zip": "The zip file lies inside another zip file; unpack it first.",
    "not_nifti": "The file is not a NIfTI file (.nii, .nii.gz) with its voxels in it; a pair .hdr "
    "and .img must be made one file.",
    "several_volumes": "The NIfTI file is 4-D: it holds several volumes (phases, energies); split "
    "it into 3-D files.",
    "no_metadata": "The metadata table lacks a row of the NIfTI file.",
    "unknown_affine": "The NIfTI file does not say where its voxels lie, or its sform, qform, "
    "pixdim or unit contradict each other; correct its header.",
    "ambiguous_rescale": "The NIfTI file and the metadata table have different slopes or "
    "intercepts, or the values look like HU both with and without the table's, or neither way; "
    "correct the row, or leave its RescaleSlope and RescaleIntercept empty.",
    "too_large": "The file is larger, or more strongly compressed, than any CT.",
    "outside_archive": "The link or zip member points out of the input directory, or to a folder.",
    # images and series, judged by their headers
    "missing_series_uid": "The Series Instance UID is missing, so the slices cannot be told apart.",
    "not_ct": "The Modality is not CT.",
    "localizer": "The image is a localizer (scout, topogram).",
    "not_axial": "The image is sagittal, coronal or oblique.",
    "unknown_orientation": "Image Orientation (Patient) is missing or invalid.",
    "rotated": "The images are turned within their plane (Image Orientation (Patient)); resample "
    "them along the patient's axes.",
    "missing_position": "Image Position (Patient) is missing, no three numbers, or the same in all "
    "slices, so their places are unknown.",
    "missing_pixel_spacing": "Pixel Spacing is missing or no two numbers.",
    "implausible_spacing": "The pixel spacing makes the image larger than 1 m or smaller than 5 "
    "cm, as if it were in another unit than mm.",
    "secondary_capture": "The image is a secondary capture.",
    "derived_image": "The image is derived and without CT numbers (reformat, projection, map).",
    "not_grey": "The image is not monochrome.",
    "burned_in_annotation": "Burned In Annotation says YES.",
    "no_chest": "The volume does not cover the chest: too little lung between soft tissue, or "
    "another body part.",
    "grid_varies": "The slices differ in matrix or pixel spacing.",
    "other_grid": "The slice has another matrix or pixel spacing than nearly all others.",
    "other_origin": "The slice lies beside the others, at a position that another slice has.",
    "mixed_stacks": "Slices of several stacks (reconstructions, phases, passes) lie between each "
    "other, and no element of their headers leaves a whole stack.",
    "too_few_slices": "The series has too few slices.",
    "too_thick": "The slices are thicker than the limit.",
    "too_many_lost": "More slices are missing than the limit.",
    "irregular": "The volume has gaps or uneven spacing, and irregular volumes are refused.",
    "other_reconstruction": "Another reconstruction of the exam was taken.",
    # pixels
    "undecodable_pixels": "The pixel data cannot be decoded.",
    "unsupported_transfer_syntax": "No decoder reads the transfer syntax.",
    "truncated_pixel_data": "The pixel data ends early.",
    "missing_rescale": "Rescale Slope or Intercept is missing, and the stored values are not "
    "plausible as HU.",
    "implausible_hu": "The values are not plausible as HU.",
    "other_scale": "The slice's values are on another scale than the slices around it: its sign, "
    "slope or intercept is wrong, or it is padding alone.",
    "contradictory_duplicates": "Different images lie at one position.",
    "duplicate_slice": "The same image lies at the same position once more.",
    "lossy_copy": "The image is a copy of another one that was compressed with loss.",
    "acquisitions_meet": "The slice lies where two acquisitions meet; the first acquisition's was "
    "taken.",
    # labels and masks
    "no_annotation": "The series lacks an annotation or mask, so its findings are unknown.",
    "annotation_mismatch": "The annotations are of other slices than the series has, or outside "
    "its images.",
    "mask_mismatch": "The mask does not fit the images.",
    # the preparation itself
    "conversion_crashed": "The conversion failed in an unforeseen way; please report it.",
    FAILED_FOR_NOW: "Reading failed (disk, memory, network) or the worker was killed; run again "
    "to retry.",
    "series_changed": "Files came to a series that is in the dataset already; only a new dataset "
    "takes them.",
}
NOTES = {
    "no_patient_id": "The Patient ID is missing; the Study Instance UID stands in.",
    "no_slice_thickness": "Slice Thickness is missing or no number; the median spacing stands in.",
    "odd_slice_thickness": "A few slices name another Slice Thickness than nearly all others, "
    "whose was taken.",
    "patient_ids_joined": "The patient's scans carry several Patient IDs (other spellings, copies, "
    "missing in part); they count as one patient.",
    "gaps": "Slices are missing; no pair crosses a gap.",
    "uneven_spacing": "The spacing of the slices varies by more than a tenth.",
    "in_plane_jump": "The image origin jumps within the plane by more than 1 mm; no pair crosses "
    "the jump.",
    "gantry_tilt": "The gantry was tilted; the volume is not sheared upright.",
    "irregular_part": "Some slices lie at half the spacing or closer, as where two passes overlap; "
    "no pair is taken there.",
    "sparse_slices": "The slices lie more than three thicknesses apart; they make no pairs.",
    "rotated": "The images are turned within their plane by 0.5 to 5 degrees.",
    "other_body_part": "Body Part Examined names a part without lung; the lungs are there.",
    "split_by_acquisition": "The series holds several acquisitions of the same range; this is one.",
    **{
        f"split_by_{name}": f"The series holds several stacks that differ in {words}; this is one."
        for name, words in {
            "kernel": "Convolution Kernel",
            "thickness": "Slice Thickness",
            "temporal_position": "Temporal Position",
            "cardiac_phase": "Nominal Percentage of Cardiac Phase",
            "respiratory_phase": "Nominal Percentage of Respiratory Phase",
            "tube_voltage": "KVP",
            "image_type": "Image Type",
            "grid": "matrix or pixel spacing",
            "frame_of_reference": "Frame of Reference UID",
            "stack_id": "Stack ID",
            "series_number": "Series Number",
            "series_description": "Series Description",
            "patient_position": "Patient Position",
            "contrast": "Contrast/Bolus Agent",
            "storage": "the way their rows and columns are stored",
            "trigger_time": "Trigger Time",
            "acquisition_time": "Acquisition Time",
            "instance_number": "the runs of Instance Number",
        }.items()
    },
    "other_grid_dropped": "Slices of another matrix or pixel spacing were dropped.",
    "other_origin_dropped": "Slices beside the others, at positions that those have, were dropped.",
    "lossy_copies_dropped": "Copies that were compressed with loss were dropped.",
    "slices_lost": "Slices that could not be decoded, lack their rescale tags or are on another "
    "scale than their neighbours were dropped.",
    "duplicates_dropped": "Identical slices at one position were dropped.",
    "acquisitions_meet": "Where two acquisitions meet, slices differed at one position; the first "
    "one's was taken.",
    "no_rescale_tags": "Rescale tags are missing; the stored values are plausible as HU and were "
    "taken so.",
    "spacing_from_metadata": "The file's spacing differs by more than 1 % from the metadata "
    "table's, which was taken.",
    "hu_against_table": "The stored values are HU already; the slope and intercept of the metadata "
    "table, which are those of an earlier version, were not applied.",
    "fractional_hu": "Some values are not whole HU or beyond 16 bits; the volume is float32.",
}
LEFT_OUT = {
    "system_file": "The operating system put it there (._*, .DS_Store, Thumbs.db).",
    "damaged": "It is damaged or incomplete.",
    "packed": "It is compressed; unpack it first.",
    "of_no_series": "It does not say of which series it is.",
    "of_several_series": "It is of several series.",
    "other_mask": "It is a mask of surfaces, which are not read.",
    "contradicts": "It differs from another file of the same series, of which neither is used.",
}


class LeftOut(NamedTuple):
    """A file of masks or annotations that is not used.

    path: relative to their folder. reason: a name of `LEFT_OUT`. detail: free of the content.
    """

    path: str
    reason: str
    detail: str
