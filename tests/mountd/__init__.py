"""Tests of mountd."""
