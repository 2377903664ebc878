"""The original HLFS's XML as stock libvirt takes it, and where what it names is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from lxml import etree

from hlfsfs.cli.doctor import HostMount
from hlfsfs.errors import BadUri, HlfsError, RefusedName, UnknownScheme, UsageError
from mountd.definitions import Definition
from mountd.libvirt_xml import Translation, translate, validate
from mountd.places import NotShown, Shown, is_snapshot, path_of, shown_by
from mountd.untrusted_xml import BadXml
from tests.mountd.walkthrough import DOMAIN, POOL, SNAPSHOT_DOMAIN, VOLUME

SHOWN = [Shown("local:///tmp/testenv", "/mnt/env")]


def translated(content: str) -> Translation:
    found = translate(content.encode(), "f.xml", lambda uri: path_of(uri, SHOWN))
    assert validate(found) == ""
    return found


def root_of(found: Translation) -> etree._Element:
    return etree.fromstring(found.text)


# --- the walkthrough's ------------------------------------------------------------------------------------------


def test_its_pool() -> None:
    found = translated(POOL)
    assert found.text == (
        '<pool type="dir">\n  <name>testenv</name>\n  <target>\n    <path>/mnt/env</path>\n  </target>\n</pool>\n'
    )
    assert any("pool local:///tmp/testenv is now called testenv" in remark for remark in found.remarks)
    assert any("host" in remark for remark in found.remarks)


def test_its_volume() -> None:
    found = translated(VOLUME)
    root = root_of(found)
    assert root.get("type") == "file"
    assert root.findtext("name") == "testfs"
    assert root.findtext("capacity") == "1000000000"
    assert root.findtext("target/path") == "/mnt/env/testfs"
    assert root.find("target/format[@type='raw']") is not None
    assert [root.findtext(f"target/permissions/{what}") for what in ("mode", "owner", "group")] == ["0600", "0", "0"]
    assert root.find("key") is None
    assert any("mode 00 would let nobody open it: it is 0600 now" in remark for remark in found.remarks)
    assert any("thin" in remark for remark in found.remarks)


def test_its_domain() -> None:
    found = translated(DOMAIN)
    disk = root_of(found).find("devices/disk")
    assert disk is not None
    expected = """<disk type="file">
      <driver cache="none" name="qemu" type="raw"/>
      <source file="/mnt/env/testfs"/>
      <target dev="hda" bus="ide"/>
    </disk>"""
    assert etree.tostring(disk, encoding="unicode").split() == expected.split()
    assert found.remarks == ()


def test_its_domain_on_a_snapshot() -> None:
    found = translated(SNAPSHOT_DOMAIN)
    disk = root_of(found).find("devices/disk")
    assert disk is not None
    assert disk.find("source[@file='/mnt/env/.snapshots/testfs/snapshot1']") is not None
    assert disk.find("readonly") is not None
    # No machine has a read-only IDE disk.
    assert disk.find("target[@bus='virtio'][@dev='vda']") is not None
    assert any("no ide disk can be read-only: hda is vda on virtio now" in remark for remark in found.remarks)


def test_several_disks() -> None:
    more = """<disk type='network' device='disk'><driver name='qemu' type='unknown' cache='writethrough'/>
        <source protocol='hlfs' name='local:///tmp/testenv/p/two%one'><host name='localhost' port='7000'/></source>
        <target dev='sda' bus='sata'/><transient/></disk>
      <disk type='file'><source file='hlfs:local:///tmp/testenv/three'/><target dev='vda' bus='virtio'/></disk>
      <disk type='file'><source file='/srv/other.img'/><target dev='vdb' bus='virtio'/></disk></devices>"""
    found = translated(DOMAIN.replace("</devices>", more))
    disks = root_of(found).findall("devices/disk")
    sources = [disk.find("source") for disk in disks]
    assert [dict(source.attrib) for source in sources if source is not None] == [
        {"file": "/mnt/env/testfs"},
        {"file": "/mnt/env/p/.snapshots/two/one"},
        {"file": "/mnt/env/three"},
        {"file": "/srv/other.img"},
    ]
    assert "transient" not in found.text
    assert "host" not in found.text
    target, driver = disks[1].find("target"), disks[1].find("driver")
    assert target is not None
    assert driver is not None
    assert dict(target.attrib) == {"dev": "vdc", "bus": "virtio"}
    assert dict(driver.attrib) == {"name": "qemu", "type": "raw", "cache": "writethrough"}
    assert any("<transient/> is left out" in remark for remark in found.remarks)
    assert disks[3].find("driver") is None


def test_nothing_else_comes_along() -> None:
    more = """<disk type='network' device='cdrom'><source protocol='hlfs' name='local:///tmp/testenv/iso%one'/>
      <source file='/etc/shadow'/>
      <backingStore type='file'><format type='raw'/><source file='/etc/passwd'/></backingStore>
      <target dev='hdc' bus='ide'/></disk></devices>"""
    found = translated(DOMAIN.replace("</devices>", more))
    assert "/etc/" not in found.text
    disk = root_of(found).findall("devices/disk")[1]
    # A machine's CD-ROM is read-only wherever it is.
    assert disk.find("target[@dev='hdc'][@bus='ide']") is not None


# --- what is none ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POOL.replace("hlfs", "dir"), "f.xml:1: a pool of type 'dir' is none of HLFS"),
        (POOL.replace("<name>local:///tmp/testenv</name>\n\t<s", "<s"), "f.xml:1: <pool> without <name>"),
        (POOL.replace("local:///tmp/testenv", "local:///tmp/testenv/.."), "f.xml:4: local:///tmp/testenv/..: '..' has"),
        (POOL.replace("local:///tmp/testenv", "hdfs:///tmp/testenv"), "f.xml:4: hdfs:///tmp/testenv: unknown kind"),
        (POOL.replace("local:///tmp/testenv", "local:///srv/x"), "f.xml:4: local:///srv/x: it is mounted nowhere"),
        (VOLUME.replace("hlfs:local", "local"), "f.xml:1: a volume without <target><path>hlfs:"),
        (DOMAIN.replace('"hlfs"', '"nbd"'), "f.xml:1: a domain without a disk of HLFS"),
        (DOMAIN.replace("/testfs", "/.hlfs/store.json"), "f.xml:9: '.hlfs': holds the store's own files"),
        (DOMAIN.replace("/testfs", "/../../etc/shadow"), "f.xml:9: "),
        ("<network/>", "f.xml:1: <network>: neither pool, volume nor domain"),
        ("<pool", "f.xml:1: no XML: "),
        ('<!DOCTYPE pool [<!ENTITY e SYSTEM "file:///etc/passwd">]><pool>&e;</pool>', "f.xml:1: a document type"),
        (SNAPSHOT_DOMAIN.replace("<target dev='hda' bus='ide'/>", ""), "f.xml:8: <disk> without <target dev="),
    ],
)
def test_errors_name_the_line(content: str, said: str) -> None:
    with pytest.raises(BadXml) as error:
        translate(content.encode(), "f.xml", lambda uri: path_of(uri, SHOWN))
    assert str(error.value).startswith(said), str(error.value)
    assert "\n" not in str(error.value)


def test_libvirts_schema_is_asked() -> None:
    assert "fails to validate" in validate(Translation("<pool type='dir'><name>x</name></pool>", "storagepool", ()))


def test_a_host_without_libvirt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HlfsError, match="virt-xml-validate is not installed; in Debian it is in libvirt-clients"):
        validate(Translation("<pool/>", "storagepool", ()))


# --- places -----------------------------------------------------------------------------------------------------------


def test_where_things_are(tmp_path: Path) -> None:
    (tmp_path / "odd%name").touch()
    shown = [
        Shown("local:///srv", "/mnt/srv"),
        Shown("local:///srv/vms/lab", "/mnt/lab"),
        Shown("local:///srv/vms", str(tmp_path)),
    ]
    for uri, path in (
        ("local:///srv", "/mnt/srv"),
        ("local:///srv/x/y", "/mnt/srv/x/y"),
        ("local:///srv/vms/v", f"{tmp_path}/v"),
        ("local:///srv//vms/./lab/v%s", "/mnt/lab/.snapshots/v/s"),
        ("local:///srv/vmsx", "/mnt/srv/vmsx"),
        # A volume of just that name comes first.
        ("local:///srv/vms/odd%name", f"{tmp_path}/odd%name"),
        ("local:///srv/vms/odd%name%s", f"{tmp_path}/.snapshots/odd%name/s"),
    ):
        assert path_of(uri, shown) == path
        assert is_snapshot(path) == uri.endswith("%s")
    for uri, error in (
        ("local:///home/v", NotShown),
        ("local:///srv/../etc", BadUri),
        ("local:///srv/.hlfs/x", RefusedName),
        ("nfs:///srv", UnknownScheme),
        ("local:///srv/%s", UsageError),
        ("local:///srv/v%", UsageError),
        ("local:///srv/..%other", RefusedName),
        ("local:///srv/v%..", RefusedName),
        ("local:///srv/.hlfs%x", RefusedName),
        ("local:///srv/a%.hlfs", RefusedName),
        ("local:///srv/.snapshots%x", RefusedName),
    ):
        with pytest.raises(error):
            path_of(uri, shown)
    assert path_of("local:///x/y", [Shown("local:///", "/mnt/all")]) == "/mnt/all/x/y"


def test_a_mount_counts_more_than_a_definition() -> None:
    live = HostMount("/live", "fuse.hlfs", "local:///srv", frozenset({"rw", "user_id=0"}))
    other = HostMount("/other", "ext4", "/dev/sda1", frozenset())
    # Anybody can claim to show anything.
    evil = HostMount("/home/eve/evil", "fuse.hlfs", "local:///srv/v", frozenset({"user_id=1000"}))
    junk = HostMount("/home/eve/junk", "fuse.hlfs", "junk", frozenset({"user_id=0"}))
    defined = [Definition("a", "local:///srv/", "/defined"), Definition("b", "local:///more", "/more")]
    shown = shown_by([evil, junk, other, live], defined)
    assert path_of("local:///srv/v", shown) == "/live/v"
    assert path_of("local:///more/v", shown) == "/more/v"
