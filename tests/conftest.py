"""What every test stands on: reproducible random search, and no mount left behind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import hypothesis
import pytest

from hlfsfs.store.ring_file import list_rings, remove_ring

# A slow shared machine must not turn a found example into a time-out; failures print how to run them again.
hypothesis.settings.register_profile(
    "hlfs",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
# For `make hunt`, by --hypothesis-profile.
hypothesis.settings.register_profile("hunt", hypothesis.settings.get_profile("hlfs"), max_examples=500)
hypothesis.settings.load_profile("hlfs")


# Files that take minutes; the longest first, so that both processes end at about the same time.
LONGEST = (
    "system/test_libvirt.py",
    "cli/test_streams.py",
    "crash/test_power_cut.py",
    "fuse/test_lineages.py",
    "system/test_full_store.py",
    "crash/test_power_cut_cases.py",
    "engine/test_model.py",
    "system/test_fio.py",
    "system/test_coreutils.py",
    "mountd/test_daemon.py",
    "system/test_takeover_kernels.py",
    "crash/test_takeover.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first."""
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def hlfs_mountpoints() -> set[str]:
    """Mountpoints of HLFS in this mount namespace, as the kernel escapes them."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return {fields[1] for fields in map(str.split, lines) if fields[2] == "fuse.hlfs"}


def remove_rings(store_record: Path) -> None:
    """Removes what is left of the rings of a store whose record this is."""
    for found in re.findall(r'"uuid": *"([0-9a-f-]{36})"', store_record.read_text(errors="replace"))[:1]:
        for ring in list_rings(UUID(found)):
            remove_ring(ring)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fail the session when its tests leave an HLFS mount behind; remove the rings of stores they killed for good."""
    base = tmp_path_factory.getbasetemp()
    yield
    left = sorted(path for path in hlfs_mountpoints() if path.startswith(f"{base}/"))
    assert not left, f"tests left HLFS mounted at {left}"
    for record in base.rglob(".hlfs/store.json"):
        remove_rings(record)
