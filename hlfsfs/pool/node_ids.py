"""Which number stands for which node, so that any process finds a node by it, whatever was looked up before.

Pools and volumes have the stable ids of their records, below 2^62. What belongs to one of them has that id under one of
three marks in the two highest bits, and a snapshot has its own id under the third.
"""

from hlfsfs.store.ids import MAX_ID

# Node id of the mount's root, whatever pool that is.
ROOT_ID = 1
# Shown for a name whose id cannot be read: below every id given out, and not to be looked up.
UNKNOWN_ID = 0xFFFFFFFF

# `.snapshots` of a pool, or a volume's directory in there.
SNAPSHOTS_MARK = 1 * MAX_ID
LATEST_MARK = 2 * MAX_ID
SNAPSHOT_MARK = 3 * MAX_ID


def marked(mark: int, stable_id: int) -> int:
    """The node that belongs to what has this id."""
    return mark | stable_id


def mark_of(node_id: int) -> int:
    """One of the marks, 0 for a pool or volume."""
    return node_id & SNAPSHOT_MARK


def stable_id(node_id: int) -> int:
    """The id under the mark."""
    return node_id & (MAX_ID - 1)
