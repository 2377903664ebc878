"""Volumes as the files that cp, dd, mv, du, stat and their like take them for, in both planes."""

from __future__ import annotations

from pathlib import Path

import pytest

from hlfsfs.store import open_store
from tests.fuse.mounts import Mounted, mounted, needs_fuse
from tests.system.tools import KIB, MIB, random_file, sh, wait_for

pytestmark = needs_fuse

# Map, summaries and the last step of a segment's growth, which are nobody's data.
OVERHEAD_BYTES = 8 * MIB


def allocated_bytes(store: Path) -> int:
    """What the store's own files take on the host."""
    return int(sh(store, "du -s --block-size=1 . | cut -f1"))


def test_copies_are_equal_now_and_after_a_remount(tmp_path: Path, plane: str) -> None:
    source = random_file(tmp_path / "source", 1, 3 * MIB + 1234)
    with mounted(tmp_path / "store", [f"dataplane={plane}"]) as mount:
        sh(
            mount.path,
            """
            mkdir pool
            cp "$1" pool/cp
            cat "$1" >pool/cat
            dd if="$1" of=pool/dd bs=64k conv=fsync status=none
            dd if="$1" of=pool/small bs=1000 status=none
            dd if="$1" of=pool/direct bs=1M oflag=direct iflag=fullblock status=none
            dd if="$1" of=pool/synced bs=100k oflag=dsync status=none
            head -c 1M "$1" >pool/appended
            tail -c +1048577 "$1" >>pool/appended
            cp pool/cp pool/copy-within
            dd if=pool/dd of=pool/direct-within bs=1M iflag=direct status=none
            for copy in pool/*; do cmp "$1" "$copy"; done
            """,
            source,
        )
    with mounted(tmp_path / "store", [f"dataplane={plane}"]) as mount:
        script = 'for copy in pool/*; do cmp "$1" "$copy"; done; ls pool | wc -l'
        assert sh(mount.path, script, source) == "9\n"


def test_dd_changes_only_what_it_writes(pool: Path, tmp_path: Path) -> None:
    script = """
        cp "$1" volume
        for at in 0 1 511 512 4095 4096 70000 999999; do
            printf 'changed here' | dd of=volume bs=1 seek=$at conv=notrunc status=none
        done
        """
    source = random_file(tmp_path / "source", 2, 1_000_003)
    sh(tmp_path, script, source)
    sh(pool, script + 'cmp volume "$2"; stat -c %s volume', source, tmp_path / "volume")


def test_truncate_grows_with_zeros_and_forgets_what_it_cuts(pool: Path, tmp_path: Path) -> None:
    script = """
        cp "$1" volume
        truncate -s 5000 volume
        truncate -s 300000 volume
        dd if="$1" of=volume bs=1 seek=300001 count=10 conv=notrunc status=none
        truncate -s -3 volume
        """
    source = random_file(tmp_path / "source", 3, 200_000)
    sh(tmp_path, script, source)
    sh(pool, script + 'cmp volume "$2"', source, tmp_path / "volume")
    assert sh(pool, "stat -c %s volume") == "300008\n"


def test_a_sparse_copy_takes_no_more_than_its_data(pool: Path, tmp_path: Path) -> None:
    random_file(tmp_path / "piece", 4, MIB)
    sh(
        pool,
        """
        truncate -s 16M sparse
        dd if="$1" of=sparse bs=1M seek=10 conv=notrunc status=none
        cp sparse copy
        cp --sparse=always sparse always
        cp --sparse=never sparse never
        for copy in copy always never; do cmp sparse $copy; done
        """,
        tmp_path / "piece",
    )
    for name in ("sparse", "copy", "always", "never"):
        assert sh(pool, f"du --apparent-size --block-size=1 {name} | cut -f1") == f"{16 * MIB}\n"
        # Zeros take nothing, whoever writes them.
        assert MIB <= int(sh(pool, f"du --block-size=1 {name} | cut -f1")) <= MIB + OVERHEAD_BYTES, name


def test_du_of_what_is_written_and_freed(pool: Path, tmp_path: Path) -> None:
    source = random_file(tmp_path / "source", 5, 16 * MIB)
    assert int(sh(pool, 'cp "$1" volume; du --block-size=1 volume | cut -f1', source)) >= 16 * MIB
    assert int(sh(pool, "du --block-size=1 volume | cut -f1")) <= 16 * MIB + OVERHEAD_BYTES
    assert int(sh(pool, "truncate -s 4M volume; du --block-size=1 volume | cut -f1")) <= 4 * MIB + OVERHEAD_BYTES
    assert sh(pool, ": >volume; du volume | cut -f1") == "0\n"


def test_punched_and_zeroed_ranges_read_as_zeros_and_are_freed(native: Mounted, tmp_path: Path) -> None:
    script = """
        cp "$1" volume
        fallocate --punch-hole --offset 1M --length 4M volume
        fallocate --punch-hole --offset 100 --length 9000 volume
        fallocate --zero-range --offset 6000001 --length 1500000 volume
        fallocate --zero-range --offset 8000000 --length 1M volume
        """
    source = random_file(tmp_path / "source", 6, 8 * MIB)
    sh(tmp_path, script, source)
    before = int(sh(native.path, 'cp "$1" volume; stat -c %b volume', source))
    sh(native.path, script + 'cmp volume "$2"', source, tmp_path / "volume")
    assert sh(native.path, "stat -c %s volume") == "9048576\n"
    after = int(sh(native.path, "stat -c %b volume"))
    assert (before - after) * 512 >= 5 * MIB
    native.unmount()
    with mounted(native.store) as mount:
        sh(mount.path, 'cmp volume "$1"', tmp_path / "volume")
        assert int(sh(mount.path, "stat -c %b volume")) == after


def test_digging_holes_finds_the_zeros(native: Mounted, tmp_path: Path) -> None:
    random_file(tmp_path / "piece", 7, 100 * KIB)
    out = sh(
        native.path,
        """
        truncate -s 4M volume
        dd if="$1" of=volume bs=4k seek=256 conv=notrunc status=none
        cp volume before
        fallocate --dig-holes volume
        cmp volume before
        stat -c %b volume
        """,
        tmp_path / "piece",
    )
    assert int(out) * 512 <= 100 * KIB + OVERHEAD_BYTES


def test_fallocate_makes_a_thin_volume(native: Mounted) -> None:
    script = "fallocate --length 1G volume; fallocate --keep-size --length 2G volume; stat -c '%s %b' volume"
    size_bytes, blocks = sh(native.path, script).split()
    assert int(size_bytes) == 1 << 30
    assert int(blocks) == 0


def test_without_the_native_plane_punching_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path / "store", ["dataplane=off"]) as mount:
        sh(mount.path, "truncate -s 1M volume; sync volume")
        with pytest.raises(AssertionError, match="unsupported"):
            sh(mount.path, "fallocate --punch-hole --length 4096 volume")
        sh(mount.path, "echo x >volume; sync volume; sync --data volume")


def test_what_stat_and_ls_show(pool: Path, tmp_path: Path) -> None:
    random_file(tmp_path / "source", 8, 10_000)
    out = sh(
        pool,
        """
        mkdir -p a/b/c
        install -m 640 "$1" a/b/volume
        truncate -s 1T a/huge
        stat -c '%n %F %s %h %a %o' a a/huge a/b/volume
        ls -a a
        ls -laR --time-style=full-iso . | grep -c '^[d-]'
        find . -type f -size +1G
        """,
        tmp_path / "source",
    )
    assert out.splitlines() == [
        "a directory 0 3 755 4096",
        "a/huge regular file 1099511627776 1 644 4096",
        "a/b/volume regular file 10000 1 640 4096",
        ".",
        "..",
        "b",
        "huge",
        "13",
        "./a/huge",
    ]


def test_asking_for_the_birth_time_harms_nothing(pool: Path) -> None:
    # GNU stat without a format and ls --time=birth ask statx(2) for it.
    out = sh(
        pool,
        """
        echo data >volume
        stat volume >/dev/null
        stat -c %w volume
        ls -l --time=birth volume
        echo more >>volume
        sync volume
        stat -c %s volume
        """,
    )
    lines = out.splitlines()
    assert lines[0] == "-"
    assert lines[-1] == "10"


def test_times_and_owner_outlive_the_mount(tmp_path: Path, plane: str) -> None:
    source = random_file(tmp_path / "source", 9, 100_000)
    sh(tmp_path, 'touch -d "2001-02-03 04:05:06.123456789 UTC" source; chown 1234:5678 source; chmod 604 source')
    show = "stat -c '%n %.9Y %.9X %u %g %a %s' copy moved touched; stat -c '%n %.9Y %u %g %a' pool"
    with mounted(tmp_path / "store", [f"dataplane={plane}"]) as mount:
        shown = sh(
            mount.path,
            f"""
            cp -p "$1" copy
            cp -p "$1" first
            mv first moved
            echo x >touched
            touch -m -d "1999-01-01 00:00:00.000000001 UTC" touched
            mkdir -m 2750 pool
            chown 1:2 pool touched
            touch -d "2020-01-01 UTC" pool
            {show}
            """,
            source,
        )
    assert shown.splitlines()[0] == "copy 981173106.123456789 981173106.123456789 1234 5678 604 100000"
    assert shown.splitlines()[2].startswith("touched 915148800.000000001 915148800.000000001 1 2 644 ")
    with mounted(tmp_path / "store", [f"dataplane={plane}"]) as mount:
        assert sh(mount.path, show) == shown


def test_writing_moves_the_times(pool: Path) -> None:
    out = sh(
        pool,
        """
        echo x >volume
        touch -d "2001-01-01 UTC" volume
        stat -c '%.Y' volume
        echo y >>volume
        stat -c '%.Y %.Z' volume
        touch -d "2001-01-01 UTC" volume
        truncate -s 100 volume
        stat -c '%.Y' volume
        """,
    )
    old, written, resized = out.splitlines()
    assert old == "978307200.000000000"
    assert all(float(word) > 1.7e9 for word in [*written.split(), resized])


def test_mv_over_a_volume_and_across_pools(tmp_path: Path, plane: str) -> None:
    random_file(tmp_path / "one", 10, 300_000)
    random_file(tmp_path / "two", 11, 200_000)
    with mounted(tmp_path / "store", [f"dataplane={plane}"]) as mount:
        sh(
            mount.path,
            """
            mkdir -p p/q/r s
            cp "$1"/one p/one; cp "$1"/two p/two
            mv p/one p/two
            cmp p/two "$1"/one
            cp "$1"/two p/q/r/deep
            mv p/q/r/deep s/
            mv s/deep p/q/other
            mv -T p/q s/moved-pool
            mv s/moved-pool/other s/moved-pool/r/deep
            refused mv -T p s
            mv -n p/two s/moved-pool/r/deep
            """,
            tmp_path,
        )
        assert sh(mount.path, "find . | sort").split() == [
            *(".", "./p", "./p/two", "./s", "./s/moved-pool", "./s/moved-pool/r", "./s/moved-pool/r/deep"),
        ]
    with mounted(tmp_path / "store", [f"dataplane={plane}"]) as mount:
        sh(mount.path, 'cmp p/two "$1"/one; cmp s/moved-pool/r/deep "$1"/two', tmp_path)


def test_a_replaced_volume_gives_its_space_back(shared: Mounted, pool: Path, tmp_path: Path) -> None:
    random_file(tmp_path / "big", 12, 64 * MIB)
    sh(pool, 'cp "$1"/big victim; sync victim; echo small >winner', tmp_path)
    full = allocated_bytes(shared.store)
    sh(pool, "mv winner victim; cat victim")
    # Some files are kept to be used again.
    wait_for(lambda: allocated_bytes(shared.store) < full - 32 * MIB, "the victim's log is freed")


def test_rename_over_an_open_volume_then_power_goes(tmp_path: Path, plane: str) -> None:
    options = [f"dataplane={plane}"]
    with mounted(tmp_path / "store", options, clean_end=False) as mount:
        sh(
            mount.path,
            """
            echo old >volume; echo new >other; sync volume other
            exec 3<>volume
            mv other volume
            echo 'still usable' >&3
            cat /proc/self/fd/3
            cat volume
            kill -9 $1
            """,
            str(mount.server.pid),
        )
        mount.kill()
    with mounted(tmp_path / "store", options) as mount:
        assert sh(mount.path, "ls; cat volume") == "volume\nnew\n"
        assert sh(mount.store, "ls .hlfs/volumes | wc -l") == "1\n"


def test_a_removed_volume_lives_until_it_is_closed(pool: Path, tmp_path: Path) -> None:
    source = random_file(tmp_path / "source", 13, 3 * MIB)
    out = sh(
        pool,
        """
        cp "$1" volume
        exec 3<>volume 4<volume
        rm volume
        ls | wc -l
        echo again >volume
        cmp "$1" /proc/self/fd/4
        dd if="$1" of=/proc/self/fd/3 bs=1M seek=3 conv=notrunc status=none
        tail -c 3145728 /proc/self/fd/4 | cmp "$1" -
        stat -L -c '%h %s' /proc/self/fd/4
        cat volume
        """,
        source,
    )
    assert out.splitlines() == ["0", f"0 {6 * MIB}", "again"]


def test_extended_attributes(tmp_path: Path, plane: str) -> None:
    with mounted(tmp_path / "store", [f"dataplane={plane}"]) as mount:
        sh(
            mount.path,
            """
            mkdir pool; : >pool/volume
            for at in pool pool/volume; do
                setfattr -n user.comment -v 'a value' $at
                setfattr -n user.binary -v 0x0001ff $at
                setfattr -n user.empty $at
                setfattr -n trusted.libvirt.security.dac -v '+0:+0' $at
                setfattr -n user.gone -v x $at
                setfattr -x user.gone $at
            done
            refused setfattr -x user.gone pool
            refused setfattr -n user.hlfs.stats -v x pool/volume
            refused setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 pool/volume
            """,
        )
    with mounted(tmp_path / "store", [f"dataplane={plane}"]) as mount:
        for name in ("pool", "pool/volume"):
            out = sh(mount.path, f"getfattr -m - -d {name}").split("\n")
            assert [line for line in sorted(out) if "=" in line and "hlfs" not in line] == [
                'trusted.libvirt.security.dac="+0:+0"',
                "user.binary=0sAAH/",
                'user.comment="a value"',
                'user.empty=""',
            ]
        unprivileged = "setpriv --reuid=65534 --regid=65534 --clear-groups getfattr -m - -d pool/volume"
        assert "trusted" not in sh(mount.path, unprivileged)


def test_the_kernel_checks_permissions(shared: Mounted, pool: Path) -> None:
    nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    # What is above the mountpoint is the test runner's own: paths are taken from the working directory.
    out = sh(
        pool,
        f"""
        echo secret >closed; chmod 600 closed
        echo public >open; chmod 644 open
        echo theirs >theirs; chown 65534 theirs
        mkdir sticky; chmod 1777 sticky; echo x >sticky/roots
        {nobody} cat open
        {nobody} sh -c 'echo more >>theirs; echo mine >sticky/mine'
        {nobody} chmod 600 theirs
        {nobody} mkdir sticky/pool
        refused {nobody} cat closed
        refused {nobody} sh -c 'echo x >>open'
        refused {nobody} chown 0 theirs
        refused {nobody} chmod 777 open
        refused {nobody} rm -f open
        refused {nobody} rm -f sticky/roots
        refused {nobody} mv sticky/roots sticky/mine
        stat -c '%u %g %a %s' theirs sticky/mine sticky/pool
        """,
    )
    assert out.splitlines() == ["public", "65534 0 600 12", "65534 65534 644 5", "65534 65534 755 0"]


def test_df_is_the_stores(shared: Mounted, pool: Path) -> None:
    show = "df --block-size=1 --output=source,fstype,size,target . | tail -1"
    source, fstype, size, target = sh(pool, show).split()
    assert (source, fstype, target) == (shared.source, "fuse.hlfs", str(shared.path))
    store = open_store(shared.source, read_only=True)
    try:
        assert int(size) == store.statfs().total_bytes
    finally:
        store.close()
    assert int(sh(pool, "df --block-size=1 --output=avail . | tail -1")) > 0


def test_a_tree_goes_in_and_out_by_tar(pool: Path, tmp_path: Path) -> None:
    sh(
        pool,
        """
        tar -C /usr/include -cf "$1"/tree.tar linux/usb
        tar -xf "$1"/tree.tar
        diff -r /usr/include/linux/usb linux/usb
        tar -cf - linux/usb | tar -df - -C /usr/include
        rm -r linux
        """,
        tmp_path,
    )
    assert sh(pool, "ls") == ""
