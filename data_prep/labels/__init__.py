"""Labels and attributes of scans: tables, RSNA-PE's train.csv, LIDC-IDRI's readers; their look-up
for one volume."""
