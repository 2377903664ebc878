#!/usr/bin/env bash
# Unpack Debian's cloud kernel for guests into DIR, without installing it. Usage: guest-kernel.sh DIR
set -euo pipefail

mkdir -p "$1"
cd "$1"

kernel_package() {
    apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }'
}

download() {
    local package
    package=$(kernel_package)
    [ -n "$package" ] && apt-get -o APT::Sandbox::User=root --quiet=2 download "$package"
}

rm -rf ./*.deb kernel
echo "Fetching the test guest's kernel from Debian"
if ! download; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get --quiet=2 update
    download
fi
dpkg-deb --extract linux-image-*.deb kernel
rm -f ./*.deb
