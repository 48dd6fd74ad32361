#!/bin/sh
# The guest's first program: makes the root that the command sees and hands over to `xtask vm-guest` there.
# What it needs beside it: /modules/NN-NAME.ko in the order of loading, /guest/ (xtask and its task) and, where the kernel
# has modules, /modules-dir, a link to them.

# The host looks for the line's beginning: such a start is not repeated.
fail() {
    echo "vm: $*"
    poweroff -f
}

mount -t proc proc /proc || fail "cannot mount /proc"
mount -t sysfs sysfs /sys || fail "cannot mount /sys"
mount -t devtmpfs dev /dev || fail "cannot mount /dev"

for module in /modules/*.ko; do
    [ -e "$module" ] || continue
    insmod "$module" || fail "cannot load $module"
done

case " $(cat /proc/cmdline) " in
*" vm.files=9p "*)
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144,cache=loose,ro host /host ;;
*)
    mount -t virtiofs -o ro host /host ;;
esac || fail "cannot mount the host's files"

# The upper layer: what the command writes.
mount -t tmpfs -o mode=755 written /written || fail "cannot mount a tmpfs"
mkdir /written/upper /written/work
mount -t overlay -o lowerdir=/host,upperdir=/written/upper,workdir=/written/work root /new || fail "cannot mount the overlay"

release=$(uname -r)
if [ -L /modules-dir ]; then
    mkdir -p /new/lib/modules
    rm -rf "/new/lib/modules/$release"
    cp -P /modules-dir "/new/lib/modules/$release" || fail "cannot link the kernel's modules"
fi

mount -t proc proc /new/proc && mount -t sysfs sysfs /new/sys && mount -t devtmpfs dev /new/dev \
    || fail "cannot mount /proc, /sys and /dev"
ln -s /proc/self/fd /new/dev/fd
ln -s /proc/self/fd/0 /new/dev/stdin
ln -s /proc/self/fd/1 /new/dev/stdout
ln -s /proc/self/fd/2 /new/dev/stderr
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts -o ptmxmode=666 devpts /new/dev/pts || fail "cannot mount /dev/pts"
mount -t tmpfs -o mode=1777 shm /new/dev/shm || fail "cannot mount /dev/shm"
mount -t tmpfs -o mode=755 run /new/run || fail "cannot mount /run"
mkdir /new/run/lock
# Kernels may come without these; a command that needs one fails on its own.
mount -t bpf bpf /new/sys/fs/bpf
mount -t tracefs tracefs /new/sys/kernel/tracing
mount -t cgroup2 cgroup2 /new/sys/fs/cgroup

hostname vm
ip link set lo up || fail "cannot set lo up"
ulimit -Hn 524288

mkdir /new/run/xtask-vm
cp /guest/* /new/run/xtask-vm/ || fail "cannot copy the guest's program"
exec switch_root /new /run/xtask-vm/xtask vm-guest
