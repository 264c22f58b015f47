//! Where things lie in the store, and the way back from a path to what it is.
//!
//! * `vms/<vm>/points/<seq:016>.manifest`: one per recovery point, created once, never rewritten. The name is the seq
//!   alone, so that creating it is also what keeps a history from forking: two points of one seq can't both be there.
//! * `vms/<vm>/packs/<pack>.pack`: frames. Named by no manifest: an orphan of a point that was never committed.
//! * `vms/<vm>/generations/<n:016>`: created once each time the generation rises; the highest *name* counts, so that no
//!   damage to a record's bytes can ever lower it.
//! * `vms/<vm>/folds/<seq:016>-<no:08>.fold`: what stands in for a point's packs; the highest number of a point counts.
//!   `vms/<vm>/folds/<pack>.pack`: the frames of folds. In a folder of their own, which a release that knows no folds
//!   takes for foreign and leaves alone.
//! * `vms/<vm>/pruned/<no:016>`: which points were taken away on purpose; the highest number counts.
//! * `vms/<vm>/owners/<no:016>`: which agent writes the history; the highest number counts.
//! * `quarantine/<vm>/…`: what reopening set aside.

use lifeboat::{
    id::{PackId, VmId},
    units::{Generation, Seq, UnixMs},
};
use std::fmt;

pub const VMS: &str = "vms";
pub const QUARANTINE: &str = "quarantine";

pub fn manifest(vm: VmId, seq: Seq) -> String {
    format!("{VMS}/{vm}/points/{:016}.manifest", seq.0)
}

pub fn pack(vm: VmId, id: PackId) -> String {
    format!("{VMS}/{vm}/packs/{id}.pack")
}

pub fn generation(vm: VmId, generation: Generation) -> String {
    format!("{VMS}/{vm}/generations/{:016}", generation.0)
}

pub fn folds_of(vm: VmId) -> String {
    format!("{VMS}/{vm}/folds")
}

pub fn fold(vm: VmId, seq: Seq, no: u32) -> String {
    format!("{VMS}/{vm}/folds/{:016}-{no:08}.fold", seq.0)
}

pub fn fold_pack(vm: VmId, id: PackId) -> String {
    format!("{VMS}/{vm}/folds/{id}.pack")
}

pub fn pruned(vm: VmId, no: u64) -> String {
    format!("{VMS}/{vm}/pruned/{no:016}")
}

pub fn owners_of(vm: VmId) -> String {
    format!("{VMS}/{vm}/owners")
}

pub fn owner(vm: VmId, no: u64) -> String {
    format!("{VMS}/{vm}/owners/{no:016}")
}

pub fn of_vm(vm: VmId) -> String {
    format!("{VMS}/{vm}")
}

pub fn quarantine_of(vm: VmId) -> String {
    format!("{QUARANTINE}/{vm}")
}

pub fn quarantined_manifest(vm: VmId, seq: Seq, at: UnixMs) -> String {
    format!("{QUARANTINE}/{vm}/{:016}-{}.manifest", seq.0, at.0)
}

/// Where a torn record is set aside; `name` is its last segment.
pub fn quarantined_record(vm: VmId, name: &str, at: UnixMs) -> String {
    format!("{QUARANTINE}/{vm}/{}-{name}", at.0)
}

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Named {
    Manifest(VmId, Seq),
    Pack(VmId, PackId),
    Generation(VmId, Generation),
    Fold(VmId, Seq, u32),
    FoldPack(VmId, PackId),
    Pruned(VmId, u64),
    Owner(VmId, u64),
    /// Nothing that this release puts there.
    Foreign,
}

pub fn parse(path: &str) -> Named {
    let mut parts = path.split('/');
    let named = (|| {
        if parts.next()? != VMS {
            return None;
        }
        let vm: VmId = parts.next()?.parse().ok()?;
        let (room, name) = (parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        match room {
            "points" => Some(Named::Manifest(vm, Seq(number(name.strip_suffix(".manifest")?)?))),
            "packs" => Some(Named::Pack(vm, name.strip_suffix(".pack")?.parse().ok()?)),
            "folds" => match name.strip_suffix(".fold") {
                Some(name) => {
                    let (seq, no) = name.split_once('-')?;
                    let small: u32 = no.parse().ok().filter(|small| format!("{small:08}") == no)?;
                    Some(Named::Fold(vm, Seq(number(seq)?), small))
                }
                None => Some(Named::FoldPack(vm, name.strip_suffix(".pack")?.parse().ok()?)),
            },
            "pruned" => Some(Named::Pruned(vm, number(name)?)),
            "owners" => Some(Named::Owner(vm, number(name)?)),
            "generations" => Some(Named::Generation(vm, Generation(number(name)?))),
            _ => None,
        }
    })();
    named.unwrap_or(Named::Foreign)
}

/// Only the spelling that this release writes, so that no two names mean the same thing.
fn number(text: &str) -> Option<u64> {
    let value: u64 = text.parse().ok()?;
    (format!("{value:016}") == text).then_some(value)
}

/// A path in a message, which may come from a disk: escaped, and of bounded length.
pub struct Shown<'a>(pub &'a str);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().take(300).try_for_each(|c| write!(f, "{}", c.escape_debug()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_that_is_written_is_read_back_as_what_it_is() {
        let (vm, id) = (VmId::from_bytes([7; 16]), PackId::from_bytes([9; 16]));
        assert_eq!(parse(&manifest(vm, Seq(42))), Named::Manifest(vm, Seq(42)));
        assert_eq!(parse(&pack(vm, id)), Named::Pack(vm, id));
        assert_eq!(parse(&generation(vm, Generation(3))), Named::Generation(vm, Generation(3)));
        assert_eq!(parse(&fold(vm, Seq(42), 7)), Named::Fold(vm, Seq(42), 7));
        assert_eq!(parse(&fold_pack(vm, id)), Named::FoldPack(vm, id));
        assert_eq!(parse(&pruned(vm, 3)), Named::Pruned(vm, 3));
        assert_eq!(parse(&owner(vm, 3)), Named::Owner(vm, 3));
        assert_eq!(parse(&format!("{}/0000000000000042-7.fold", folds_of(vm))), Named::Foreign);
        let foreign =
            ["vms", "vms/x/points/1", "a", "", "vms//points", &format!("{}/points/1.manifest", of_vm(vm))];
        for path in foreign {
            assert_eq!(parse(path), Named::Foreign, "{path}");
        }
    }
}
