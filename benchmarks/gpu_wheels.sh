#!/usr/bin/env bash
# Collect in .whl/ the packages that training needs and an offline rented GPU machine lacks, for Python 3.12 on x86-64
# with torch 2.11 (CUDA), numpy, safetensors, einops, ninja, psutil and pytest already installed.
# Run this script, copy .whl/ to the GPU machine, and start there with
#   python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target ../site .whl/*.whl
#   export PYTHONPATH=$PWD/../site
# Versions are those of constraints.txt. deepspeed publishes no wheel, so one is built without its compiled operators.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v python3)
folder=$root/.whl
limit_mib=56  # of 64 MiB in total; the rest is for the working tree
needed=(hjson msgpack pydantic pydantic_core annotated_types typing_inspection typing_extensions py-cpuinfo omegaconf xxhash)

version_of() {
    local name=${1//[-_]/[-_]}
    grep -iE "^$name==" constraints.txt | head -n 1 | sed 's/.*==//' || true
}

rm -rf "$folder"
mkdir -p "$folder"
"$python" -c 'import torch' || { echo "gpu_wheels.sh: $python has no torch, which deepspeed's build requires; run make setup" >&2; exit 1; }
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel --quiet --no-deps --no-build-isolation \
    --wheel-dir "$folder" "deepspeed==$(version_of deepspeed)"
case $(ls "$folder") in
    deepspeed-*-py3-none-any.whl) ;;
    *) echo "gpu_wheels.sh: deepspeed's wheel must be py3-none-any to install elsewhere, got $(ls "$folder")" >&2; exit 1 ;;
esac
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
for package in "${needed[@]}"; do
    version=$(version_of "$package")
    [ -n "$version" ] || { echo "gpu_wheels.sh: constraints.txt has no version of $package" >&2; exit 1; }
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --dest "$folder" "$package==$version"
done
# pydantic requires one exact pydantic_core; fail here rather than on the GPU machine
"$python" - "$folder" <<'PYTHON'
import re
import sys
import zipfile
from pathlib import Path

wheels = {path.name.split("-")[0].lower().replace("_", "-"): path for path in Path(sys.argv[1]).glob("*.whl")}
metadata = zipfile.ZipFile(wheels["pydantic"])
text = next(metadata.read(name).decode() for name in metadata.namelist() if name.endswith("METADATA"))
wanted = re.search(r"^Requires-Dist: pydantic-core==(\S+)", text, re.MULTILINE)[1]
found = wheels["pydantic-core"].name.split("-")[1]
if wanted != found:
    raise SystemExit(f"gpu_wheels.sh: pydantic requires pydantic-core {wanted}, but constraints.txt has {found}")
PYTHON
du -k "$folder"/*.whl | awk '{printf "%8.2f MiB  %s\n", $1 / 1024, $2}' | sed "s|$folder/||"
total_kib=$(du -ck "$folder"/*.whl | tail -n 1 | cut -f 1)
echo "$(awk "BEGIN {printf \"%.1f\", $total_kib / 1024}") MiB in total, limit $limit_mib MiB"
if [ "$total_kib" -gt $((limit_mib * 1024)) ]; then
    echo "gpu_wheels.sh: the total exceeds $limit_mib MiB; drop packages that the machine has" >&2
    exit 1
fi
