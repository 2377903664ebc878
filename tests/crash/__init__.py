"""Crashes of real mounts."""
