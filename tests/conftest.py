"""What every test stands on: reproducible random search, and no mount left behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# A slow shared machine must not turn a found example into a time-out; failures print how to run them again.
hypothesis.settings.register_profile(
    "hlfs",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
# For `make hunt`, by --hypothesis-profile.
hypothesis.settings.register_profile("hunt", hypothesis.settings.get_profile("hlfs"), max_examples=2000)
hypothesis.settings.load_profile("hlfs")


def hlfs_mountpoints() -> set[str]:
    """Mountpoints of HLFS in this mount namespace, as the kernel escapes them."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {fields[1] for fields in map(str.split, lines) if fields[2] == "fuse.hlfs"}


@pytest.fixture(scope="session", autouse=True)
def no_mount_is_left() -> Iterator[None]:
    """Fail the session when tests leave an HLFS mount behind."""
    before = hlfs_mountpoints()
    yield
    left = hlfs_mountpoints() - before
    assert not left, f"tests left HLFS mounted at {sorted(left)}"
