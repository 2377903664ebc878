#!/usr/bin/env bash
# Make .venv with HLFS's dependencies, its tools, and HLFS itself in editable form. Usage: venv.sh PYTHON
set -euo pipefail

[ -x .venv/bin/python ] || "$1" -m venv .venv
export PIP_DISABLE_PIP_VERSION_CHECK=1
mapfile -t requirements < <(.venv/bin/python -c '
import tomllib
with open("pyproject.toml", "rb") as file:
    pyproject = tomllib.load(file)
project = pyproject["project"]
print(*pyproject["build-system"]["requires"], *project["dependencies"], *project["optional-dependencies"]["dev"], sep="\n")')
.venv/bin/pip install --quiet "${requirements[@]}"
# Without the native module: native.sh puts it beside the package, so that a rebuild is one incremental step.
.venv/bin/pip install --quiet --no-build-isolation --no-deps \
    --config-settings=wheel.cmake=false --config-settings=editable.mode=inplace --editable .
