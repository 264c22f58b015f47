#!/usr/bin/env bash
# Makes the guest that does real work, for `make bench`: a Debian with PostgreSQL and a compiler on an ext4 image.
# Leaves workload.raw and workload-initrd in <target>/rig, beside what tests/setup.sh made (run that first). Safe to run
# again: it does only what is missing. Kernel parameter `lb.work=`: `database` (pgbench, two clients), `compile` (gcc,
# over and over) or `none`. Says `work=N` on its console, N being transactions or files so far, each second.
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { printf 'workload: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

RIG="$(cargo metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/rig"
MODULES=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk
    crc16 mbcache jbd2 libcrc32c crc32c_generic ext4)
IMAGE_SIZE=2G

main() {
    [ -e "$RIG/vmlinuz" ] || die 'run tests/setup.sh first'
    exec 9>"$RIG/workload.lock"
    flock 9
    local stamp; stamp="$(cat "$0" "$RIG/vmlinuz" | sha256sum)"
    if [ -e "$RIG/workload.raw" ] && [ "$(cat "$RIG/workload.stamp" 2>/dev/null)" = "$stamp" ]; then return; fi
    local work="$RIG/workload.work"
    rm -rf "$work"
    mkdir "$work"
    make_root "$work"
    make_initrd "$work"
    # As QEMU's user must own what it opens, and ext4 must not: `-d` copies owners from the tree.
    mke2fs -q -t ext4 -d "$work/root" -E root_owner=0:0 "$work/workload.raw" "$IMAGE_SIZE"
    mv "$work/workload.raw" "$work/workload-initrd" "$RIG/"
    echo "$stamp" >"$RIG/workload.stamp"
    rm -rf "$work"
}

mirror() { apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $1" | head -n 1; }

# In namespaces of its own: whatever happens, nothing stays mounted and nothing goes on running.
inside() { local root="$1"; shift; unshare --mount --pid --fork --kill-child --mount-proc --root "$root" "$@"; }

make_root() {
    local root="$1/root" codename
    codename="$(. /etc/os-release && echo "$VERSION_CODENAME")"
    say 'making a Debian with PostgreSQL and gcc'
    debootstrap --variant=minbase --include=postgresql,gcc,libc6-dev "$codename" "$root" "$(mirror "$codename")" \
        >"$1/log" || { tail -n 20 "$1/log" >&2; die 'debootstrap failed'; }
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}
    cat >"$root/fill" <<'FILL'
#!/bin/bash
set -e
mkdir -p /build
for file in $(seq 8); do
    for i in $(seq 80); do
        echo "int f${file}_$i(int *a, int n) { int s = $i; for (int j = 0; j < n; j++) { s += a[j] * $((i % 17)); if (s & $i) a[j] ^= s; } return s; }"
    done >/build/part$file.c
done
pg_ctlcluster 15 main start
su postgres -c 'createdb bench && pgbench -q -i -s 8 bench'
pg_ctlcluster 15 main stop
FILL
    chmod +x "$root/fill"
    inside "$root" /fill >"$1/log" 2>&1 || { tail -n 20 "$1/log" >&2; die 'filling the database failed'; }
    rm "$root/fill"
    cat >"$root/lb-start" <<'START'
#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
exec >/dev/ttyS0 2>&1
mount -t tmpfs none /run; mount -t tmpfs none /tmp; mkdir -p /dev/shm /run/postgresql; mount -t tmpfs none /dev/shm
chown postgres /run/postgresql
ip link set lo up 2>/dev/null
work=$(sed -n 's/.*lb\.work=\([a-z]*\).*/\1/p' /proc/cmdline)
echo "hello work=$work"
case "$work" in
database)
    pg_ctlcluster 15 main start
    # One line a second from pgbench itself: "progress: 1.0 s, 40.0 tps, ...".
    su postgres -c 'pgbench -n -c 2 -T 1000000 -P 1 bench' 2>&1 | {
        done=0
        while read -r _ _ _ tps _; do
            case "$tps" in [0-9]*) done=$((done + ${tps%.*})); echo "work=$done" ;; esac
        done
    } ;;
compile)
    cd /build; done=0
    while true; do
        for file in part*.c; do gcc -O1 -c "$file" -o "/build/${file%.c}.o" && done=$((done + 1)); echo "work=$done"; done
    done ;;
*) while true; do sleep 60; done ;;
esac
echo 'the work ended'
while true; do sleep 60; done
START
    chmod +x "$root/lb-start"
}

make_initrd() {
    local work="$1" initrd="$1/initrd.d" package module file
    mkdir -p "$initrd"/{bin,dev,proc,sys,modules,root} "$work/kernel" "$work/busybox"
    (
        cd "$work"
        package="$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\).*/\1/p' | head -n 1)"
        apt-get -qq -o APT::Sandbox::User=root download "$package" busybox-static >&2
        dpkg-deb -x linux-image-*.deb kernel
        dpkg-deb -x busybox-static_*.deb busybox
    )
    cmp -s "$work"/kernel/boot/vmlinuz-* "$RIG/vmlinuz" ||
        die "apt has another kernel now than tests/setup.sh took: remove $RIG/vmlinuz and run that again"
    for module in "${MODULES[@]}"; do
        file="$(find "$work/kernel" -name "$module.ko*" | head -n 1)"
        case "$file" in
            *.ko) cp "$file" "$initrd/modules/" ;;
            *.ko.xz) xz -dc "$file" >"$initrd/modules/$module.ko" ;;
            *) say "the kernel has no module $module: taken as built in" ;;
        esac
    done
    cp "$work/busybox/bin/busybox" "$initrd/bin/"
    cat >"$initrd/init" <<INIT
#!/bin/busybox sh
/bin/busybox mount -t proc none /proc
/bin/busybox mount -t sysfs none /sys
/bin/busybox mount -t devtmpfs none /dev
for module in ${MODULES[*]}; do [ ! -e /modules/\$module.ko ] || /bin/busybox insmod /modules/\$module.ko; done
until [ -b /dev/vda ]; do /bin/busybox usleep 20000; done
/bin/busybox mount -t ext4 /dev/vda /root
for place in proc sys dev; do /bin/busybox mount -o move /\$place /root/\$place; done
exec /bin/busybox switch_root /root /lb-start
INIT
    chmod +x "$initrd/init"
    (cd "$initrd" && find . -print0 | LC_ALL=C sort -z | cpio --quiet --null -o -H newc | gzip -1 >../workload-initrd)
}

main "$@"
