#!/bin/sh
# Print the path of a usable Python: $1 if given, else python3, else one with its version in its name.
set -eu
for candidate in ${1:-python3 python3.14 python3.13 python3.12 python3.11}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        # Not the candidate's own path: that may be a version manager's script.
        exec "$candidate" -c 'import sys; print(sys.executable)'
    fi
done
echo "vfsmount needs Python 3.11 or newer; none was found${1:+ as $1}. Try: make PYTHON=/path/to/python3" >&2
exit 1
