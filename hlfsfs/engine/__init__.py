"""Life cycle of a volume: open, recover, checkpoint, check; synchronous Python over the native core."""
