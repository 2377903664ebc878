"""Servers that follow others, on the oldest kernel that is supported and on a newer one, in guests of their own."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from contrib.demo.guest import QEMU
from contrib.demo.image import GUEST_KERNEL_DIR
from contrib.demo.initramfs import MODULES, GuestKernel, build_initramfs
from tests.fuse.mounts import run
from tests.system.guests import INIT_START

ROOT = Path(__file__).parents[2]
# What a server and the client import, beside Python's own.
PACKAGES = ("attr", "attrs", "click", "idna", "msgspec", "outcome", "pyfuse3", "sniffio", "sortedcontainers", "trio")
SINGLE = ("typing_extensions.py", "_pyfuse3.py")
UNUSED = ("test", "idlelib", "lib2to3", "ensurepip", "pydoc_data", "distutils", "turtledemo", "tkinter")
TIMEOUT_S = 240

INIT = f"""{INIT_START}
mkdir /image
mount -t ext4 /dev/vda /image
cd /image
mount -t proc none proc
mount -t sysfs none sys
mount -t devtmpfs none dev
mkdir -p dev/shm
mount -t tmpfs none dev/shm
# An orphan's parent, which is to be waited for by somebody.
chroot /image /usr/bin/python3 -B -m tests.system.takeover_in_guest SEED KILLS
poweroff -f
"""


def libraries(binary: Path) -> list[Path]:
    """What the dynamic linker loads for it, itself included."""
    words = [word for line in run("ldd", binary).splitlines() for word in line.split()]
    return [Path(word) for word in words if word.startswith("/")]


def copy(source: Path, root: Path, target: Path | None = None) -> None:
    """To the same place below `root`, or another one; a link as what it leads to."""
    place = root / (target or source).relative_to("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*UNUSED, "*.a", "config-*"))
    else:
        shutil.copyfile(source, place)
        place.chmod(0o755)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file system with Python, HLFS and what they need."""
    root = tmp_path_factory.mktemp("guest") / "root"
    python = Path(os.path.realpath(sys.executable))
    site = Path(sysconfig.get_paths()["platlib"])
    modules = root / "usr/lib/python3/dist-packages"
    copy(python, root, Path("/usr/bin/python3"))
    copy(Path(sysconfig.get_paths()["stdlib"]), root)
    for name in (*PACKAGES, *SINGLE):
        if (site / name).exists():
            copy(site / name, root, Path("/usr/lib/python3/dist-packages") / name)
    for name in ("hlfsfs", "tests/crash", "tests/system"):
        shutil.copytree(
            ROOT / name, modules / name, ignore=shutil.ignore_patterns("core", "__pycache__"), dirs_exist_ok=True
        )
    (modules / "tests" / "__init__.py").touch()
    binaries = [python, *root.rglob("*.so"), *root.rglob("*.so.*")]
    for library in {library for binary in binaries for library in libraries(binary)}:
        copy(Path(os.path.realpath(library)), root, library)
    for name in ("proc", "sys", "dev", "tmp", "mnt", "srv", "run/mount", "var/log", "etc"):
        (root / name).mkdir(parents=True, exist_ok=True)
    # Compiled here, as it takes long where processors are emulated.
    run(sys.executable, "-m", "compileall", "-q", "-s", root, modules)
    path = root.parent / "image"
    run("mkfs.ext4", "-q", "-O", "^has_journal", "-d", root, path, "600M", timeout_s=120)
    shutil.rmtree(root)
    return path


@pytest.mark.parametrize("kernel", ["kernel", "kernel-6.12"])
def test_servers_follow_others(image: Path, tmp_path: Path, kernel: str) -> None:
    seed = int(os.environ.get("HLFS_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    print(f"HLFS_SEED={seed}")
    found = GuestKernel.find(GUEST_KERNEL_DIR.with_name(kernel))
    init = INIT.replace("SEED", str(seed)).replace("KILLS", os.environ.get("HLFS_KILLS", "3"))
    initramfs = tmp_path / "initramfs"
    initramfs.write_bytes(build_initramfs(found, init=init, modules=(*MODULES, "fuse")))
    words = [
        *(
            QEMU,
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "512",
            "-nic",
            "none",
            "-display",
            "none",
        ),
        *("-no-reboot", "-monitor", "none", "-serial", "stdio", "-kernel", str(found.vmlinuz)),
        *("-initrd", str(initramfs), "-append", "console=ttyS0 quiet panic=-1"),
        *("-drive", f"file={image},format=raw,if=virtio,snapshot=on"),
    ]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL
    )
    lines = [line.strip() for line in done.stdout.splitlines() if line.startswith("guest: ")]
    release = found.vmlinuz.name.removeprefix("vmlinuz-")
    assert lines[:1] == [f"guest: mounted on Linux {release}"], done.stdout + done.stderr
    assert len(lines) == 2, done.stdout
    print(lines[1])
    assert lines[1].startswith("guest: client 0, "), done.stdout
    assert int(lines[1].split()[3]) >= 2, lines[1]
