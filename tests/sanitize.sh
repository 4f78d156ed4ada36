#!/usr/bin/env bash
# The native library under AddressSanitizer and UndefinedBehaviorSanitizer: built anew in build/sanitize, an overrun that
# must be found, then every test of csrc/ on the CPU. Usage: tests/sanitize.sh PYTHON
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")/.."
rm -rf build/sanitize
mkdir -p build/sanitize
cp -r lct csrc tests setup.py pyproject.toml README.md constraints.txt build/sanitize
cd build/sanitize
rm -f lct/_native.*
LCT_CUDA=0 LCT_SANITIZE=1 "$python" -W ignore setup.py --quiet build_ext --inplace
# Python frees nothing at its end.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 PYTHONPATH=$PWD
preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so) $(g++ -print-file-name=libstdc++.so)"

if LD_PRELOAD=$preload "$python" - > planted.log 2>&1 << 'END'
import numpy as np
from lct.kernels import native
rows = np.zeros((64, 1, 8), np.float32)
beyond = np.lib.stride_tricks.as_strided(rows[:32], (128, 1, 8), rows.strides)
out, lse, table = np.zeros((128, 1, 8), np.float32), np.zeros((1, 128), np.float32), np.array([[0, 128, 0, 128]], np.int32)
native.library().attention_forward(beyond, beyond, beyond, table, out, lse, 1.0, "", 1)
END
then echo "sanitize: an overrun was planted and not found" >&2; exit 1; fi
grep -q "AddressSanitizer: heap-buffer-overflow" planted.log || { cat planted.log >&2; exit 1; }

LD_PRELOAD=$preload "$python" -m pytest -q -s -p no:cacheprovider -p no:xdist \
  tests/test_native_attention.py tests/test_native.py -k "not builds and not spills and not beyond and not tvm_ffi"
LD_PRELOAD=$preload "$python" -m pytest -q -s -p no:cacheprovider -p no:xdist \
  tests/test_attention.py tests/test_failure_cases.py tests/test_norm_rope.py tests/test_cache.py -k "cpu and not compile"
