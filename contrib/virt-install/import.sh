#!/usr/bin/env bash
# Define a libvirt machine whose disk is a volume, and start it: stock virt-install, with what docs/OPERATING.md says of
# cache modes and discards. Usage: import.sh NAME VOLUME [OPTION of virt-install]…
#
#     qemu-img convert -O raw debian-12.qcow2 /mnt/hlfs/vms/first
#     contrib/virt-install/import.sh first /mnt/hlfs/vms/first --memory 4096
#     contrib/virt-install/import.sh second /mnt/hlfs/vms/second \
#         --disk path=/mnt/hlfs/vms/.snapshots/first/monday,readonly=on,format=raw,bus=virtio,cache=none
#
# virt-install has libvirt define a pool for the directory of each disk that is in none, and start it at boot: mount
# before libvirt then (README, Install).
set -euo pipefail

if [ "$#" -lt 2 ]; then
    echo "usage: import.sh NAME VOLUME [OPTION of virt-install]…" >&2
    exit 2
fi
name=$1 volume=$2
shift 2

# Past the host's page cache, as HLFS has one: a guest's flush is the volume's. What guests trim is space again.
disk="path=\"$volume\",format=raw,bus=virtio,cache=none,io=native,discard=unmap"

# Debian 12's wants to know a system; this one has virtio, and a channel for the guest agent that
# `hlfs snapshot create --domain` asks.
exec virt-install --connect "${LIBVIRT_DEFAULT_URI:-qemu:///system}" --name "$name" --import --disk "$disk" \
    --osinfo detect=on,name=linux2022 --graphics none --noautoconsole "$@"
