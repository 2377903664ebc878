"""Tests of the engine: model, ring life cycle, damage, check."""
