"""The namespace: pools, volumes and their permissions; knows nothing of FUSE."""
