#!/usr/bin/env bash
# A small artefact of the present formats: a dataset, a run, its exports, results and embeddings, of synthetic scans.
#   tests/compatibility/make.sh CHECKOUT NAME.tar.xz
# CHECKOUT is the tree whose formats are kept; its commands run as they were spelled from the start.
set -euo pipefail
checkout=$(cd "$1" && pwd)
packed=$(cd "$(dirname "$2")" && pwd)/$(basename "$2")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
export PYTHONPATH=$checkout JAX_PLATFORMS=cpu
python -m data_prep.phantom --output_dir=scans --num_patients=4 --image_size=32 --num_slices=6
python -m data_prep.prepare --archive=dicom --input_dir=scans --output_dir=dataset --image_size=16 --min_slices=6 \
    --splits=0.5,0.25,0.25
python -m ctssl_jax.train --config="$checkout/configs/masked_region.py:small" --config.dataset=dataset --workdir=run \
    --config.image_size=16 --config.batch_size=8 --config.num_steps=2 --config.eval_every=2 \
    --config.model.hidden='(4, 8)' --config.model.depth=1 --config.model.embedding_dim=8 --config.model.num_codes=16
python -m ctssl_jax.evaluate --workdir=run --dataset=dataset --output=result.json --checkpoint=last
python -m ctssl_jax.export --workdir=run --output_dir=export --license=CC0-1.0 --checkpoint=last
python -m ctssl_jax.embed --workdir=run --input=dataset --output=embedding.npz --checkpoint=last
if [ -f "$checkout/ctssl_jax/release/public_series.py" ]; then # later checkouts also write a hub's repository
    python - > published.csv << 'END'
import pathlib, pydicom
print("PatientID,StudyInstanceUID,SeriesInstanceUID")
files = [path for path in pathlib.Path("scans").rglob("*") if path.is_file() and pydicom.misc.is_dicom(path)]
scans = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
names = ("PatientID", "StudyInstanceUID", "SeriesInstanceUID")
print(*sorted({",".join(str(scan.get(name, "")) for name in names) for scan in scans}), sep="\n")
END
    python -m ctssl_jax.export --workdir=run --output_dir=hub --license=CC0-1.0 --checkpoint=last --format=hub \
        --results=result.json --public_series=published.csv
fi
rm -rf run/tensorboard run/pictures run/training.lock export/ctssl_torch.py export/weights.pt
rm -f {export,hub}/training.png hub/ctssl_torch.py
# Orbax writes the folder of the run into these files, which hold nothing else. The checksums follow.
find run -name commit_success.txt -exec sh -c 'echo "Checkpoint commit was successful" > "$1"' _ {} \;
sum=$(echo "Checkpoint commit was successful" | sha256sum | cut -d" " -f1)
sed -i "/commit_success.txt$/s/^[0-9a-f]*/$sum/" run/checkpoints/*/SHA256SUMS
# Nor does the folder of the datasets belong into an artefact.
for file in run/checkpoints/*/_CHECKPOINT_METADATA; do
    before=$(sha256sum "$file" | cut -d" " -f1)
    sed -i "s#$work/##g" "$file"
    sed -i "s/$before/$(sha256sum "$file" | cut -d" " -f1)/" "$(dirname "$file")/SHA256SUMS"
done
sed -i "s#$work/##g" run/config.json
tar -cJf "$packed" dataset run export $(ls -d hub 2> /dev/null) result.json embedding.npz
