#!/usr/bin/env bash
# Install the Debian packages of the named groups of packages.txt that are missing.
# Does nothing, and needs no privilege, when all are there.
set -euo pipefail

list="$(dirname "$0")/packages.txt"

group_packages() {
    awk -v group="[$1]" '/^\[/ { inside = ($0 == group); next } inside && NF && !/^#/' "$list"
}

installed() {
    [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "packages.sh: as root, or with sudo: apt-get install ${missing[*]}" >&2
        return 1
    fi
}

missing=()
for group in "$@"; do
    for package in $(group_packages "$group"); do
        installed "$package" || missing+=("$package")
    done
done
[ "${#missing[@]}" -gt 0 ] || exit 0

echo "Installing ${#missing[@]} Debian packages: ${missing[*]}"
as_root env DEBIAN_FRONTEND=noninteractive apt-get update --quiet=2
as_root env DEBIAN_FRONTEND=noninteractive apt-get install --quiet=2 --option=Dpkg::Use-Pty=0 \
    --yes --no-install-recommends "${missing[@]}" </dev/null
