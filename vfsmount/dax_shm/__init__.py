"""The DAX window: file contents mapped into memory shared with the daemon. Empty as yet."""
