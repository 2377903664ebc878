"""Tests of hlfsfs.pool."""
