#!/bin/sh
# A protected VM is started on this host only with a lease, which a reboot takes away and which the agent writes once the
# site has said that the VM was not failed over. Written by `lifeboat-agent hook install`, removed by `hook remove`.
# libvirt calls it as: NAME OPERATION SUB-OPERATION EXTRA, the domain's XML on standard input. It must not call libvirt.
# It prints nothing on standard output: for some operations that would replace the XML.
STATE='@STATE@'
RUN='@RUN@'

case $2 in
prepare | start | restore | migrate | started | release) ;;
# `reconnect` above all: refusing it would kill a guest that runs when libvirt is restarted.
*) exit 0 ;;
esac
head=$(sed '/^ *<memory[ >]/q')
vm=$(printf '%s\n' "$head" | sed -n 's/^ *<uuid>\([0-9a-f-]\{36\}\)<\/uuid>.*/\1/p;/^ *<uuid>/q')
[ -n "$vm" ] && [ -e "$STATE/protected/$vm" ] || exit 0
incoming=$RUN/incoming/$vm

case $2 in
started | release)
    rm -f "$incoming"
    exit 0
    ;;
esac
now=0 word= until=
read -r now _ </proc/uptime
now=${now%%.*}
[ -r "$RUN/leases/$vm" ] && read -r word until <"$RUN/leases/$vm"
held= way=allow kept=
[ -e "$STATE/holds/$vm.hold" ] && held=yes word=
# Bound to a witness: it may run for as long as a lease lets it, by the second that has begun.
if [ -e "$STATE/witness/$vm" ]; then
    soft= boot=
    [ -r "$RUN/kept/$vm" ] && read -r soft _ boot <"$RUN/kept/$vm"
    read -r this </proc/sys/kernel/random/boot_id
    [ "$boot" = "$this" ] && [ $(((now + 1) * 1000)) -lt "${soft:-0}" ] || kept=no word=
fi
case $word in
granted) exit 0 ;;
# A replica that a later failover put here is not the copy that was fenced.
fenced)
    label=$(printf '%s\n' "$head" |
        sed -n 's/.*<lifeboat:replica xmlns:lifeboat="urn:lifeboat:replica:1" generation="\([0-9]\{1,18\}\)".*/\1/p' | sed 1q)
    [ -n "$label" ] && [ -n "$until" ] && [ "$label" -gt "$until" ] && exit 0
    ;;
until) [ "$now" -lt "${until:-0}" ] && exit 0 ;;
esac
if [ -n "$held" ]; then
    why="it is held for a planned failover, until the site has decided"
    way=resume-held
elif [ -n "$kept" ]; then
    why="neither the site nor the witness has confirmed in time that it may run here"
elif [ "$word" = fenced ]; then
    why="it was failed over to the site, where its replica runs"
else
    why="the site has not said yet that it was not failed over"
    # A guest that comes in by a migration ran elsewhere by right, and ends there: the start that follows belongs to it.
    case $2 in
    migrate)
        mkdir -p "$RUN/incoming" && echo "$now" >"$incoming"
        exit 0
        ;;
    prepare | start)
        came=
        [ -r "$incoming" ] && read -r came <"$incoming"
        [ -n "$came" ] && [ "$now" -lt $((came + 60)) ] && exit 0
        ;;
    esac
fi
mkdir -p "$RUN/refused" && echo "$2" >"$RUN/refused/$vm"
echo "lifeboat: $1 is not started here: $why. See: lifeboat-agent status; if the site is lost for good: lifeboat-agent $way $1" >&2
exit 1
