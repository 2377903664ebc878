"""Mount options."""

import pytest

from hlfsfs.errors import BadOption, UnknownOption
from hlfsfs.fuse.options import MS_NOEXEC, MountOptions, parse_options, split_words


def test_defaults() -> None:
    assert parse_options([]) == MountOptions()


def test_every_option_is_read() -> None:
    words = (
        "ro,allow_other,default_permissions,uid=107,gid=64055,mode=0660,dataplane=off,threads=5,map_cache=32M,"
        "read_cache=1G,ring=256M,commit=500ms,retain=2h,segment_size=16M,discard_ring"
    )
    assert parse_options([words]) == MountOptions(
        read_only=True,
        allow_other=True,
        uid=107,
        gid=64055,
        mode=0o660,
        dataplane=False,
        threads=5,
        map_cache_bytes=32 << 20,
        read_cache_bytes=1 << 30,
        ring_bytes=256 << 20,
        segment_bytes=16 << 20,
        commit_s=0.5,
        retain_s=7200,
        discard_ring=True,
    )


def test_words_of_fstab_are_ignored() -> None:
    words = "defaults,rw,nofail,_netdev,noatime,relatime,user,auto,x-systemd.requires=/srv,X-mount.mkdir,comment=x,,"
    assert parse_options([words]) == MountOptions(kept=("_netdev", "user", "x-systemd.requires=/srv", "comment=x"))


def test_the_last_of_several_counts() -> None:
    assert parse_options(["ro,threads=3", "rw,threads=8"]) == MountOptions(threads=8)


def test_what_the_kernel_gets() -> None:
    options = parse_options(['noexec,context="system_u:object_r:virt_image_t:s0:c1,c2",ro'])
    assert options.flags == MS_NOEXEC
    assert options.selinux == ("context=system_u:object_r:virt_image_t:s0:c1,c2",)
    assert options.read_only


@pytest.mark.parametrize("word", ["treads=4", "mapcache=1G", "fd=3", "max_read=1", "ro=1", "user_id=0"])
def test_an_unknown_option_is_named(word: str) -> None:
    with pytest.raises(UnknownOption, match=f"'{word}'"):
        parse_options([f"nofail,{word}"])


@pytest.mark.parametrize(
    ("word", "why"),
    [
        ("threads=2", "from 3 to 64"),
        ("threads=four", "number"),
        ("threads", "needs a value"),
        ("uid=-1", "number"),
        ("mode=888", "octal"),
        ("mode=7777", "from 0 to 777"),
        ("dataplane=maybe", "'on' or 'off'"),
        ("ring=big", "size"),
        ("ring=1M", "from 16M"),
        ("segment_size=5M", "power of two"),
        ("commit=0", "time"),
        ("commit=2h", "time"),
        ("retain=5", "such as 90s"),
        ("retain=1.5h", "such as 90s"),
        ("retain=400d", "a year"),
        ("remount", "unmount it"),
    ],
)
def test_a_bad_value_is_named(word: str, why: str) -> None:
    with pytest.raises(BadOption, match=why) as caught:
        parse_options([word])
    assert repr(word) in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("word", "retain_s"), [("0", 0), ("0s", 0), ("90s", 90), ("30m", 1800), ("1w", 604800)])
def test_times_to_retain(word: str, retain_s: float) -> None:
    assert parse_options([f"retain={word}"]) == MountOptions(retain_s=retain_s)


def test_words_are_split_outside_quotes() -> None:
    assert split_words('a,b="c,d",,e="f') == ["a", "b=c,d", "e=f"]
