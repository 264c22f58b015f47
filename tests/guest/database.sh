#!/bin/busybox sh
# The bank: PID 1 of the guest with a database, SQLite with a write-ahead log on ext4, on its first disk.
# One connection transfers money all the time, each transfer a transaction that is on the disk (synchronous=FULL) before
# it says so; another opens the database again and again, reads it from the disk, and has SQLite and the books checked.
# Balances are kept twice, as such and as the sum of transfers, and transfers are numbered without gaps. Said on the
# console, a line each, `boot` being another after each boot; errors are said as SQLite and the kernel put them:
#     commit=N boot=ID end=N
#     check=N boot=ID integrity=ok rows=N newest=N balances=N wrong=N end=N
# Put into <target>/rig/database-initrd by tests/setup.sh; its console is read by `rig::database`.

PATH=/bin
mount -t proc none /proc
mount -t sysfs none /sys
mount -t devtmpfs none /dev
for module in virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci virtio_blk; do
    insmod "/modules/$module.ko"
done
exec >/dev/ttyS0 2>&1
until [ -b /dev/vda ]; do usleep 20000; done
mount -t ext4 -o errors=remount-ro /dev/vda /data || echo 'error=the disk cannot be mounted'
head -c 8 /dev/random >/dev/null # blocks until the kernel has real randomness
read -r boot </proc/sys/kernel/random/boot_id

SCHEMA='
CREATE TABLE IF NOT EXISTS account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL);
INSERT OR IGNORE INTO account
    WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 99) SELECT i, 1000 FROM n;
CREATE TABLE IF NOT EXISTS transfer (id INTEGER PRIMARY KEY, source INT, target INT, amount INT, memo BLOB);
CREATE INDEX IF NOT EXISTS by_source ON transfer (source, amount);
CREATE INDEX IF NOT EXISTS by_target ON transfer (target, amount);
CREATE VIEW IF NOT EXISTS newest AS SELECT * FROM transfer ORDER BY id DESC LIMIT 1;'

TRANSFER="
BEGIN IMMEDIATE;
INSERT INTO transfer SELECT coalesce(max(id), 0) + 1,
    abs(random()) % 100, abs(random()) % 100, abs(random()) % 100, randomblob(1500) FROM transfer;
UPDATE account SET balance = balance - (SELECT amount FROM newest) WHERE id = (SELECT source FROM newest);
UPDATE account SET balance = balance + (SELECT amount FROM newest) WHERE id = (SELECT target FROM newest);
COMMIT;
SELECT 'commit=' || id || ' boot=$boot end=' || id FROM newest;"

# In one transaction, so of one state: what SQLite says of its file, and what the books say.
check() {
    echo 3 >/proc/sys/vm/drop_caches
    sqlite3 -batch -bail -cmd '.timeout 60000' /data/bank "
        BEGIN;
        SELECT 'check=$1 boot=$boot integrity='
            || (SELECT replace(group_concat(integrity_check), ' ', '_') FROM pragma_integrity_check)
            || ' rows=' || count(*) || ' newest=' || coalesce(max(id), 0)
            || ' balances=' || (SELECT sum(balance) FROM account)
            || ' wrong=' || (SELECT count(*) FROM account WHERE balance <> 1000
                + (SELECT coalesce(sum(amount), 0) FROM transfer WHERE target = account.id)
                - (SELECT coalesce(sum(amount), 0) FROM transfer WHERE source = account.id))
            || ' end=$1' FROM transfer;
        COMMIT;" || echo 'error=the check ended'
}

# What a boot without memory finds is checked before anything is written.
[ ! -e /data/bank ] || check 1
sqlite3 -batch -bail -cmd '.timeout 60000' /data/bank "PRAGMA journal_mode=WAL; $SCHEMA" >/dev/null || echo 'error=no database'
{
    printf 'PRAGMA synchronous=FULL;\nPRAGMA wal_autocheckpoint=100;\n'
    while true; do
        echo "$TRANSFER"
        usleep 20000
    done
} | { sqlite3 -batch -bail -cmd '.timeout 60000' /data/bank; echo 'error=the database ended'; } &
number=2
while true; do
    check "$number"
    number=$((number + 1))
    usleep 200000
done
