"""Snapshots in a mount, as stock tools make, read, rename and remove them, in both planes."""

from pathlib import Path

import pytest

from tests.fuse.mounts import Mounted, hlfs, mounted, needs_fuse, run
from tests.fuse.test_semantics import again, inside, mount, plane

__all__ = ["mount", "plane"]

pytestmark = needs_fuse


def test_touch_takes_one(mount: Mounted, plane: str) -> None:
    disk, where = mount.path / "p/disk", mount.path / "p/.snapshots/disk"
    run("mkdir", mount.path / "p")
    inside(mount, 'write("p/disk", b"a" * 100_000 + b"tail")')
    run("touch", where / "one")
    inside(mount, 'write("p/disk", b"b" * 5000)')
    # It is not another one.
    for name in ("one", "latest"):
        with pytest.raises(AssertionError, match="Read-only file system"):
            run("touch", where / name)
    run("touch", where / "two")
    assert run("ls", where).split() == ["latest", "one", "two"]
    assert run("ls", "-a", mount.path / "p").split() == [".", "..", "disk"]
    assert run("ls", mount.path / "p/.snapshots").split() == ["disk"]
    assert run("readlink", where / "latest").strip() == "two"
    assert run("stat", "-c", "%F %s", where / "one").strip() == "regular file 100004"
    run("cmp", disk, where / "latest")
    run("cp", where / "one", mount.path / "p/copy")
    inside(mount, 'assert read("p/copy") == read("p/.snapshots/disk/one") == b"a" * 100_000 + b"tail"')
    run("mv", where / "one", where / "first")
    again(
        mount,
        plane,
        """
        where = "p/.snapshots/disk/"
        assert sorted(os.listdir(where)) == ["first", "latest", "two"]
        assert read(where + "first") == b"a" * 100_000 + b"tail"
        assert read(where + "latest") == b"b" * 5000
        os.unlink(where + "two")
        assert os.readlink(where + "latest") == "first"
        fails(errno.ENOENT, os.stat, where + "two")
        os.unlink(where + "first")
        assert os.listdir(where) == []
        fails(errno.ENOENT, os.readlink, where + "latest")
        os.unlink("p/disk")
        fails(errno.ENOENT, os.stat, where)
        """,
    )


def test_retained_checkpoints_in_a_mount(tmp_path: Path, plane: str) -> None:
    """One comes every second of what is written without end, and outlives the server."""
    options = [f"dataplane={plane}", "retain=60s"]
    with mounted(tmp_path / "store", options, clean_end=False) as mount:
        inside(
            mount,
            """
            import json
            with open("disk", "wb", buffering=0) as file:
                written, listed = {}, []
                begin = time.monotonic()
                # Each takes as long as the disk needs to have it durable.
                while len(listed) < 3:
                    number = len(written)
                    os.pwrite(file.fileno(), b"%08d" % number, 0)
                    written[time.time_ns()] = number
                    time.sleep(0.01)
                    if number % 10 == 0:
                        listed = json.loads(os.getxattr(".snapshots/disk", "user.hlfs.checkpoints.0"))["checkpoints"]
                    assert time.monotonic() - begin < 50, listed
            assert len(listed) <= time.monotonic() - begin + 2, listed
            for name, checkpoint in enumerate(listed):
                order = {"name": f"s{name}", "at_ns": checkpoint["time_ns"]}
                os.setxattr(".snapshots/disk", "user.hlfs.promote", json.dumps(order).encode())
                found = read(f".snapshots/disk/s{name}")
                # All that was acknowledged before, and nothing that was begun after.
                before = [n for time_ns, n in written.items() if time_ns <= checkpoint["time_ns"]]
                assert (int(found) if found else -1) - max(before, default=-1) in (0, 1), (found, before[-1:])
            """,
        )
        mount.kill()
    with mounted(tmp_path / "store", options) as mount:
        inside(
            mount,
            """
            names = sorted(name for name in os.listdir(".snapshots/disk") if name != "latest")
            found = [int(read(f".snapshots/disk/{name}") or b"-1") for name in names]
            assert len(found) >= 3 and found == sorted(found) and len(set(found)) == len(found), found
            """,
        )


def test_it_is_read_and_nothing_else(mount: Mounted) -> None:
    inside(
        mount,
        """
        write("disk", bytes(range(256)) * 4096)
        where = ".snapshots/disk/"
        os.mknod(where + "one", 0o644)
        fails(errno.EEXIST, os.mknod, where + "one", 0o644)
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDWR | os.O_TRUNC):
            fails(errno.EROFS, os.open, where + "one", flags)
        fails(errno.EROFS, os.truncate, where + "one", 5)
        fails(errno.EROFS, os.open, where + "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        fails(errno.EROFS, os.open, where + "new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        fails(errno.EROFS, os.mkdir, where + "new")
        fails(errno.EROFS, os.mkdir, ".snapshots/new")
        fails(errno.EROFS, os.rmdir, ".snapshots/disk")
        fails(errno.EROFS, os.mknod, ".snapshots/new", 0o644)
        fails(errno.EPERM, os.symlink, "one", where + "new")
        fails(errno.EPERM, os.link, where + "one", where + "new")
        fails(errno.EPERM, os.rename, where + "one", "new")
        fails(errno.EROFS, os.rename, "disk", where + "new")
        fails(errno.EEXIST, os.mkdir, ".snapshots")
        for name in ("a%b", "a@b", "a\\nb"):
            fails(errno.EINVAL, os.mknod, where + name, 0o644)
        fails(errno.ENAMETOOLONG, os.mknod, where + "x" * 256, 0o644)
        os.mknod(where + "x" * 255, 0o644)
        fd = os.open(where + "one", os.O_RDONLY)
        assert os.pread(fd, 300, 256) == (bytes(range(256)) * 2)[:300]
        assert os.pread(fd, 10, (1 << 20) - 4) == bytes(range(252, 256))
        fails(errno.EBUSY, os.unlink, where + "one")
        write("disk", b"other")
        os.close(fd)
        os.unlink(where + "one")
        """,
    )


def test_owner_mode_and_labels(mount: Mounted) -> None:
    inside(
        mount,
        """
        write("disk", b"data")
        os.chmod("disk", 0o660)
        os.chown("disk", 5, 6)
        where = ".snapshots/disk/"
        os.mknod(where + "one", 0o644)
        found = os.stat(where + "one")
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o440, 5, 6)
        os.chown(where + "one", 7, 8)
        os.chmod(where + "one", 0o600)
        os.setxattr(where + "one", "trusted.libvirt.security.ref_dac", b"1")
        assert os.getxattr(where + "one", "trusted.libvirt.security.ref_dac") == b"1"
        assert os.listxattr(where + "one") == ["trusted.libvirt.security.ref_dac"]
        found = os.stat(where + "one")
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o600, 7, 8)
        fd = os.open(where + "one", os.O_RDONLY)
        found = os.fstat(fd)
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid, found.st_size) == (0o600, 7, 8, 4)
        os.fchmod(fd, 0o640)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
        assert os.stat(where + "one").st_mode == os.fstat(fd).st_mode
        assert os.stat("disk").st_uid == 5
        """,
    )


def test_holes_and_pages_of_a_snapshot(tmp_path: Path) -> None:
    with mounted(tmp_path / "store") as mount:
        inside(
            mount,
            """
            fd = os.open("disk", os.O_RDWR | os.O_CREAT)
            os.ftruncate(fd, 1 << 30)
            os.pwrite(fd, b"x" * 8192, 1 << 20)
            os.mknod(".snapshots/disk/one", 0o644)
            os.pwrite(fd, b"y" * 8192, 0)
            fallocate(fd, 3, 1 << 20, 8192)
            one = os.open(".snapshots/disk/one", os.O_RDONLY)
            assert os.lseek(one, 0, os.SEEK_DATA) == 1 << 20
            assert os.lseek(one, 1 << 20, os.SEEK_HOLE) == (1 << 20) + 8192
            fails(errno.ENXIO, os.lseek, one, (1 << 20) + 8192, os.SEEK_DATA)
            assert os.fstat(one).st_size == 1 << 30
            assert os.fstat(one).st_blocks * 512 == 8192
            with mmap.mmap(one, 2 << 20, prot=mmap.PROT_READ) as mapped:
                assert mapped[(1 << 20) - 2 : (1 << 20) + 2] == b"\\0\\0xx"
            """,
        )


def test_a_volume_with_snapshots_is_not_removed(mount: Mounted) -> None:
    inside(
        mount,
        """
        write("disk", b"data")
        write("other", b"other")
        os.mknod(".snapshots/disk/one", 0o644)
        fails(errno.EBUSY, os.unlink, "disk")
        fails(errno.EBUSY, os.rename, "other", "disk")
        os.rename("disk", "moved")
        assert read(".snapshots/moved/one") == b"data"
        fails(errno.ENOENT, os.stat, ".snapshots/disk")
        os.rename("other", "disk")
        assert os.listdir(".snapshots/disk") == []
        """,
    )
    assert "it has a snapshot; delete them first" in mount.log_text()


def test_it_is_taken_of_a_volume_that_is_written_to(tmp_path: Path) -> None:
    """Each snapshot holds all that was acknowledged before it, and nothing that was written after it."""
    with mounted(tmp_path / "store") as mount:
        inside(
            mount,
            """
            fd = os.open("disk", os.O_RDWR | os.O_CREAT)
            os.ftruncate(fd, 64 << 20)
            done = 0
            stop = False

            def write_stamps():
                global done
                number = 0
                while not stop:
                    number += 1
                    os.pwrite(fd, number.to_bytes(8, "little") * 512, number % 16384 * 4096)
                    done = number

            writer = threading.Thread(target=write_stamps)
            writer.start()
            for each in range(20):
                time.sleep(0.02)
                before = done
                os.mknod(f".snapshots/disk/{each}", 0o644)
                after = done + 1
                one = os.open(f".snapshots/disk/{each}", os.O_RDONLY)
                newest = max(int.from_bytes(os.pread(one, 8, at), "little") for at in range(0, 64 << 20, 4096))
                assert before <= newest <= after, (before, newest, after)
                for number in range(max(newest - 16383, 1), newest + 1):
                    assert os.pread(one, 8, number % 16384 * 4096) == number.to_bytes(8, "little"), number
                os.close(one)
            stop = True
            writer.join()
            """,
        )


def test_a_group_is_of_one_instant(mount: Mounted) -> None:
    """A process writes the next number to `a` and, once that is acknowledged, to `b`; then comes the one after."""
    inside(
        mount,
        """
        import json
        BLOCKS = 256
        os.mkdir("p")
        names = ("a", "b")
        # The last number that was acknowledged by each, and whether to stop.
        shared = mmap.mmap(-1, 24)

        def acknowledged():
            return [int.from_bytes(shared[at : at + 8], "little") for at in (0, 8)]

        def write_numbers():
            files = [os.open(f"p/{name}", os.O_RDWR | os.O_CREAT) for name in names]
            number = 0
            while not shared[16]:
                number += 1
                for at, fd in enumerate(files):
                    os.pwrite(fd, number.to_bytes(8, "little") * 512, number % BLOCKS * 4096)
                    shared[at * 8 : at * 8 + 8] = number.to_bytes(8, "little")

        def newest(name):
            numbers = [0] * BLOCKS
            found = read(name)
            for at in range(0, len(found), 4096):
                numbers[at // 4096] = int.from_bytes(found[at : at + 8], "little")
            last = max(numbers)
            # It holds all that came before, too.
            for number in range(max(last - BLOCKS + 1, 1), last + 1):
                assert numbers[number % BLOCKS] == number, (name, number, last)
            return last

        writer = os.fork()
        if writer == 0:
            write_numbers()
            os._exit(0)
        try:
            while acknowledged()[1] < BLOCKS:
                time.sleep(0.01)
            found = []
            for turn in range(20):
                # In both forms: of these, and of all in the pool.
                where, of = ((".snapshots", {"volumes": ["p/a", "p/b"]}), ("p/.snapshots", {}))[turn % 2]
                # It is written to all the while.
                while found and acknowledged()[0] <= found[-1]:
                    time.sleep(0.001)
                before = acknowledged()
                os.setxattr(where, "user.hlfs.snapshot", json.dumps({"name": f"s{turn}", **of}).encode())
                after = acknowledged()
                a, b = (newest(f"p/.snapshots/{name}/s{turn}") for name in names)
                assert a - b in (0, 1), (a, b)
                assert before[0] <= a <= after[0] + 1 and before[1] <= b <= after[1] + 1, (before, a, b, after)
                found.append(a)
            assert found == sorted(set(found)), found
        finally:
            shared[16] = 1
            assert os.waitpid(writer, 0)[1] == 0
        """,
    )


def test_another_users_rights(tmp_path: Path) -> None:
    """Who may write to the volume may take snapshots, who may read the snapshot reads it; nobody gets more."""
    with mounted(tmp_path / "store", ["allow_other"]) as mount:
        inside(
            mount,
            """
            os.umask(0)
            for name, mode in (("mine", 0o600), ("shared", 0o664), ("public", 0o644)):
                write(name, b"data")
                os.chmod(name, mode)
                if name == "shared":
                    os.chown(name, 0, 1234)
                os.mknod(f".snapshots/{name}/one", 0o644)
            os.setgroups([])
            os.setgid(1234)
            os.setuid(4321)
            os.mknod(".snapshots/shared/two", 0o644)
            assert read(".snapshots/shared/two") == read(".snapshots/public/one") == b"data"
            fails(errno.EACCES, os.mknod, ".snapshots/public/two", 0o644)
            fails(errno.EACCES, os.unlink, ".snapshots/public/one")
            fails(errno.EACCES, os.open, ".snapshots/mine/one", os.O_RDONLY)
            fails(errno.EACCES, os.listdir, ".snapshots/mine")
            fails(errno.EPERM, os.chmod, ".snapshots/shared/two", 0o666)
            os.unlink(".snapshots/shared/two")
            """,
        )


@pytest.mark.parametrize("end", ["unmount", "kill"])
def test_it_outlives_the_server(tmp_path: Path, end: str) -> None:
    store = tmp_path / "store"
    with mounted(store, clean_end=False) as mount:
        inside(
            mount,
            """
            write("disk", b"first" * 1000)
            os.mknod(".snapshots/disk/one", 0o644)
            write("disk", b"second")
            """,
        )
        getattr(mount, end)()
    with mounted(store) as mount:
        inside(mount, 'assert read(".snapshots/disk/one") == b"first" * 1000')
        run("rm", mount.path / ".snapshots/disk/one", mount.path / "disk")
        mount.unmount()
    assert hlfs("check", f"local://{store}").returncode == 0


def test_rollback_is_seen_at_once(mount: Mounted) -> None:
    """By path and by descriptors that are open for reading, whatever the kernel remembers."""
    inside(
        mount,
        """
        def order(snapshot):
            os.setxattr(".snapshots/disk", "user.hlfs.rollback", b'{"snapshot": "%s"}' % snapshot)

        write("disk", b"a" * 100_000)
        os.mknod(".snapshots/disk/one", 0o644)
        write("disk", b"b" * 300_000)
        os.mknod(".snapshots/disk/two", 0o644)
        assert read("disk") == b"b" * 300_000
        order(b"one")
        assert os.stat("disk").st_size == 100_000
        assert read("disk") == b"a" * 100_000
        writer = os.open("disk", os.O_WRONLY)
        fails(errno.EBUSY, order, b"two")
        os.close(writer)
        order(b"two")
        assert read("disk") == b"b" * 300_000 == read(".snapshots/disk/latest")
        """,
    )


def test_rollback_under_a_reader(tmp_path: Path) -> None:
    with mounted(tmp_path / "store") as mount:
        inside(
            mount,
            """
            write("disk", b"a" * (8 << 20))
            os.mknod(".snapshots/disk/one", 0o644)
            write("disk", b"b" * (8 << 20))
            reader = os.open("disk", os.O_RDONLY)
            assert os.pread(reader, 4096, 4 << 20) == b"b" * 4096
            os.setxattr(".snapshots/disk", "user.hlfs.rollback", b'{"snapshot": "one"}')
            assert os.pread(reader, 4096, 4 << 20) == b"a" * 4096
            assert os.fstat(reader).st_size == 8 << 20
            """,
        )
