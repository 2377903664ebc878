#!/usr/bin/env bash
# Give a volume a partition table and a file system, put a file there and read it back, without mounting anything here.
# Whatever VOLUME holds is lost. Usage: fill.sh VOLUME FILE
#
#     truncate -s 10G /mnt/hlfs/vms/data
#     contrib/guestfish/fill.sh /mnt/hlfs/vms/data backup.tar
#
# From Debian's package guestfish. Where /boot has no kernel, SUPERMIN_KERNEL and SUPERMIN_MODULES name one, as in
# supermin(1).
set -euo pipefail

if [ "$#" != 2 ]; then
    echo "usage: fill.sh VOLUME FILE" >&2
    exit 2
fi
volume=$1 file=$2 name=${2##*/}

# QEMU runs as you then, not as a user of libvirt's who may not open the volume.
export LIBGUESTFS_BACKEND="${LIBGUESTFS_BACKEND:-direct}"

# What it closes is durable. With discard, mkfs gives back the space of what was there before.
guestfish add-drive "$volume" format:raw discard:enable : run : \
    part-disk /dev/sda gpt : mkfs ext4 /dev/sda1 : \
    mount /dev/sda1 / : upload "$file" "/$name" : umount / : \
    mount-ro /dev/sda1 / : download "/$name" /dev/stdout | cmp - "$file"
echo "$volume: /$name is on /dev/sda1"
