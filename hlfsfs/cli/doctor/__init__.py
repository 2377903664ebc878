"""What on a host would stop a virtual machine that lives on HLFS, each with its remedy."""

from hlfsfs.cli.doctor.checks import CHECKS, examine
from hlfsfs.cli.doctor.host import Finding, Host, HostMount, Subject

__all__ = ["CHECKS", "Finding", "Host", "HostMount", "Subject", "examine"]
