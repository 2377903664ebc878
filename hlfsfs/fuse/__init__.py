"""The FUSE adapter: operations, inodes and the mount; the only place of pyfuse3."""
