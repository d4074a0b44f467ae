#!/bin/sh
# Install the system packages that are missing, with apt; do nothing at all when none is.
#
# Usage: system-packages.sh PYTHON [test|guest|bench]
#   PYTHON   the interpreter that the virtual environment will be made with
#   test     also what only the tests need
#   guest    also what it takes to boot a virtual machine
#   bench    also what only the benchmark needs: other filesystems to compare with
#
# Each need is looked for itself (a command, a header), not its package: whoever has it from
# elsewhere needs no package and no apt.
set -eu
python=$1
purpose=${2:-}
missing=""
need() { missing="$missing $*"; }
have() { command -v "$1" >/dev/null 2>&1; }

have cc && echo '#include <stdio.h>' | cc -E - >/dev/null 2>&1 || need gcc libc6-dev
have pkg-config || need pkg-config
have pkg-config && pkg-config --exists fuse3 || need libfuse3-dev
have fusermount3 || need fuse3

# A Debian python comes in pieces; one from elsewhere (pyenv, uv) is whole.
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$python" -c 'import ensurepip, venv' 2>/dev/null || need "python$version-venv"
"$python" -c '
import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))
' || need "python$version-dev"

if [ "$purpose" = test ]; then
    have rsync || need rsync # a workload that runs on the mount
fi
if [ "$purpose" = guest ]; then
    have qemu-system-x86_64 || need qemu-system-x86
fi
if [ "$purpose" = bench ]; then
    have git || need git
    have bindfs || need bindfs
    have sshfs || need sshfs
    # Without what it recommends: that is an SSH server.
    [ -x /usr/lib/openssh/sftp-server ] || [ -x /usr/libexec/openssh/sftp-server ] ||
        [ -x /usr/lib/ssh/sftp-server ] || need openssh-sftp-server
fi

[ -n "$missing" ] || exit 0

if ! have apt-get; then
    echo "These packages are missing (Debian names), and there is no apt-get to install them:" >&2
    echo "   $missing" >&2
    exit 1
fi
as_root=""
if [ "$(id -u)" -ne 0 ]; then
    # sudo asks for a password on the terminal; without one it may only go ahead if it need not.
    if have sudo && { [ -t 0 ] || sudo -n true 2>/dev/null; }; then
        as_root="sudo"
    else
        echo "These system packages are missing, and this user cannot install them. As root, run:" >&2
        echo "    apt-get install$missing" >&2
        exit 1
    fi
fi

echo "Installing system packages:$missing ..."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
apt() { $as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -y "$@" >>"$log" 2>&1; }
# The package lists may be absent (containers) or old; a mirror that fails need not be the one
# that we use, so only the install decides.
apt update || true
# shellcheck disable=SC2086 # one word per package
if ! apt install --no-install-recommends $missing; then
    cat "$log" >&2
    echo "Installing failed. Needed:$missing" >&2
    exit 1
fi
