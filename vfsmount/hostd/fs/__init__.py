"""The FUSE server: a directory of the host, served by descriptors and never by paths."""
