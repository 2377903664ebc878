"""What files and directories of a mount do, in both planes: the same, less what pyfuse3 lacks.

Everything that touches the mount runs in a child process (`Mounted.python`), with `path` the mount's root.
"""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, mounted, needs_fuse

pytestmark = needs_fuse

PRELUDE = """
import ctypes, errno, fcntl, mmap, os, stat, sys, threading, time
path = sys.argv[1]
os.chdir(path)

def fails(number, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except OSError as exc:
        assert exc.errno == number, (errno.errorcode[exc.errno], errno.errorcode[number], function, args)
    else:
        raise AssertionError(f"{function.__name__}{args} did not fail")

def write(name, data):
    with open(name, "wb") as file:
        file.write(data)

def read(name):
    with open(name, "rb") as file:
        return file.read()

libc = ctypes.CDLL(None, use_errno=True)

def fallocate(fd, mode, offset, length):
    if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")
"""


@pytest.fixture(params=["on", "off"])
def plane(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def mount(tmp_path: Path, plane: str) -> Iterator[Mounted]:
    with mounted(tmp_path / "store", [f"dataplane={plane}"]) as mount:
        yield mount


def inside(mount: Mounted, code: str) -> str:
    """Runs code in the mount, in a process of its own."""
    return mount.python(PRELUDE + textwrap.dedent(code))


def again(mount: Mounted, plane: str, code: str) -> None:
    """Runs code after an unmount and a fresh mount."""
    if mount.server.poll() is None:
        mount.unmount()
    with mounted(mount.store, [f"dataplane={plane}"]) as fresh:
        inside(fresh, code)


def test_volumes_come_and_go(mount: Mounted, plane: str) -> None:
    inside(
        mount,
        """
        os.mkdir("pool")
        fd = os.open("pool/disk", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640)
        assert os.fstat(fd).st_size == 0
        os.close(fd)
        fails(errno.EEXIST, os.open, "pool/disk", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        status = os.stat("pool/disk")
        assert stat.S_ISREG(status.st_mode) and status.st_mode & 0o777 == 0o640 and status.st_nlink == 1
        write("pool/disk", b"x" * 5000)
        assert os.stat("pool/disk").st_size == 5000
        os.rename("pool/disk", "disk2")
        fails(errno.ENOENT, os.stat, "pool/disk")
        assert os.stat("disk2").st_ino == status.st_ino
        assert read("disk2") == b"x" * 5000
        os.rmdir("pool")
        os.mknod("node", 0o600 | stat.S_IFREG)
        assert os.stat("node").st_size == 0
        os.unlink("node")
        fails(errno.ENOENT, os.unlink, "node")
        """,
    )
    again(mount, plane, 'assert read("disk2") == b"x" * 5000; assert os.listdir() == ["disk2"]')


def test_what_is_not_done_says_so(mount: Mounted) -> None:
    inside(
        mount,
        """
        write("disk", b"x")
        os.mkdir("pool")
        fails(errno.EPERM, os.symlink, "disk", "link")
        fails(errno.EPERM, os.link, "disk", "link")
        fails(errno.EPERM, os.mkfifo, "fifo")
        fails(errno.EPERM, os.mknod, "device", 0o600 | stat.S_IFBLK, os.makedev(7, 0))
        fails(errno.EPERM, os.chmod, "disk", 0o4755)
        fails(errno.EINVAL, os.mkdir, ".hlfs")
        fails(errno.ENAMETOOLONG, os.mkdir, "n" * 256)
        os.mkdir("n" * 255)
        fails(errno.ENOTDIR, os.rmdir, "disk")
        fails(errno.EISDIR, os.unlink, "pool")
        fails(errno.ENOTDIR, os.listdir, "disk")
        fails(errno.EFBIG, os.truncate, "disk", (16 << 40) + 1)
        fails(errno.ENODATA, os.getxattr, "disk", "security.capability")
        os.mkdir("pool/inner")
        fails(errno.ENOTEMPTY, os.rmdir, "pool")
        fails(errno.ENOTEMPTY, os.rename, "n" * 255, "pool")
        fails(errno.EISDIR, os.rename, "disk", "pool")
        fails(errno.ENOTDIR, os.rename, "pool", "disk")
        fails(errno.EINVAL, os.rename, "pool", "pool/inner/deep")
        fd = os.open("disk", os.O_RDWR)
        fails(errno.ENOTTY, fcntl.ioctl, fd, 0x5401, bytes(64))
        fails(errno.EOPNOTSUPP, fcntl.ioctl, fd, 0x40049409, os.open("disk", os.O_RDONLY))
        """,
    )


def test_any_name_is_a_name(mount: Mounted, plane: str) -> None:
    names = r"""[
        b"win%20.iso", b"a@b", b"x%snap", b" x", b"tab\there", b"new\nline", b"back\\slash", b"\xff\xfe", b"\xc3\xa9",
        b"-rf", b"n" * 255, b"..."]"""
    inside(mount, f"[os.mkdir(n) if i % 3 == 0 else write(n, n) for i, n in enumerate({names})]")
    again(
        mount,
        plane,
        f"""
        assert sorted(os.listdir(b".")) == sorted({names})
        assert all(os.path.isdir(n) if i % 3 == 0 else read(n) == n for i, n in enumerate({names}))
        """,
    )


def test_sizes_change_both_ways(mount: Mounted, plane: str) -> None:
    inside(
        mount,
        """
        write("disk", b"A" * 10000)
        os.truncate("disk", 100)
        os.truncate("disk", 9000)
        assert read("disk") == b"A" * 100 + bytes(8900)
        os.truncate("disk", 1 << 40)
        assert os.stat("disk").st_size == 1 << 40
        with open("disk", "r+b") as file:
            file.seek((1 << 40) - 3)
            file.write(b"end")
            file.seek(0, 2)
            file.write(b"more")
        assert os.stat("disk").st_size == (1 << 40) + 4
        assert os.stat("disk").st_blocks * 512 < 8 << 20
        fd = os.open("disk", os.O_RDWR | os.O_TRUNC)
        assert os.fstat(fd).st_size == 0
        os.close(fd)
        write("small", b"123")
        with open("small", "ab") as file:
            file.write(b"456")
        """,
    )
    again(mount, plane, 'assert os.stat("disk").st_size == 0; assert read("small") == b"123456"')


def test_unaligned_and_odd_sizes(mount: Mounted, plane: str) -> None:
    inside(
        mount,
        """
        import random
        random.seed(7)
        model = bytearray(300000)
        write("disk", model)
        direct = os.open("disk", os.O_RDWR | os.O_DIRECT)
        plain = os.open("disk", os.O_RDWR)
        for i in range(300):
            at, size = random.randrange(len(model)), random.choice([1, 7, 511, 512, 4095, 4096, 4097, 70001])
            data = random.randbytes(size)
            model[at:at + size] = data
            assert os.pwrite(random.choice([direct, plain]), data, at) == size
            at, size = random.randrange(len(model)), random.choice([1, 512, 4096, 99999])
            assert os.pread(random.choice([direct, plain]), size, at) == model[at:at + size]
        write("model", model)
        """,
    )
    again(mount, plane, 'assert read("disk") == read("model")')


def test_deleted_while_open(mount: Mounted, plane: str) -> None:
    inside(
        mount,
        """
        write("disk", b"still here")
        fd = os.open("disk", os.O_RDWR)
        os.unlink("disk")
        fails(errno.ENOENT, os.stat, "disk")
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 100, 0) == b"still here"
        os.pwrite(fd, b"more", 6)
        write("disk", b"another")
        assert os.pread(fd, 100, 0) == b"still more"
        os.close(fd)
        write("victim", b"victim")
        fd = os.open("victim", os.O_RDONLY)
        os.rename("disk", "victim")
        assert os.pread(fd, 100, 0) == b"victim"
        assert read("victim") == b"another"
        """,
    )
    again(mount, plane, 'assert os.listdir() == ["victim"]; assert read("victim") == b"another"')
    assert len(list((mount.store / ".hlfs" / "volumes").iterdir())) == 1
    assert len(list((mount.store / ".hlfs" / "logs").iterdir())) == 1


def test_renames_across_pools_and_exchanges(mount: Mounted, plane: str) -> None:
    inside(
        mount,
        """
        os.makedirs("a/b/c")
        os.mkdir("d")
        write("a/b/one", b"1")
        write("d/two", b"2")
        def renameat2(old, new, flags):
            if libc.renameat2(-100, old, -100, new, flags) != 0:
                raise OSError(ctypes.get_errno(), "renameat2")
        fails(errno.EEXIST, renameat2, b"a/b/one", b"d/two", 1)
        renameat2(b"a/b/one", b"d/two", 2)
        assert read("a/b/one") == b"2" and read("d/two") == b"1"
        fails(errno.ENOENT, renameat2, b"a/b/one", b"d/none", 2)
        renameat2(b"a/b/one", b"d/three", 1)
        os.rename("a/b", "d/b")
        """,
    )
    again(
        mount,
        plane,
        """
        assert sorted(os.listdir("d")) == ["b", "three", "two"] and os.listdir("d/b") == ["c"] and os.listdir("a") == []
        assert read("d/two") == b"1" and read("d/three") == b"2"
        """,
    )


def test_owner_mode_times_and_attributes_stay(mount: Mounted, plane: str) -> None:
    inside(
        mount,
        """
        write("disk", b"x")
        os.mkdir("pool", 0o750)
        os.chmod("disk", 0o604)
        os.chown("disk", 107, 64055)
        os.chown("pool", 1000, -1)
        os.utime("disk", ns=(5_000_000_001, 1_234_567_890_123_456_789))
        os.utime("pool", ns=(5_000_000_001, 987_654_321_123_456_789))
        assert os.stat("disk").st_mtime_ns == 1_234_567_890_123_456_789
        write("epoch", b"x")
        os.utime("epoch", ns=(0, 0))
        assert os.stat("epoch").st_mtime_ns == 0
        for name in ("disk", "pool"):
            os.setxattr(name, "user.note", b"\\x00binary\\xff")
            os.setxattr(name, "trusted.libvirt.security.dac", b"+0:+0")
            fails(errno.EEXIST, os.setxattr, name, "user.note", b"", os.XATTR_CREATE)
            fails(errno.ENODATA, os.setxattr, name, "user.none", b"", os.XATTR_REPLACE)
            fails(errno.ENODATA, os.getxattr, name, "user.none")
            fails(errno.ENODATA, os.removexattr, name, "user.none")
        os.removexattr("pool", "user.note")
        before = os.stat("disk")
        time.sleep(0.01)
        write("disk", b"y")
        after = os.stat("disk")
        assert after.st_mtime_ns > before.st_mtime_ns and after.st_ctime_ns > before.st_ctime_ns
        os.utime("disk", ns=(5_000_000_001, 1_234_567_890_123_456_789))
        """,
    )
    again(
        mount,
        plane,
        """
        assert os.stat("epoch").st_mtime_ns == 0
        disk, pool = os.stat("disk"), os.stat("pool")
        assert (disk.st_mode, disk.st_uid, disk.st_gid) == (stat.S_IFREG | 0o604, 107, 64055)
        assert (pool.st_mode, pool.st_uid, pool.st_gid) == (stat.S_IFDIR | 0o750, 1000, 0)
        assert disk.st_mtime_ns == 1_234_567_890_123_456_789
        assert pool.st_mtime_ns == 987_654_321_123_456_789
        assert os.getxattr("disk", "user.note") == b"\\x00binary\\xff"
        assert sorted(os.listxattr("disk")) == ["trusted.libvirt.security.dac", "user.note"]
        assert os.listxattr("pool") == ["trusted.libvirt.security.dac"]
        """,
    )


def test_many_names_are_all_listed_once(mount: Mounted) -> None:
    inside(
        mount,
        """
        os.mkdir("pool")
        names = [f"volume-{i:04}-" + "x" * (i % 200) for i in range(500)]
        for name in names:
            os.close(os.open("pool/" + name, os.O_CREAT | os.O_WRONLY))
        assert sorted(os.listdir("pool")) == sorted(names)
        seen = []
        with os.scandir("pool") as entries:
            for i, entry in enumerate(entries):
                assert entry.is_file() and entry.inode() == os.stat(entry.path).st_ino
                seen.append(entry.name)
                if i % 7 == 0:
                    os.unlink("pool/" + entry.name)
        assert sorted(seen) == sorted(names)
        """,
    )


def test_statfs_is_the_stores(mount: Mounted) -> None:
    inside(
        mount,
        f"""
        here, below = os.statvfs("."), os.statvfs({str(mount.store)!r})
        assert here.f_blocks * here.f_frsize == below.f_blocks * below.f_frsize
        assert here.f_namemax == 255 and here.f_bavail > 0 and here.f_files > 0
        """,
    )


def test_locks_keep_two_writers_apart(mount: Mounted) -> None:
    inside(
        mount,
        """
        write("disk", b"x")
        one, two = os.open("disk", os.O_RDWR), os.open("disk", os.O_RDWR)
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fails(errno.EWOULDBLOCK, fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        """,
    )


def test_a_cached_reader_sees_what_a_writer_wrote(mount: Mounted) -> None:
    inside(
        mount,
        """
        write("disk", b"a" * 100000)
        reader = os.open("disk", os.O_RDONLY)
        assert os.pread(reader, 100000, 0) == b"a" * 100000
        for flags in (0, os.O_DIRECT):
            writer = os.open("disk", os.O_RDWR | flags)
            for i in range(50):
                data = bytes([i]) * 4096
                os.pwrite(writer, data, 8192)
                assert os.pread(reader, 4096, 8192) == data
            os.close(writer)
        os.truncate("disk", 10)
        assert os.pread(reader, 100, 0) == b"a" * 10
        mapped = mmap.mmap(reader, 10, mmap.MAP_PRIVATE, mmap.PROT_READ)
        assert mapped[:] == b"a" * 10
        """,
    )


def test_concurrent_writers_of_one_block(mount: Mounted) -> None:
    """Each 512 bytes belong to one thread: partial writes of a block must not undo each other."""
    inside(
        mount,
        """
        write("disk", bytes(8192))
        def writer(index):
            fd = os.open("disk", os.O_RDWR)
            for i in range(200):
                data = bytes([index + 1, i]) * 256
                os.pwrite(fd, data, index * 512)
                assert os.pread(fd, 512, index * 512) == data
        threads = [threading.Thread(target=writer, args=[index]) for index in range(16)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert read("disk") == b"".join(bytes([index + 1, 199]) * 256 for index in range(16))
        """,
    )


def test_closing_makes_data_durable(mount: Mounted) -> None:
    """FLUSH at close: what was closed survives even a server that dies at once."""
    inside(mount, 'write("disk", b"closed" * 1000)')
    mount.kill()
    again(mount, "on", 'assert read("disk") == b"closed" * 1000')


def test_cold_volumes_used_all_at_once(mount: Mounted) -> None:
    inside(mount, "[write(f'v{i}', bytes([i]) * 9999) for i in range(40)]")
    again(
        mount,
        "on",
        """
        def check(i):
            results.append(read(f"v{i % 40}") == bytes([i % 40]) * 9999)
        results = []
        threads = [threading.Thread(target=check, args=[i]) for i in range(120)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert results == [True] * 120
        """,
    )


class TestNativeOnly:
    """What pyfuse3 has no handler for."""

    @pytest.fixture
    def plane(self) -> str:
        return "on"

    def test_holes_are_told_and_made(self, mount: Mounted, plane: str) -> None:
        inside(
            mount,
            """
            KEEP, PUNCH, ZERO = 1, 2, 16
            fd = os.open("disk", os.O_RDWR | os.O_CREAT)
            os.truncate(fd, 1 << 20)
            os.pwrite(fd, b"x" * 65536, 131072)
            assert os.lseek(fd, 0, os.SEEK_DATA) == 131072
            assert os.lseek(fd, 131072, os.SEEK_HOLE) == 196608
            fails(errno.ENXIO, os.lseek, fd, 196608, os.SEEK_DATA)
            before = os.fstat(fd)
            fallocate(fd, PUNCH | KEEP, 131072, 32768)
            after = os.fstat(fd)
            assert after.st_blocks < before.st_blocks and after.st_mtime_ns > before.st_mtime_ns
            assert os.lseek(fd, 0, os.SEEK_DATA) == 163840
            assert os.pread(fd, 65536, 131072) == bytes(32768) + b"x" * 32768
            fallocate(fd, ZERO | KEEP, 163840, 100)
            assert os.pread(fd, 200, 163840) == bytes(100) + b"x" * 100
            fallocate(fd, 0, 1 << 20, 4096)
            assert os.fstat(fd).st_size == (1 << 20) + 4096
            fallocate(fd, KEEP, 2 << 20, 4096)
            assert os.fstat(fd).st_size == (1 << 20) + 4096
            fails(errno.EOPNOTSUPP, fallocate, fd, 8, 0, 4096)
            fallocate(fd, KEEP, 0, 4096)
            """,
        )
        again(mount, plane, 'assert read("disk")[131072:196608] == bytes(32868) + b"x" * 32668')

    def test_a_copy_inside_the_mount(self, mount: Mounted) -> None:
        """As cp asks for it, and the kernel where there is no native plane; twice, as the kernel may remember."""
        for _ in range(2):
            mount.run("cp", sys.executable, mount.path / "one")
            mount.run("cp", mount.path / "one", mount.path / "two")
            mount.run("cmp", sys.executable, mount.path / "two")

    def test_shared_mappings_of_a_writable_volume(self, mount: Mounted) -> None:
        inside(
            mount,
            """
            write("disk", bytes(65536))
            fd = os.open("disk", os.O_RDWR)
            mapped = mmap.mmap(fd, 65536)
            mapped[1000:1005] = b"hello"
            mapped.flush()
            assert os.pread(fd, 5, 1000) == b"hello"
            os.pwrite(fd, b"HELLO", 1000)
            """,
        )
