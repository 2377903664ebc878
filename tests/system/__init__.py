"""HLFS in the hands of the programs people use it with, unpatched: coreutils, fio, QEMU, ext4, mount(8), libvirt."""
