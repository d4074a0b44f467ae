"""The pyfuse3 engine: libfuse decodes the kernel's requests, the session encodes them anew."""
