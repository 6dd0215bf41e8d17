"""A synthetic archive of chest CT: patients made of formulas, written as genuine DICOM files."""
