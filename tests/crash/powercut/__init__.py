"""The power-cut machine: a history of the real engine, cut after each thing it did to its disk.

shim.c       below Python and the core: writes down what both do to the disk of one store
shim.py      builds it, and calls it
trace.py     what it wrote down, as a recording that `tests.store.power_loss` can cut
operations.py, histories.py    what is done to a store
oracle.py    what may be left of it at each moment, by the promise
worker.py    the process with the shim, which runs histories and recovers what cuts left
machine.py   cuts, checks, and makes what it found small
"""
