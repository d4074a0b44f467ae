"""FUSE client downward: the session; above it two engines, and the mount that they serve."""
