"""The DAX window: parts of host files in memory shared with the daemon.

benefit     when a mapping pays, and when the window steps aside (pure)
mappings    what the back-end has mapped where, as it said on the back-end request channel (pure)
ranges      the window cut into ranges: which part of which file each of them is for (pure)
memory      the window mapped into memory, for views without a copy; SIGBUS
window      the descriptors behind it, and the checks of what the back-end asks
"""
