"""The daemon: mount definitions and one supervised server per mount."""
