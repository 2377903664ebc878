"""A store below which any one system call fails, hangs, or is the last of its process.

shim.c       below Python and the core: counts their calls on one store, and does to one of them what it is told
control.py   builds it, and tells it from any process
snapshot_states.py  what is to become of snapshots and clones
trials.py    histories on a store with one such call, and what must be true afterwards
worker.py    the process with the shim, which forks one for each trial
"""
