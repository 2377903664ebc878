"""Tests of hlfsfs.store."""
