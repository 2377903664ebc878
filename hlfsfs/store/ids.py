"""Ids of volumes, pools and snapshots, as numbers."""

# Ids given out are in [MIN_ID, MAX_ID): above every number that has a fixed meaning, and positive in any integer.
MIN_ID = 1 << 32
MAX_ID = 1 << 62
