"""Segmentation masks: reading DICOM-SEG and NIfTI, writing both, regions of a mask."""
