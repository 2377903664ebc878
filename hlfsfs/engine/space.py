"""Tells the log when the filesystem below a store runs out of space, once each time, and when that is over."""

import logging

from hlfsfs.store import StoreSpace

log = logging.getLogger(__name__)

# Shares in use at which a line is logged. It is over when the share was smaller, by so much, at so many looks in a row:
# the space of a busy store goes up and down with the cleaner's work.
WARN_SHARES = (0.85, 0.95)
OVER_SHARE = 0.02
OVER_LOOKS = 6


class SpaceWatch:
    """Remembers which of the shares the store has passed; one thread at a time."""

    def __init__(self, what: str) -> None:
        """`what` is how the log calls the store."""
        self._what = what
        self._passed = 0
        self._below_looks = 0

    def look(self, space: StoreSpace) -> None:
        """Logs a line if the store has passed a share, or is below one again, since it was last looked at."""
        used = used_share(space)
        # Rounded down: 100 % is full.
        state = f"{self._what}: its filesystem is {int(used * 100)} % full, {space.available_bytes >> 20} MiB are left"
        passed = sum(used >= share for share in WARN_SHARES)
        if passed > self._passed:
            log.warning("%s; delete or trim volumes, or enlarge it", state)
            self._passed = passed
        stays = sum(used >= share - OVER_SHARE for share in WARN_SHARES[: self._passed])
        self._below_looks = self._below_looks + 1 if stays < self._passed else 0
        if self._below_looks >= OVER_LOOKS:
            log.warning("%s: below %d %% again", state, WARN_SHARES[stays] * 100)
            self._passed, self._below_looks = stays, 0


def used_share(space: StoreSpace) -> float:
    """As df(1) has it: of what an ordinary user may use at all."""
    used_bytes = space.total_bytes - space.free_bytes
    return used_bytes / max(used_bytes + space.available_bytes, 1)
