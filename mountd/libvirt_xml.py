"""The XML of the original HLFS's libvirt, which was patched, as stock libvirt takes it: pools, volumes and domains.

What a pool, volume or disk is called there by URI becomes a directory or file in a mount.
"""

import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase

from lxml import etree

from hlfsfs.errors import HlfsError, printable
from mountd.places import is_snapshot
from mountd.untrusted_xml import BadXml, collapsed, read_xml

# A domain with all its devices takes some tens of KiB.
MAX_FILE_BYTES = 4 << 20
PREFIX = "hlfs:"
VALIDATE = "virt-xml-validate"
VALIDATE_TIMEOUT_S = 60
# Machines have no read-only disks on these.
WRITABLE_BUSES = {"ide": "hd", "sata": "sd"}

PathOf = Callable[[str], str]


@dataclass(frozen=True)
class Translation:
    """XML for stock libvirt, the schema of libvirt's that it is to fit, and what its reader should know."""

    text: str
    schema: str
    remarks: tuple[str, ...]


def translate(content: bytes, file: str, path_of: PathOf) -> Translation:
    """Translates a pool, a volume or a domain.

    Args:
        content: of the file.
        file: what errors call it.
        path_of: where a mount shows what a URI names.

    Raises:
        BadXml: it is none of them, or has nothing of HLFS; or what a URI in it names is shown nowhere.
    """
    root = read_xml(content, file, MAX_FILE_BYTES)
    kinds = {"pool": (_Pool, "storagepool"), "volume": (_Volume, "storagevol"), "domain": (_Domain, "domain")}
    if root.tag not in kinds:
        raise BadXml(file, root.sourceline or 1, f"<{printable(str(root.tag))}>: neither pool, volume nor domain")
    kind, schema = kinds[str(root.tag)]
    work = kind(root, file, path_of)
    work.run()
    etree.indent(root)
    return Translation(etree.tostring(root, encoding="unicode") + "\n", schema, tuple(work.remarks))


def validate(translation: Translation) -> str:
    """What libvirt's own schema has against it; empty: nothing. Raises HlfsError where it cannot be asked."""
    with tempfile.NamedTemporaryFile("w", prefix="hlfs-", suffix=".xml", encoding="utf-8") as file:
        file.write(translation.text)
        file.flush()
        try:
            done = subprocess.run(
                [VALIDATE, file.name, translation.schema],
                capture_output=True, text=True, check=False, timeout=VALIDATE_TIMEOUT_S,
            )  # fmt: skip
        except FileNotFoundError as exc:
            raise HlfsError(f"{VALIDATE} is not installed; in Debian it is in libvirt-clients") from exc
        except subprocess.TimeoutExpired as exc:
            raise HlfsError(f"{VALIDATE} gave no answer within {VALIDATE_TIMEOUT_S} s") from exc
        said = (done.stdout + done.stderr).replace(file.name, "it").strip()
        if "xmllint" in said and "not found" in said:
            raise HlfsError(f"{VALIDATE} needs xmllint; in Debian it is in libxml2-utils")
        return "" if done.returncode == 0 else said


class _Work:
    """One translation, of `root` in place."""

    def __init__(self, root: etree._Element, file: str, path_of: PathOf) -> None:
        self.remarks: list[str] = []
        self._root = root
        self._file = file
        self._path_of = path_of

    def run(self) -> None:
        """Does it, and leaves remarks. Raises BadXml."""
        raise NotImplementedError

    def _refuse(self, element: etree._Element, why: str) -> BadXml:
        return BadXml(self._file, element.sourceline or 1, why)

    def _path(self, element: etree._Element, uri: str) -> str:
        try:
            return self._path_of(uri.removeprefix(PREFIX))
        except HlfsError as exc:
            raise self._refuse(element, str(exc)) from exc

    def _drop(self, *paths: str) -> None:
        for path in paths:
            for found in self._root.findall(path):
                parent = found.getparent()
                assert parent is not None
                parent.remove(found)

    def _text(self, path: str) -> str:
        return collapsed(self._root.findtext(path))

    def _require(self, path: str) -> etree._Element:
        found = self._root.find(path)
        if found is None or not collapsed(found.text):
            raise self._refuse(self._root, f"<{self._root.tag!s}> without <{path.replace('/', '><')}>")
        return found


class _Pool(_Work):
    def run(self) -> None:
        root = self._root
        if root.get("type") != "hlfs":
            raise self._refuse(root, f"a pool of type {root.get('type')!r} is none of HLFS; libvirt takes it as it is")
        name, source = self._require("name"), self._require("source/name")
        directory = self._path(source, collapsed(source.text))
        called = collapsed(name.text)
        name.text = called.rstrip("/").rpartition("/")[2]
        if not name.text:
            raise self._refuse(name, "<name> ends with nothing; libvirt takes no / in names")
        if name.text != called:
            self.remarks.append(f"libvirt takes no / in names: pool {called} is now called {name.text}")
        if root.find("source/host") is not None:
            self.remarks.append("the host is left out: the mount knows where its store is")
        root.set("type", "dir")
        self._drop("source", "target")
        etree.SubElement(etree.SubElement(root, "target"), "path").text = directory


class _Volume(_Work):
    def run(self) -> None:
        root = self._root
        self._require("name")
        path = root.find("target/path")
        if path is None or not collapsed(path.text).startswith(PREFIX):
            raise self._refuse(root, "a volume without <target><path>hlfs:…, so none of HLFS")
        path.text = self._path(path, collapsed(path.text))
        root.set("type", "file")
        self._drop("key", "source")
        form = root.find("target/format")
        if form is not None and form.get("type") == "unknown":
            form.set("type", "raw")
        mode = root.find("target/permissions/mode")
        if mode is not None and collapsed(mode.text).strip("0") == "":
            self.remarks.append(f"mode {collapsed(mode.text)} would let nobody open it: it is 0600 now")
            mode.text = "0600"
        if self._text("allocation").strip("0"):
            self.remarks.append("volumes are thin: the allocation is asked for and reserves nothing")


class _Domain(_Work):
    def run(self) -> None:
        disks = [disk for disk in self._root.findall("devices/disk") if self._is_ours(disk)]
        if not disks:
            raise self._refuse(self._root, "a domain without a disk of HLFS; libvirt takes it as it is")
        for disk in disks:
            self._disk(disk)

    def _is_ours(self, disk: etree._Element) -> bool:
        source = disk.find("source")
        if source is None:
            return False
        return source.get("protocol") == "hlfs" or source.get("file", "").startswith(PREFIX)

    def _disk(self, disk: etree._Element) -> None:
        source, *more = disk.findall("source")
        for each in (*more, *disk.findall("backingStore")):
            disk.remove(each)
        uri = source.get("file") or source.get("name") or ""
        path = self._path(source, uri)
        for attribute in list(source.attrib):
            del source.attrib[attribute]
        for child in list(source):
            source.remove(child)
        source.set("file", path)
        disk.set("type", "file")
        driver = disk.find("driver")
        if driver is None:
            driver = etree.Element("driver", cache="none")
            disk.insert(0, driver)
        driver.set("name", "qemu")
        driver.set("type", "raw")
        if disk.find("transient") is not None:
            # libvirt makes a file beside the source, where making one means to take a snapshot.
            disk.remove(disk.find("transient"))  # type: ignore[arg-type]
            self.remarks.append(f"{uri}: <transient/> is left out; for changes that are thrown away, clone it")
        if is_snapshot(path):
            self._read_only(disk, uri)

    def _read_only(self, disk: etree._Element, uri: str) -> None:
        if disk.find("readonly") is None:
            etree.SubElement(disk, "readonly")
        self.remarks.append(f"{uri}: a snapshot is read-only; for a machine that writes, hlfs clone it")
        target = disk.find("target")
        if target is None or target.get("dev") is None:
            raise self._refuse(disk, "<disk> without <target dev=…>")
        named = target.get("dev", "")[:2]
        bus = target.get("bus") or next((bus for bus, prefix in WRITABLE_BUSES.items() if prefix == named), "")
        if bus in WRITABLE_BUSES and disk.get("device", "disk") == "disk":
            was = target.get("dev")
            target.set("bus", "virtio")
            target.set("dev", self._free_name())
            address = disk.find("address")
            if address is not None:
                disk.remove(address)
            self.remarks.append(f"{uri}: no {bus} disk can be read-only: {was} is {target.get('dev')} on virtio now")

    def _free_name(self) -> str:
        taken = {target.get("dev") for target in self._root.findall("devices/disk/target")}
        letters = ("", *ascii_lowercase)
        names = (f"vd{first}{second}" for first in letters for second in ascii_lowercase)
        return next(name for name in names if name not in taken)
