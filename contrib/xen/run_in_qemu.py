"""Run first.cfg for real where there is no Xen: Debian's Xen, xl and QEMU in a QEMU without KVM, HLFS in their dom0.

Usage, as root after `make setup`: `.venv/bin/python -m contrib.xen.run_in_qemu`. Takes two minutes, and 75 MiB from
Debian, which stay in build/xen. The dom0 sees this host's files by 9p, and has a file system of its own for the store.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from contrib.demo.image import DATA_START_BYTES, GUEST_KERNEL_DIR, build_image
from contrib.demo.initramfs import GuestKernel, build_initramfs

CHECKOUT = Path(__file__).parents[2]
WORK = CHECKOUT / "build/xen"
# What is unpacked over this host's files for the dom0, and its kernel: the cloud kernels cannot be a dom0's.
PACKAGES = ("xen-hypervisor-4.17-amd64", "xen-utils-4.17", "xen-utils-common", "xenstore-utils", "qemu-system-xen")
KERNEL = "linux-image-amd64"
TIMEOUT_S = 600
DONE = "dom0: all is well"

DOM0_MODULES = (
    *("virtio_pci", "virtio_blk", "crc32c_generic", "ext4", "9pnet_virtio", "9p", "overlay", "fuse"),
    *("xen-privcmd", "xen-gntdev", "xen-evtchn", "xenfs"),
)
INIT_START = """#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs none /dev
mount -t proc none /proc
mount -t sysfs none /sys
exec </dev/console >/dev/console 2>&1
for module in $(cat /modules/order); do insmod /modules/$module.ko || echo "no module $module"; done
"""
DOM0_INIT = f"""{INIT_START}
mkdir /host /packages /memory /dom0
for tag in host packages; do mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=262144,cache=loose $tag /$tag; done
mount -t tmpfs none /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/packages:/host,upperdir=/memory/upper,workdir=/memory/work overlay /dom0
cd /dom0
mount -t proc none proc
mount -t sysfs none sys
mount -t devtmpfs none dev
mkdir -p dev/shm dev/pts
mount -t devpts none dev/pts
for directory in run tmp dev/shm; do mount -t tmpfs none $directory; done
mount -t xenfs none proc/xen
mount -t ext4 /dev/vda srv
chroot . /bin/bash {WORK}/dom0.sh || echo "dom0: failed"
sync
poweroff -f
"""
# Its guest says what it found, and ends.
DOM0_SCRIPT = f"""set -euo pipefail
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
cd {CHECKOUT}
hlfs() {{ .venv/bin/python -m hlfsfs.cli.main "$@"; }}
mkdir -p /run/xen /run/xenstored /run/lock /var/lib/xen /var/lib/xenstored /var/log/xen/console /mnt/hlfs /srv/store
xenstored --pid-file /run/xenstored.pid
/usr/lib/xen-4.17/bin/xen-init-dom0
xenconsoled --log=guest --pid-file=/run/xenconsoled.pid
xl info | grep -E 'xen_version|release'

hlfs mount local:///srv/store /mnt/hlfs
volume=/mnt/hlfs/vms/first snapshot=/mnt/hlfs/vms/.snapshots/first/monday log=/var/log/xen/console/guest-first.log
mkdir /mnt/hlfs/vms
cp {WORK}/image $volume
touch $snapshot
sum=$(md5sum <$snapshot)
xl create {WORK}/first.cfg
for try in $(seq 200); do xl list | grep -q '^first ' || break; sleep 1; done
cat $log /var/log/xen/qemu-dm-first.log

letter=$(debugfs -R "cat /letter.txt" "$volume?offset={DATA_START_BYTES}")
grep "wrote $letter" $log
grep "second disk ${{sum%% *}}, refuses writes" $log
grep "bytes trimmed" $log
[ "$(md5sum <$snapshot)" = "$sum" ]
e2fsck -fn "$volume?offset={DATA_START_BYTES}"
hlfs umount /mnt/hlfs
hlfs check local:///srv/store | cat
echo "{DONE}"
"""
GUEST_INIT = f"""{INIT_START}
say() {{ echo "guest: $*"; }}
for try in $(seq 100); do [ -b /dev/xvdb ] && break; sleep 0.1; done
say "Linux $(uname -r) under $(cat /sys/hypervisor/type), xvda is $(cat /sys/block/xvda/queue/write_cache)"
mkdir /data
mount -t ext4 /dev/xvda2 /data && . /data/guest.sh && fstrim -v /data && umount /data
set -- $(md5sum </dev/xvdb)
dd if=/dev/zero of=/dev/xvdb bs=512 count=1 conv=fsync 2>/dev/null || say "second disk $1, refuses writes"
poweroff -f
"""
# In place of what first.cfg says of the guest itself.
GUEST_SETTINGS = {
    "kernel": f"{WORK}/guest-vmlinuz",
    "ramdisk": f"{WORK}/guest-initramfs",
    "extra": "console=hvc0 quiet panic=-1",
    "memory": 192,
    "vcpus": 1,
}


def main() -> int:
    """Returns 0 when everything was as it should be."""
    if not (WORK / "root/boot").exists():
        fetch()
    prepare()
    said: list[str] = []
    with subprocess.Popen(
        command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as qemu:
        alarm = threading.Timer(TIMEOUT_S, qemu.kill)
        alarm.start()
        assert qemu.stdout is not None
        # Consoles end some lines twice.
        for line in filter(None, map(str.rstrip, qemu.stdout)):
            said.append(line)
            print(line, flush=True)
        alarm.cancel()
    return 0 if DONE in said else 1


def fetch() -> None:
    """Downloads and unpacks what this host does not have to have."""
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    depends = subprocess.run(["apt-cache", "depends", KERNEL], check=True, capture_output=True, text=True).stdout
    found = re.search(r"Depends: (\S+)", depends)
    assert found is not None, depends
    for packages, target in ((PACKAGES, "root"), ((found[1],), "kernel")):
        apt = ["apt-get", "-o", "APT::Sandbox::User=root", "--quiet=2", "download", *packages]
        subprocess.run(apt, check=True, cwd=WORK)
        for package in WORK.glob("*.deb"):
            subprocess.run(["dpkg-deb", "--extract", package, WORK / target], check=True)
            package.unlink()


def prepare() -> None:
    """Makes what the dom0 and its guest boot, and their disks."""
    dom0, guest = GuestKernel.find(WORK / "kernel"), GuestKernel.find(GUEST_KERNEL_DIR)
    shutil.copy(dom0.vmlinuz, WORK / "dom0-vmlinuz")
    shutil.copy(guest.vmlinuz, WORK / "guest-vmlinuz")
    hypervisor = next((WORK / "root/boot").glob("xen-*.gz"))
    (WORK / "hypervisor").write_bytes(subprocess.run(["zcat", hypervisor], check=True, capture_output=True).stdout)
    (WORK / "dom0-initramfs").write_bytes(build_initramfs(dom0, init=DOM0_INIT, modules=DOM0_MODULES))
    (WORK / "guest-initramfs").write_bytes(
        build_initramfs(guest, init=GUEST_INIT, modules=("xen-blkfront", "crc32c_generic", "ext4"))
    )
    (WORK / "dom0.sh").write_text(DOM0_SCRIPT)
    config = Path(__file__).with_name("first.cfg").read_text()
    for name, value in GUEST_SETTINGS.items():
        config = re.sub(rf"^{name} = .*", f"{name} = {value!r}", config, count=1, flags=re.MULTILINE)
    (WORK / "first.cfg").write_text(config)
    build_image(WORK / "image")
    subprocess.run(["truncate", "--size=0", WORK / "store.img"], check=True)
    subprocess.run(["truncate", "--size=1G", WORK / "store.img"], check=True)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", WORK / "store.img"], check=True)


def command() -> list[str]:
    """QEMU's. With SMAP on, it refuses the IRETs that a kernel does outside of ring 0, as under Xen."""
    machine = ["-accel", "tcg", "-cpu", "max,-smap,-smep", "-m", "3072", "-nic", "none", "-display", "none"]
    xen = "console=com1 com1=115200,8n1 dom0_mem=1400M,max:1400M loglvl=error guest_loglvl=error noreboot"
    shares = [f"local,path={path},mount_tag={tag},security_model=passthrough,readonly=on,multidevs=remap"
              for tag, path in (("host", Path("/")), ("packages", WORK / "root"))]  # fmt: skip
    return [
        *("qemu-system-x86_64", *machine, "-no-reboot", "-serial", "stdio", "-monitor", "none"),
        *("-kernel", f"{WORK}/hypervisor", "-append", xen),
        *("-initrd", f"{WORK}/dom0-vmlinuz console=hvc0 quiet panic=-1,{WORK}/dom0-initramfs"),
        *("-drive", f"file={WORK}/store.img,format=raw,if=virtio"),
        *("-virtfs", shares[0], "-virtfs", shares[1]),
    ]


if __name__ == "__main__":
    sys.exit(main())
