//! What lies in the store, as its folders tell: names and lengths, nothing is read.

use super::{
    error::StoreError,
    objects::Objects,
    paths::{self, Named},
};
use lifeboat::{
    id::{PackId, VmId},
    units::{Generation, Seq},
};
use std::collections::{BTreeMap, BTreeSet};

/// What lies under one VM's directory.
#[derive(Debug, Default)]
pub struct Listing {
    pub manifests: BTreeMap<Seq, u64>,
    pub packs: BTreeMap<PackId, u64>,
    pub generations: BTreeSet<Generation>,
    /// Numbers of each point's folds.
    pub folds: BTreeMap<Seq, BTreeSet<u32>>,
    pub fold_packs: BTreeMap<PackId, u64>,
    /// Bytes of fold records, all together.
    pub fold_bytes: u64,
    pub pruned: BTreeSet<u64>,
}

impl Listing {
    /// Bytes of everything that verifying reads.
    pub fn bytes(&self) -> u64 {
        let objects = self.manifests.values().chain(self.packs.values()).chain(self.fold_packs.values());
        objects.sum::<u64>() + self.fold_bytes
    }
}

pub async fn list(objects: &dyn Objects) -> Result<(BTreeMap<VmId, Listing>, Vec<String>), StoreError> {
    let (mut vms, mut foreign) = (BTreeMap::<VmId, Listing>::new(), Vec::new());
    for object in objects.list(paths::VMS).await? {
        match paths::parse(&object.path) {
            Named::Manifest(vm, seq) => {
                vms.entry(vm).or_default().manifests.insert(seq, object.bytes);
            }
            Named::Pack(vm, id) => {
                vms.entry(vm).or_default().packs.insert(id, object.bytes);
            }
            Named::Generation(vm, generation) => {
                vms.entry(vm).or_default().generations.insert(generation);
            }
            Named::Fold(vm, seq, no) => {
                let listing = vms.entry(vm).or_default();
                listing.fold_bytes += object.bytes;
                listing.folds.entry(seq).or_default().insert(no);
            }
            Named::FoldPack(vm, id) => {
                vms.entry(vm).or_default().fold_packs.insert(id, object.bytes);
            }
            Named::Pruned(vm, no) => {
                vms.entry(vm).or_default().pruned.insert(no);
            }
            // Read when it is asked for.
            Named::Owner(..) => {}
            Named::Foreign => foreign.push(object.path),
        }
    }
    Ok((vms, foreign))
}
