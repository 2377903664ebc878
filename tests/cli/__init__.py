"""Tests of hlfsfs.cli."""
