"""Sizes, times and values as people read them."""

import pytest

from hlfsfs.cli.output import format_size, format_time, format_value


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (10 << 30, "10 GiB"),
        (1023 << 20, "1023 MiB"),
        (16 << 40, "16 TiB"),
        (3 << 60, "3072 PiB"),
    ],
)
def test_sizes(size_bytes: int, shown: str) -> None:
    assert format_size(size_bytes) == shown


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("live_bytes", 2048, "2 KiB"),
        ("dirty", True, "yes"),
        ("last_checkpoint_ns", 0, "never"),
        ("segments", 3, "3"),
        ("live_bytes", None, "none"),
    ],
)
def test_values_by_their_unit(key: str, value: object, shown: str) -> None:
    assert format_value(key, value) == shown


def test_times_tell_their_zone() -> None:
    assert format_time(1_700_000_000_123_456_789)[:8] == "2023-11-"
    assert format_time(1_700_000_000_000_000_000)[-6] in "+-"
