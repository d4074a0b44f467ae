"""Bytes to frozen records and back: no state, no I/O, ``WireError`` for any bad bytes."""
