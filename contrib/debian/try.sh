#!/usr/bin/env bash
# Try the Debian package: build it, install it into a clean Debian 12, and replace it by a newer one under a mount that
# is written to all the time. As root, with mmdebstrap. Usage: try.sh DIR
set -euo pipefail

here=$(realpath "$(dirname "$0")")
target=$(realpath -m "$1")
mkdir -p "$target"
root=$(mktemp --directory /var/tmp/hlfs-chroot-XXXXXX)
trap 'umount --recursive --lazy "$root/proc" "$root/sys" "$root/dev" 2>/dev/null || true; rm -rf --one-file-system "$root"' EXIT

first=$("$here/build.sh" "$target" | tail -n 1)
# The same, but that it is newer.
rm -rf "$target/newer"
dpkg-deb --raw-extract "$first" "$target/newer"
sed -i 's/^Version: .*/&+newer/' "$target/newer/DEBIAN/control"
second=$target/newer.deb
dpkg-deb --root-owner-group --build "$target/newer" "$second" >/dev/null

sources=(/etc/apt/sources.list.d/*.sources)
[ -e "${sources[0]}" ] || sources=(/etc/apt/sources.list)
mmdebstrap --quiet --variant=apt --customize-hook="copy-in $first $second /" \
    --customize-hook="chroot \"\$1\" env DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends /$(basename "$first")" \
    bookworm "$root" "${sources[@]}" >"$target/chroot.log" 2>&1 || { tail -n 30 "$target/chroot.log" >&2; exit 1; }
echo "installed into a clean Debian 12"

mount --bind /proc "$root/proc"
mount --bind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount --make-rslave "$root/dev"
cat >"$root/try" <<'END'
set -eu
hlfs --version
test -e /usr/share/man/man1/hlfs-mount.1.gz
test -x /sbin/mount.hlfs
mkdir -p /srv/store
echo '<mount><name>a</name><source>local:///srv/store</source><directory>/mnt/a</directory></mount>' >/etc/hlfs/mountd.d/a.xml
hlfs-mountd run >/log 2>&1 &
daemon=$!
while ! hlfs-mountd status >/status 2>&1; do sleep 0.1; done
before=$(sed -n 's/.*served by process //p' /status)
(while ! [ -e /stop ]; do echo line || exit 1; done >/mnt/a/volume) &
writer=$!
dpkg --install /newer.deb
after=$(hlfs-mountd status | sed -n 's/.*served by process //p')
[ "$before" != "$after" ]
touch /stop
wait "$writer"
! grep -qv '^line$' /mnt/a/volume
echo "replaced under a mount in use: server $before, then $after; $(wc -l </mnt/a/volume) lines written"
hlfs-mountd stop --all
hlfs-mountd undefine a
[ ! -e /mnt/a ]
kill "$daemon"
wait "$daemon"
hlfs check local:///srv/store
apt-get --quiet=2 --yes purge hlfsfs
! [ -e /usr/bin/hlfs ]
echo "purged"
END
timeout 120 chroot "$root" sh /try
