"""The `hlfs` command and the mount(8) helper."""
