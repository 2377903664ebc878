#!/usr/bin/env bash
# Look into a snapshot: its file systems; a directory in one of them (PATH ends with a slash); or a file, which goes to
# the standard output. Usage: look.sh SNAPSHOT [DEVICE PATH]
#
#     contrib/guestfish/look.sh /mnt/hlfs/vms/.snapshots/data/monday
#     contrib/guestfish/look.sh /mnt/hlfs/vms/.snapshots/data/monday /dev/sda1 /etc/
#     contrib/guestfish/look.sh /mnt/hlfs/vms/.snapshots/data/monday /dev/sda1 /etc/fstab >fstab
#
# A file system that a guest was using has a journal to replay: guestfish does it in an overlay that it throws away, and
# snapshots cannot change. So this is also how to look at a volume that a machine runs on: `touch` a snapshot first.
set -euo pipefail

if [ "$#" != 1 ] && [ "$#" != 3 ]; then
    echo "usage: look.sh SNAPSHOT [DEVICE PATH]" >&2
    exit 2
fi
snapshot=$1

# QEMU runs as you then, not as a user of libvirt's who may not open the snapshot.
export LIBGUESTFS_BACKEND="${LIBGUESTFS_BACKEND:-direct}"

case ${3:-} in
"") guestfish --ro --format=raw -a "$snapshot" run : list-filesystems ;;
*/) guestfish --ro --format=raw -a "$snapshot" -m "$2" ll "$3" ;;
*) guestfish --ro --format=raw -a "$snapshot" -m "$2" download "$3" /dev/stdout ;;
esac
