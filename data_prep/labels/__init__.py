"""Labels and attributes of scans: tables, RSNA-PE's train.csv, LIDC-IDRI's readers; what is right
for one exam."""
