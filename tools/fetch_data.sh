#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes Fashion-MNIST available: installs Debian's package where that is allowed, else unpacks it into data/.
# Prints one line and changes nothing if the data is already there.
set -u
package=dataset-fashion-mnist
system=/usr/share/datasets/fashion-mnist
here=$(cd "$(dirname "$0")/.." && pwd)
local_root=$here/data

complete() { # complete <folder>: all four files
    for name in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
        [ -s "$1/$name-ubyte.gz" ] || [ -s "$1/$name-ubyte" ] || return 1
    done
}

for folder in "$system" "$local_root/fashion-mnist"; do
    if complete "$folder"; then
        echo "Fashion-MNIST: $folder"
        exit 0
    fi
done

as_root=
if [ "$(id -u)" -ne 0 ]; then
    as_root="sudo -n"
    $as_root true 2>/dev/null || as_root=no
fi

if command -v apt-get >/dev/null 2>&1; then
    if [ "$as_root" != no ]; then
        echo "Fashion-MNIST: installing the Debian package $package"
        $as_root apt-get install -y -qq $package >/dev/null 2>&1 ||
            { $as_root apt-get update -qq && $as_root apt-get install -y -qq $package >/dev/null; }
        complete "$system" && exit 0
    fi
    echo "Fashion-MNIST: unpacking the Debian package $package into data/"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    if (cd "$work" && apt-get download -qq $package && dpkg -x $package*.deb .) && complete "$work$system"; then
        mkdir -p "$local_root"
        rm -rf "$local_root/fashion-mnist"
        mv "$work$system" "$local_root/fashion-mnist"
        exit 0
    fi
fi

cat >&2 <<MSG
Fashion-MNIST was not found and could not be installed. Either
  - as root on Debian or Ubuntu: apt install $package
  - or put its four *-ubyte.gz files (https://github.com/zalandoresearch/fashion-mnist) into
    $local_root/fashion-mnist.
MSG
exit 1
