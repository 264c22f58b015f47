#!/usr/bin/env bash
# Makes a Debian 12 machine able to build, test and demonstrate Lifeboat. Safe to run again: it does only
# what is missing, one run at a time. Everything it fetches that is not a package rests in <target>/rig.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

PACKAGES=(
    libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients libvirt-dev pkg-config gcc libc6-dev
    make iproute2 util-linux kmod cpio xz-utils python3 adduser
    systemd debootstrap dpkg-dev qemu-guest-agent
)
# What our own packages depend on.
DEPENDS=(libvirt0 qemu-utils)
MODULES=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk virtio_console failover net_failover virtio_net)
# The database of a guest, and what it needs.
DATABASE=(sqlite3 libsqlite3-0 libreadline8 libtinfo6 zlib1g libc6)
# What libvirt-daemon-system would use; that package itself would start a libvirtd on the host, which nobody
# asked for.
QEMU_USER=libvirt-qemu QEMU_UID=64055

main() {
    check_machine
    RIG="$(cargo metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')/rig"
    mkdir -p "$RIG"
    exec 9>"$RIG/setup.lock"
    flock 9
    install_packages
    add_qemu_user
    # The sites mount their own over these.
    mkdir -p /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt
    [ -e /etc/hosts ] || echo '127.0.0.1 localhost' >/etc/hosts
    command -v cargo-nextest >/dev/null || { say 'installing cargo-nextest'; cargo install --locked cargo-nextest; }
    command -v cargo-deb >/dev/null || { say 'installing cargo-deb'; cargo install --locked cargo-deb; }
    fetch_kernel
    build_guest
    build_agent_guest
    build_database_guest
    make_debian_root
    fetch_etcd
    fetch_analyze_migration
}

check_machine() {
    [ "$(id -u)" = 0 ] || die 'needs root: it installs packages, and the rig makes namespaces. Run it with sudo.'
    command -v apt-get >/dev/null || die 'needs apt-get: this bench is made for Debian 12 (bookworm).'
    [ "$(dpkg --print-architecture)" = amd64 ] || die "needs an amd64 machine; this is $(dpkg --print-architecture)."
    [ ! -x "${HOME:-/root}/.cargo/bin/cargo" ] || PATH="$PATH:${HOME:-/root}/.cargo/bin"
    command -v cargo >/dev/null || die 'no cargo found: install Rust from https://rustup.rs, then run this again.'
}

installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

install_packages() {
    local want=() package codename
    for package in "${PACKAGES[@]}"; do installed "$package" || want+=("$package"); done
    # QEMU and its tools conflict unless they are of one release: keep a complete stack, else take both from
    # this one.
    if ! installed qemu-system-x86 || ! installed qemu-utils; then
        codename="$(. /etc/os-release && echo "$VERSION_CODENAME")"
        want+=("qemu-system-x86/$codename" "qemu-utils/$codename")
    fi
    [ ${#want[@]} -gt 0 ] || return 0
    say "installing ${want[*]}"
    fresh_lists || refresh_lists
    apt_install "${want[@]}" || { refresh_lists; apt_install "${want[@]}"; } ||
        die "apt-get could not install: ${want[*]}"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 install \
        --no-install-recommends --allow-downgrades "$@" >&2
}

fresh_lists() { [ -n "$(find /var/lib/apt/lists -maxdepth 1 -name '*Packages*' -newermt '-1 day' 2>/dev/null)" ]; }

# A broken foreign source must not stop us: whether what we need can be had shows when it is installed.
refresh_lists() { apt-get -qq -o DPkg::Lock::Timeout=300 update >&2 || say 'apt-get update had complaints; going on'; }

# Packages into the current folder, not installed.
download() {
    fresh_lists || refresh_lists
    apt-get -qq -o APT::Sandbox::User=root download "$@" >&2 ||
        { refresh_lists; apt-get -qq -o APT::Sandbox::User=root download "$@" >&2; } ||
        die "apt-get could not download: $*"
}

add_qemu_user() {
    getent group "$QEMU_USER" >/dev/null || addgroup --quiet --system --gid "$QEMU_UID" "$QEMU_USER"
    getent passwd "$QEMU_USER" >/dev/null || adduser --quiet --system --uid "$QEMU_UID" --ingroup "$QEMU_USER" \
        --home /var/lib/libvirt --no-create-home --shell /bin/false "$QEMU_USER"
    if getent group kvm >/dev/null && ! id -nG "$QEMU_USER" | grep -qw kvm; then
        adduser --quiet "$QEMU_USER" kvm
    fi
}

fetch_kernel() {
    local module missing=
    for module in "${MODULES[@]}"; do [ -e "$RIG/modules/$module.ko" ] || missing=1; done
    [ ! -e "$RIG/vmlinuz" ] || [ -n "$missing" ] || return 0
    local work; work="$(mktemp -d -p "$RIG")"
    fresh_lists || refresh_lists
    (
        cd "$work"
        package="$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9][^ ]*\).*/\1/p' | head -n 1)"
        [ -n "$package" ] || die 'linux-image-cloud-amd64 is not known to apt: are the Debian sources enabled?'
        say "downloading $package for the test guest"
        download "$package"
        dpkg-deb -x "$package"_*.deb root
        mkdir modules
        for module in "${MODULES[@]}"; do
            file="$(find root -name "$module.ko*" | head -n 1)"
            case "$file" in
                *.ko) cp "$file" "modules/$module.ko" ;;
                *.ko.xz) xz -dc "$file" >"modules/$module.ko" ;;
                *) die "$package has no module $module" ;;
            esac
        done
    )
    rm -rf "$RIG/modules" "$RIG"/*initrd
    mv "$work/modules" "$RIG/modules"
    mv "$work"/root/boot/vmlinuz-* "$RIG/vmlinuz"
    rm -rf "$work"
}

# One static binary and some modules are the whole guest.
build_guest() {
    local stamp work
    stamp="$(cat tests/guest/init.rs tests/setup.sh <(rustc --version) | sha256sum)"
    [ ! -e "$RIG/initrd" ] || [ "$(cat "$RIG/initrd.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    say 'building the test guest'
    work="$(mktemp -d -p "$RIG")"
    mkdir -p "$work"/root/{dev,proc,sys,modules}
    rustc --edition 2024 -C target-feature=+crt-static -C opt-level=2 -C panic=abort -C strip=symbols \
        -o "$work/root/init" tests/guest/init.rs
    cp "$work/root/init" "$RIG/guest-init"
    cp "$RIG"/modules/*.ko "$work/root/modules/"
    pack "$work" initrd "$stamp"
}

# Makes $1/root what guests of kind $2 start from.
pack() {
    (cd "$1/root" && find . -print0 | LC_ALL=C sort -z | cpio --quiet --null -o -H newc | gzip -1 >"../$2")
    mv "$1/$2" "$RIG/$2"
    echo "$3" >"$RIG/$2.stamp"
    rm -rf "$1"
}

# The same with this machine's qemu-guest-agent, the libraries that it needs, and a shell for what it is told to run.
build_agent_guest() {
    local stamp work library
    stamp="$(cat "$RIG/initrd.stamp" /usr/sbin/qemu-ga | sha256sum)"
    [ ! -e "$RIG/agent-initrd" ] || [ "$(cat "$RIG/agent-initrd.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    say 'building the test guest with a guest agent'
    work="$(mktemp -d -p "$RIG")"
    (
        cd "$work"
        download busybox-static
        dpkg-deb -x busybox-static_*.deb from
        mkdir -p root/{bin,sbin,usr/sbin,dev,proc,sys,run,data,modules}
        cp from/bin/busybox root/bin/
        cp /usr/sbin/qemu-ga root/usr/sbin/
        for library in $(ldd /usr/sbin/qemu-ga | grep -o '/[^ ]*'); do
            mkdir -p "root$(dirname "$library")"
            cp -L "$library" "root$library"
        done
        for applet in hwclock ip; do ln -s ../bin/busybox "root/sbin/$applet"; done
        for applet in sh date kill pidof sleep; do ln -s busybox "root/bin/$applet"; done
    )
    cp "$RIG/guest-init" "$work/root/init"
    cp "$RIG"/modules/*.ko "$work/root/modules/"
    pack "$work" agent-initrd "$stamp"
}

# The Debian mirror that this machine takes release $1 from.
mirror() {
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $1" | head -n 1
}

# Another guest, of Debian's SQLite and a shell; the kernel has ext4 built in.
build_database_guest() {
    local stamp work library
    stamp="$(cat tests/guest/database.sh tests/setup.sh | sha256sum)"
    [ ! -e "$RIG/database-initrd" ] || [ "$(cat "$RIG/database-initrd.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    say 'building the guest with a database'
    work="$(mktemp -d -p "$RIG")"
    (
        cd "$work"
        download busybox-static "${DATABASE[@]}"
        for package in *.deb; do dpkg-deb -x "$package" from; done
        mkdir -p root/{bin,dev,proc,sys,modules,data,lib/x86_64-linux-gnu,lib64}
        cp from/bin/busybox from/usr/bin/sqlite3 root/bin/
        for library in libsqlite3.so.0 libreadline.so.8 libtinfo.so.6 libz.so.1 libm.so.6 libc.so.6; do
            cp -L "$(find from -name "$library" | head -n 1)" root/lib/x86_64-linux-gnu/
        done
        cp -L from/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2 root/lib64/
    )
    for applet in sh mount insmod usleep head cat; do ln -s busybox "$work/root/bin/$applet"; done
    cp "$RIG"/modules/*.ko "$work/root/modules/"
    install -m 755 tests/guest/database.sh "$work/root/init"
    pack "$work" database-initrd "$stamp"
}

# An empty Debian to install our packages into, with what they depend on downloaded but not installed.
make_debian_root() {
    local work="$RIG/debian-root.work" codename stamp
    codename="$(. /etc/os-release && echo "$VERSION_CODENAME")"
    stamp="$codename ${DEPENDS[*]}"
    [ ! -e "$RIG/debian-root.tar" ] || [ "$(cat "$RIG/debian-root.stamp" 2>/dev/null)" != "$stamp" ] || return 0
    say 'making a minimal Debian root'
    rm -rf "$work"
    mkdir "$work"
    debootstrap --variant=minbase "$codename" "$work/root" "$(mirror "$codename")" >"$work/log" ||
        { tail -n 20 "$work/log" >&2; die 'debootstrap could not make a Debian root'; }
    # In a mount namespace of its own: whatever happens, nothing stays mounted.
    unshare --mount --pid --fork --kill-child --mount-proc --root "$work/root" \
        apt-get -qq -o APT::Sandbox::User=root install --download-only --no-install-recommends "${DEPENDS[@]}" >&2 ||
        die "apt-get could not download: ${DEPENDS[*]}"
    tar -C "$work/root" --numeric-owner -cf "$work/root.tar" .
    mv "$work/root.tar" "$RIG/debian-root.tar"
    echo "$stamp" >"$RIG/debian-root.stamp"
    rm -rf "$work"
}

# A witness for failovers that the site begins. The program alone: its package would start a server that nobody asked for.
fetch_etcd() {
    [ ! -x "$RIG/etcd" ] || return 0
    say 'downloading etcd'
    local work; work="$(mktemp -d -p "$RIG")"
    (cd "$work" && download etcd-server && dpkg-deb -x etcd-server_*.deb root)
    mv "$work/root/usr/bin/etcd" "$RIG/etcd"
    rm -rf "$work"
}

# QEMU's own reader of migration streams comes only with its source (24 MB). Tests that want it say so when it is missing.
fetch_analyze_migration() {
    [ ! -e "$RIG/analyze-migration.py" ] || return 0
    say "fetching QEMU's analyze-migration.py"
    local work codename; work="$(mktemp -d -p "$RIG")"
    codename="$(. /etc/os-release && echo "$VERSION_CODENAME")"
    mkdir -p "$work"/{lists,cache/archives}/partial
    echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror "$codename") $codename main" \
        >"$work/sources.list"
    local apt=(apt-get -qq -o "Dir::Etc::sourcelist=$work/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o "Dir::State::lists=$work/lists" -o "Dir::Cache=$work/cache" -o APT::Sandbox::User=root)
    if (cd "$work" && "${apt[@]}" update && "${apt[@]}" source --download-only qemu) >&2 &&
        tar -xJf "$work"/qemu_*.orig.tar.xz -C "$work" --strip-components=2 --wildcards '*/scripts/analyze-migration.py'
    then mv "$work/analyze-migration.py" "$RIG/"
    else say 'could not be had: its test will be skipped and say so'; fi
    rm -rf "$work"
}

main "$@"
