"""Parts of the real scans that some tests read, where they are there."""

from pathlib import Path

from data_prep.scan.archives import list_sources, read_bytes
from data_prep.scan.headers import Header, read_header


def parts_of_scans(real_data: Path, folder: Path) -> Path:
    """24 slices of each of three real scans, under names that name one of the patients."""
    sources = list(list_sources(real_data))
    for name in ("lidc_0001", "lidc_0003.zip", "cptac_pda_c3n_00249.zip"):
        headers = [read_header(real_data, s) for s in sources if s.path.startswith(name)]
        headers = sorted((h for h in headers if isinstance(h, Header)), key=lambda h: h.position[2])
        for number, header in enumerate(headers[40:64]):
            path = folder / name.replace(".zip", "") / f"C3N-00249 {number}.dcm"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(read_bytes(real_data, header.source))
    return folder
