"""The commands: one mount, from the command line to its end, and what is asked of it."""
