"""The relay engine: the kernel's own FUSE messages, put on the virtqueue as they stand.

``loop`` has the thread that does it, and says what each other file is for.
"""
