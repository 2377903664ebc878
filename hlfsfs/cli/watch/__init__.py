"""Watching mounts: `hlfs top` for people, `hlfs metrics` for Prometheus."""
