#!/bin/sh
# Serve and mount by two commands, as you would with any virtiofsd in place of the first one.
#
#     examples/serve_and_mount.sh SOURCE MOUNTPOINT
set -eu
vfsmount=${VFSMOUNT:-vfsmount}
source=$1 mountpoint=$2
socket=$(mktemp -d)/vfsd.sock

# 1. The host daemon. It listens on the socket and stays until it is stopped.
$vfsmount serve "$source" --socket "$socket" &
daemon=$!
trap 'kill "$daemon"; rm -rf "${socket%/*}"' EXIT
until [ -S "$socket" ]; do sleep 0.1; done

# 2. The guest. --daemonize returns when the mount can be used.
$vfsmount "$mountpoint" --socket "$socket" --daemonize

ls -l "$mountpoint"
$vfsmount status "$mountpoint"
$vfsmount umount "$mountpoint"
