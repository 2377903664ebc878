"""Tests, from single modules up to the real kernel and tools."""
