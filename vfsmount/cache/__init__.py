"""What may be answered without asking the daemon, and for how long. Pure; clocks are passed in."""
