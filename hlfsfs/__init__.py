"""HLFS: a log-structured store of virtual-machine disks, shown as files."""
