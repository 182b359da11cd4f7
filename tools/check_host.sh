#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Says what is missing before anything is started, and how to install it. Argument: the Python to use.
set -u
python=${1:-python3}
missing=0

want() { # want <what> <how to install it>
    echo "missing: $1" >&2
    echo "    on Debian or Ubuntu: apt install $2" >&2
    missing=1
}

if ! command -v "$python" >/dev/null 2>&1; then
    want "Python 3.10 or newer ($python was not found; name another with PYTHON=...)" "python3 python3-venv"
elif ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    want "Python 3.10 or newer ($python is $("$python" -V 2>&1); name another with PYTHON=...)" "python3 python3-venv"
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || want "Python's venv module" python3-venv
    "$python" - <<'PY' || want "Python's C headers (Python.h)" python3-dev
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))
PY
fi

compiler=${CXX:-c++}
if ! command -v "$compiler" >/dev/null 2>&1; then
    want "a C++ compiler ($compiler was not found; name another with CXX=...)" g++
elif ! echo '#include <omp.h>
int main() { return omp_get_max_threads() < 1; }' | "$compiler" -std=c++17 -fopenmp -x c++ - -o /dev/null 2>/dev/null; then
    want "a C++17 compiler with OpenMP ($compiler cannot build a small program that uses it)" g++
fi

exit $missing
