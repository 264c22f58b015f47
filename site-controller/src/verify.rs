//! `lifeboat verify`: everything read and hashed again, and what it means if something is not as it was written.
//! Promises: every byte of every manifest, pack and generation record is looked at, and every page that is put together
//! from several frames is made again and compared; nothing is changed; a few segments of a pack are in memory. What
//! arrives while it runs may be left out. Called by the API and the CLI.

use crate::restore::chains::{self, WrongPages};
use crate::store::{
    ChainWalk, Finding, ImageKey, Layer, Listing, Objects, PointRef, StoreError, list_objects, paths,
    read_generation, read_index_at, read_layer, read_pruned,
};
use lifeboat::{
    chunk::digest::Digester,
    format::{
        frame,
        manifest::Image,
        pack::{IndexEntry, PackRef, encode_index, pack_header},
    },
    id::VmId,
    units::Seq,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyReport {
    pub vms: u64,
    pub points: u64,
    pub objects: u64,
    pub bytes: u64,
    pub findings: Vec<Finding>,
}

impl VerifyReport {
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyProgress {
    pub done_bytes: u64,
    pub total_bytes: u64,
}

/// Verifies one VM, or all. An error means that verifying itself could not go on; damage is a finding.
pub async fn verify(
    objects: &Arc<dyn Objects>,
    vm: Option<VmId>,
    mut progress: impl FnMut(VerifyProgress) + Send,
) -> Result<VerifyReport, StoreError> {
    let (mut vms, foreign) = list_objects(objects.as_ref()).await?;
    vms.retain(|id, _| vm.is_none_or(|vm| vm == *id));
    let total_bytes = vms.values().map(Listing::bytes).sum();
    let mut report = VerifyReport { vms: vms.len() as u64, ..Default::default() };
    if vm.is_none() {
        report.findings.extend(foreign.into_iter().map(|object| {
            let what = "not put there by this store".into();
            Finding { vm: None, point: None, object, what, affects: Vec::new() }
        }));
    }
    for (vm, listing) in vms {
        let pruned = match read_pruned(objects.as_ref(), vm, &listing).await {
            Ok(pruned) => pruned,
            Err(error) => {
                let object = paths::pruned(vm, listing.pruned.last().copied().unwrap_or_default());
                let what = error.what();
                report.findings.push(Finding {
                    vm: Some(vm),
                    point: None,
                    object,
                    what,
                    affects: Vec::new(),
                });
                None
            }
        };
        report.objects += u64::from(!listing.pruned.is_empty());
        let chain = ChainWalk::over(pruned);
        let folds =
            listing.folds.iter().filter_map(|(seq, folds)| Some((*seq, folds.last().copied()?))).collect();
        let wrong = chains::check(objects, vm, listing.manifests.keys().copied(), &folds).await?;
        let taint = Taint::default();
        let mut walk = Walk { objects, vm, listing: &listing, wrong, chain, taint };
        for generation in &listing.generations {
            report.objects += 1;
            if let Err(error) = read_generation(objects.as_ref(), vm, *generation).await {
                let object = paths::generation(vm, *generation);
                let what = format!("{}; its name, which is what counts, is unharmed", error.what());
                report.findings.push(Finding {
                    vm: Some(vm),
                    point: None,
                    object,
                    what,
                    affects: Vec::new(),
                });
            }
        }
        for (seq, len) in &listing.manifests {
            report.objects += 1;
            report.bytes += len;
            walk.point(*seq, &mut report, |done_bytes| progress(VerifyProgress { done_bytes, total_bytes }))
                .await?;
        }
    }
    Ok(report)
}

struct Walk<'a> {
    objects: &'a Arc<dyn Objects>,
    vm: VmId,
    listing: &'a Listing,
    /// Pages that do not become what they were, by point.
    wrong: BTreeMap<Seq, WrongPages>,
    chain: ChainWalk,
    taint: Taint,
}

/// Which findings the images of the points so far run through.
#[derive(Default)]
struct Taint {
    points: BTreeMap<Seq, BTreeMap<ImageKey, Vec<usize>>>,
    /// The point before, unless it is unknown what it was.
    last: Option<Seq>,
    /// Findings that everything not complete in itself inherits.
    gap: Vec<usize>,
}

/// What is wrong with one pack, and with which image numbers of its point.
struct PackDamage {
    what: String,
    harmed: Harmed,
}

enum Harmed {
    All,
    Images(BTreeSet<u16>),
}

impl Walk<'_> {
    async fn point(
        &mut self,
        seq: Seq,
        report: &mut VerifyReport,
        mut progress: impl FnMut(u64),
    ) -> Result<(), StoreError> {
        let object = paths::manifest(self.vm, seq);
        let fold = self.listing.folds.get(&seq).and_then(|folds| folds.last().copied());
        let mut read = read_layer(self.objects.as_ref(), self.vm, seq, fold).await;
        let mut own: Vec<(usize, Harmed)> = Vec::new();
        if let (Err(error), Some(no)) = (&read, fold) {
            // Whose fault it is: without the fold, the manifest alone.
            let without = read_layer(self.objects.as_ref(), self.vm, seq, None).await;
            if without.is_ok() {
                own.push((report.findings.len(), Harmed::All));
                report.findings.push(self.finding(None, paths::fold(self.vm, seq, no), error.what()));
            }
            read = without;
        }
        let layer = match read {
            Ok(layer) => layer,
            Err(error) => {
                self.chain.unreadable(seq);
                (self.taint.last, self.taint.gap) = (None, vec![report.findings.len()]);
                report.findings.push(self.finding(None, object, error.what()));
                return Ok(());
            }
        };
        report.points += 1;
        report.objects += u64::from(layer.fold.is_some());
        let at = PointRef { seq, point: layer.manifest.point };
        let packs = if own.is_empty() { layer.manifest.packs.as_slice() } else { &[] };
        for pack in packs {
            report.objects += 1;
            let damage = self.pack(&layer, pack, |read| {
                report.bytes += read;
                progress(report.bytes);
            });
            for PackDamage { what, harmed } in damage.await? {
                own.push((report.findings.len(), harmed));
                report.findings.push(self.finding(Some(at), layer.pack_path(pack.id), what));
            }
        }
        if let Some(WrongPages { images, pages, first: Some((object, what)) }) = self.wrong.remove(&seq) {
            own.push((report.findings.len(), Harmed::Images(images)));
            let what = format!("{pages} pages that are put together here are wrong; {what}");
            report.findings.push(self.finding(Some(at), object, what));
        }
        if let Some(what) = self.chain.follow(&layer, |_| None).loose {
            (self.taint.last, self.taint.gap) = (None, vec![report.findings.len()]);
            report.findings.push(self.finding(Some(at), object, what));
        }
        for finding in self.taint.carry(&layer, &own) {
            report.findings[finding].affects.push(at);
        }
        progress(report.bytes);
        Ok(())
    }

    fn finding(&self, point: Option<PointRef>, object: String, what: String) -> Finding {
        Finding { vm: Some(self.vm), point, object, what, affects: Vec::new() }
    }

    async fn pack(
        &self,
        layer: &Layer,
        pack: &PackRef,
        mut read: impl FnMut(u64),
    ) -> Result<Vec<PackDamage>, StoreError> {
        let all = |what: String| Ok(vec![PackDamage { what, harmed: Harmed::All }]);
        let there = if layer.fold.is_some() { &self.listing.fold_packs } else { &self.listing.packs };
        match there.get(&pack.id) {
            None => return all("missing".into()),
            Some(len) if *len != pack.len => {
                return all(format!("{len} bytes long instead of {}", pack.len));
            }
            Some(_) => {}
        }
        let path = layer.pack_path(pack.id);
        let entries = match read_index_at(self.objects.as_ref(), &path, pack).await {
            Ok(entries) => entries,
            Err(error) => return all(error.what()),
        };
        let mut check = PackCheck::default();
        let header = pack_header();
        match self.objects.get_range(&path, 0..header.len() as u64).await {
            Ok(bytes) => {
                check.digester.update(&bytes);
                if bytes != header.as_slice() {
                    check.spoiled = Some("its header is damaged".into());
                }
            }
            Err(error) => return all(error.what()),
        }
        read(header.len() as u64);
        let mut entries = entries.into_iter().peekable();
        while let Some(first) = entries.next() {
            let (start, mut end, mut batch) = (first.offset, end_of(&first), vec![first]);
            while let Some(next) = entries.next_if(|next| end_of(next) - start <= SEGMENT) {
                end = end_of(&next);
                batch.push(next);
            }
            let bytes = match self.objects.get_range(&path, start..end).await {
                Ok(bytes) => bytes,
                Err(error) => return all(error.what()),
            };
            let checked = tokio::task::spawn_blocking(move || {
                check.frames(&batch, &bytes);
                check
            });
            check = checked.await.map_err(|error| StoreError::disk(&path, "verifying", error))?;
            read(end - start);
        }
        match self.objects.get_range(&path, pack.index_offset..pack.len).await {
            Ok(bytes) => check.digester.update(&bytes),
            Err(error) => return all(error.what()),
        }
        read(pack.len - pack.index_offset);
        Ok(check.finish(pack))
    }
}

/// What checking the frames of one pack found so far.
#[derive(Default)]
struct PackCheck {
    digester: Digester,
    bad_frames: u64,
    first_bad: Option<(u64, String)>,
    harmed: BTreeSet<u16>,
    /// Damage that no restore would notice, because it is not in what restore reads.
    spoiled: Option<String>,
}

impl PackCheck {
    fn frames(&mut self, entries: &[IndexEntry], bytes: &[u8]) {
        self.digester.update(bytes);
        let start = entries.first().map_or(0, |entry| entry.offset);
        let mut raw = Vec::new();
        for entry in entries {
            let from = (entry.offset - start) as usize;
            let (head, body) =
                bytes[from..(end_of(entry) - start) as usize].split_at(entry.head.encoded_len());
            // An index entry is the frame's offset and then its head, as it stands in the pack.
            if encode_index(std::slice::from_ref(entry))[size_of::<u64>()..] != *head {
                let what = || format!("the copy of a frame's head at byte {} is damaged", entry.offset);
                self.spoiled.get_or_insert_with(what);
            }
            if let Err(error) = frame::open(&entry.head, body, &mut raw) {
                self.bad_frames += 1;
                self.harmed.insert(entry.head.image);
                self.first_bad.get_or_insert_with(|| (entry.body_offset(), error.to_string()));
            }
        }
    }

    fn finish(self, pack: &PackRef) -> Vec<PackDamage> {
        if let Some((offset, why)) = self.first_bad {
            let (bad, frames) = (self.bad_frames, pack.frames);
            let what = format!("{bad} of {frames} frames are damaged, the first at byte {offset}: {why}");
            return vec![PackDamage { what, harmed: Harmed::Images(self.harmed) }];
        }
        if self.digester.finish() == pack.file_digest && self.spoiled.is_none() {
            return Vec::new();
        }
        let what = self.spoiled.unwrap_or_else(|| "bytes between or within its frames are damaged".into());
        let what = format!("{what}, but every page in it is whole");
        vec![PackDamage { what, harmed: Harmed::Images(BTreeSet::new()) }]
    }
}

impl Taint {
    /// Goes on to the next point; returns the findings that it runs through.
    fn carry(&mut self, layer: &Layer, own: &[(usize, Harmed)]) -> BTreeSet<usize> {
        let manifest = &layer.manifest;
        let below = match (layer.fold, layer.base) {
            (None, _) => self.last,
            (Some(_), base) => base.map(|base| base.seq),
        };
        let below = below.and_then(|below| self.points.get(&below));
        let mut images = BTreeMap::new();
        for image in &manifest.meta.images {
            let key = (image.kind, image.name.clone());
            let mut findings = match (image.full, below.and_then(|below| below.get(&key))) {
                (true, _) => Vec::new(),
                (false, Some(inherited)) => inherited.clone(),
                (false, None) => self.gap.clone(),
            };
            findings.extend(own.iter().filter(|(_, harmed)| harmed.concerns(image)).map(|(at, _)| *at));
            images.insert(key, findings);
        }
        self.gap.clear();
        self.last = Some(manifest.seq);
        let findings = images.values().flatten().copied().collect();
        self.points.insert(manifest.seq, images);
        findings
    }
}

impl Harmed {
    fn concerns(&self, image: &Image) -> bool {
        match self {
            Self::All => true,
            Self::Images(numbers) => numbers.contains(&image.no),
        }
    }
}

fn end_of(entry: &IndexEntry) -> u64 {
    entry.body_offset() + u64::from(entry.head.body_len)
}

/// Bytes of a pack that are read at once.
const SEGMENT: u64 = 8 << 20;
