"""The bundled host daemon: a vhost-user back-end that shares a directory with virtio-fs guests.

It shares ``wire`` with the rest of the package and nothing else, and knows no event loop: each
guest has a thread that blocks.
"""
