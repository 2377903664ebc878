"""Measurements: HLFS beside a raw file on the same disk and beside qemu-storage-daemon's FUSE export, in one run."""
