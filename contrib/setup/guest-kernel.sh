#!/usr/bin/env bash
# Unpack Debian's cloud kernels for guests into DIR/kernel, Debian 12's own, and DIR/kernel-6.12, without installing
# them. Usage: guest-kernel.sh DIR
set -euo pipefail

mkdir -p "$1"
cd "$1"

kernel_package() {
    apt-cache depends "$1" 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }'
}

download() {
    local package
    package=$(kernel_package "$1")
    [ -n "$package" ] && apt-get -o APT::Sandbox::User=root --quiet=2 download "$package"
}

unpack() {
    rm -rf ./*.deb "$2" && download "$1" && dpkg-deb --extract linux-image-*.deb "$2" && rm -f ./*.deb
}

unpack_all() {
    unpack linux-image-cloud-amd64 kernel && unpack linux-image-6.12-cloud-amd64 kernel-6.12
}

echo "Fetching the test guests' kernels from Debian"
if ! unpack_all; then
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get --quiet=2 update
    unpack_all
fi
