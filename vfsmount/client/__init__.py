"""FUSE client downward, file system upward: the session, the mount, and what commands it."""
