"""URIs and sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlfsfs.errors import BadSize, BadUri, UnknownScheme
from hlfsfs.store import parse_size, parse_uri


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("local:///srv/hlfs", b"/srv/hlfs"),
        ("local:///", b"/"),
        ("local:////srv//./a%20b/", b"/srv/a%20b"),
        ("local:///a?b#c", b"/a?b#c"),
        ("local:///\udcff", b"/\xff"),
    ],
)
def test_path_is_taken_as_it_stands(text: str, path: bytes) -> None:
    assert parse_uri(text).path == path
    assert parse_uri(str(parse_uri(text))) == parse_uri(text)


@pytest.mark.parametrize("text", ["", "/srv/hlfs", "srv", "hdfs2:///x", "LOCAL:///x", "local:/srv"])
def test_unknown_scheme(text: str) -> None:
    with pytest.raises(UnknownScheme, match="local://"):
        parse_uri(text)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [("local://srv/hlfs", "local:///srv/hlfs"), ("local:///a/../b", r"\.\."), ("local:///a\0", "NUL")],
)
def test_bad_uri(text: str, remedy: str) -> None:
    with pytest.raises(BadUri, match=remedy):
        parse_uri(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("1k", 1024),
        ("512M", 512 << 20),
        ("10G", 10 << 30),
        ("10GiB", 10 << 30),
        (" 2t ", 2 << 40),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "10GB", "10X", "1 G", "iB", "5iB", "٣", "1e3"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(BadSize):
        parse_size(text)


@given(st.integers(0, 1 << 60))
def test_bytes_are_read_as_written(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes
