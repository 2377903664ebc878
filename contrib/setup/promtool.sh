#!/usr/bin/env bash
# Unpack Prometheus' promtool into FILE from Debian's package, which installed would start a server.
# Usage: promtool.sh FILE
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fetch() {
    (cd "$work" && apt-get -o APT::Sandbox::User=root --quiet=2 download prometheus)
}

echo "Fetching promtool from Debian"
if ! fetch; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get --quiet=2 update
    fetch
fi
dpkg-deb --fsys-tarfile "$work"/prometheus_*.deb | tar --extract --to-stdout ./usr/bin/promtool >"$1.part"
chmod +x "$1.part"
mv "$1.part" "$1"
