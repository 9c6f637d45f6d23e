#!/usr/bin/env bash
# Checks and times kvfold's GPU ops on a bare machine with Python, PyTorch and Triton; installs nothing. About six minutes.
# Usage: benchmarks/gpu.sh [FOLDER]; results as JSON lines in FOLDER (default benchmarks/results), a short table at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:-benchmarks/results}")
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET KVFOLD_BACKEND

"$python" - <<'END'
import torch, triton
assert torch.cuda.is_available(), "this script needs a CUDA device"
properties = torch.cuda.get_device_properties(0)
print(f"{properties.name}, {properties.multi_processor_count} multiprocessors, torch {torch.__version__}, triton {triton.__version__}")
END

echo "== laws of the ops on this GPU, then real shapes and graphs"
workers=$("$python" -c 'import importlib.util as u, os; print(f"-n {min(os.cpu_count(), 15)}" if u.find_spec("xdist") else "")')
timeout 200 "$python" -m pytest -q -p no:cacheprovider $workers tests/ops -k gpu --deselect tests/ops/test_gpu.py::test_every_kernel_compiles_for_an_h100 \
	|| checks=failed

echo "== decode attention of one layer, 32 query and 8 KV heads of dim 128, 8 stages of 256"
timeout 150 "$python" -m kvfold bench attend --device cuda --rope post,pre,center --contexts 1024,4096,32768 --record "$out" \
	| tee "$out/gpu-attend.txt"
timeout 60 "$python" -m kvfold bench attend --device cuda --rope post,pre --contexts 131072 --batches 1,16 --repeats 5 --record "$out" \
	| tee -a "$out/gpu-attend.txt"

echo "== encoding, and what it adds to a prompt's pass"
timeout 70 "$python" -m kvfold bench encode --device cuda --beams 1,4 --repeats 5 --record "$out" | tee "$out/gpu-encode.txt"

echo
echo "== in short (checks: ${checks:-passed})"
grep -h -E "context|^ *32768" "$out/gpu-attend.txt" || true
cat "$out/gpu-encode.txt"
[ -z "${checks:-}" ]
