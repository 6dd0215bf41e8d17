"""HU of tissues that the contrast medium does not reach.

All are made up within the usual ranges of chest CT of adults: no patient was measured for them.
"""

FAT, MUSCLE, FLUID, METAL = -102.0, 56.0, 12.0, 2600.0
