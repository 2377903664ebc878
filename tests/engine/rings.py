"""Ring files as tests look at them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def lock_record(store: Path) -> dict[str, Any]:
    """What the store's lock file says."""
    found: dict[str, Any] = json.loads((store / ".hlfs" / "lock").read_text())
    return found


def ring_of(store: Path) -> str:
    """The ring that the store's last user named; a path that does not exist when there was none."""
    return str(lock_record(store)["ring"] or "/dev/shm/hlfs-none.ring")
