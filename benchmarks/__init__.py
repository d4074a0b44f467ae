"""The benchmark: vfsmount beside its nearest relatives, on this machine, in one run.

``make bench``, or ``python -m benchmarks --help``. README.md in this folder says what is measured
and how to read it.
"""
