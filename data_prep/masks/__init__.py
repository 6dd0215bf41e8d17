"""Segmentation masks: reading and writing DICOM-SEG and NIfTI, and the regions of a mask."""
