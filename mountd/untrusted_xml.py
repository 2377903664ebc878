"""XML that anybody may have written: nothing outside of it is looked at, and errors name a line."""

import re

from lxml import etree

from hlfsfs.errors import UsageError, printable


class BadXml(UsageError):
    """XML that cannot be understood."""

    def __init__(self, file: str, line: int, why: str) -> None:
        super().__init__(f"{printable(file)}:{line}: {why}")
        self.file = file
        self.line = line


def read_xml(content: bytes, file: str, max_bytes: int) -> etree._Element:
    """Its root; comments and processing instructions are left out.

    It has no document type, so no entities, and no network is used.

    Raises:
        BadXml: it is none, too large, or has a document type.
    """
    if len(content) > max_bytes:
        raise BadXml(file, 1, f"{len(content)} bytes are too many; at most {max_bytes} are read")
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True, remove_pis=True
    )
    try:
        root = etree.fromstring(content, parser)
    except etree.XMLSyntaxError as exc:
        message = re.sub(r", line \d+, column \d+.*", "", exc.msg or "").strip()
        raise BadXml(file, exc.lineno or 1, f"no XML: {printable(message)}") from exc
    if root.getroottree().docinfo.internalDTD is not None:
        raise BadXml(file, 1, "a document type is not read; leave <!DOCTYPE …> out")
    return root


def collapsed(text: str | None) -> str:
    """Without white space around, and with one space for each within; white space is what XML calls so."""
    return " ".join(part for part in re.split("[ \t\r\n]+", text or "") if part)
