#!/usr/bin/env bash
# Build hlfsfs._core incrementally and put it beside the package. Usage: native.sh JOBS
set -euo pipefail

python="$PWD/.venv/bin/python"
if [ ! -f build/native/build.ninja ]; then
    cmake -S . -B build/native -G Ninja --log-level=WARNING -DPython_EXECUTABLE="$python" >/dev/null
fi
cmake --build build/native --parallel "$1" -- --quiet | sed "/^ninja: no work to do/d"
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
built=build/native/_core$suffix installed=hlfsfs/_core$suffix
if ! cmp --silent "$built" "$installed"; then
    # By rename: whoever has the old module loaded keeps it, and no one sees half of the new one.
    cp "$built" "build/_core.new"
    mv "build/_core.new" "$installed"
fi
