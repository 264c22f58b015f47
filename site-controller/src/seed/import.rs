//! Reads disks into the store as one point: what differs from the newest point, or all that is not zero.
//! Promises: of a page that is left out the store holds the very content, by a keyed fingerprint of 128 bits; all images are
//! held open from the first byte to the last, so that they are of one instant; the memory of the point before is carried
//! along by reference, so that an agent can compare with it. What fails leaves nothing. Called by `seed` only.

use super::{
    Order, SeedError, SeedProgress, SeedReport, SeededDisk, Seeder, disks, image::Image as DiskImage,
};
use crate::{
    restore::{Plan, Reader, fingerprints::ImageFingerprints},
    store::{Head, OpenPoint},
};
use bytes::Bytes;
use lifeboat::{
    chunk::fingerprint::{FingerprintKey, REGION_PAGES, RegionTable},
    fault,
    format::{
        frame::{Frame, RUNS_MAX},
        manifest::{Consistency, Image, ImageKind, PointMeta, PointStats, blob},
    },
    id::PointId,
    nbd::REGION,
    page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun, is_zero, pages_for},
};
use std::{io, sync::Arc};

pub(super) async fn run(
    seeder: &Seeder,
    order: &Order,
    mut tell: impl FnMut(SeedProgress) + Send,
) -> Result<SeedReport, SeedError> {
    disks::check(&order.disks)?;
    let store = &seeder.store;
    let head = store.latest(order.vm).await.filter(Head::is_whole);
    let base = match &head {
        Some(head) => {
            let plan = Plan::of(store, order.vm, head.seq).await?;
            Some(Reader::new(store.objects().clone(), Arc::new(plan)))
        }
        None => None,
    };
    check_covers(base.as_ref(), order)?;
    let mut images = Vec::with_capacity(order.disks.len());
    for disk in &order.disks {
        images.push(DiskImage::open(disk, &seeder.run_dir).await?);
    }
    let point = PointId::from_bytes(*uuid::Uuid::new_v4().as_bytes());
    let generation = store.generation(order.vm).await;
    let parent = head.as_ref().map(|head| head.point);
    let open = store.open_point(order.vm, &order.name, generation, point, parent).await?;
    fault::point("seed.begun");
    let mut work = Work { seeder, order, base: base.as_ref(), open: &open, packer: Packer::default() };
    let done = async {
        let (disks, meta) = work.read(&mut images, &mut tell).await?;
        // Whoever started it meanwhile would have had to get past QEMU's locks; block devices have none.
        seeder.check_off(order.vm).await?;
        fault::point("seed.read");
        let committed = open.commit(meta, work.packer.next).await?;
        fault::point("seed.committed");
        let (vm, name) = (order.vm, order.name.clone());
        Ok(SeedReport { vm, name, point, seq: committed.seq, over: parent, disks })
    };
    let done = done.await;
    if done.is_err() {
        open.abort().await;
    }
    if let Ok(report) = &done {
        let changed: u64 = report.disks.iter().map(|disk| disk.changed_bytes).sum();
        tracing::info!(vm = %order.vm, %point, seq = report.seq.0, changed, "disks were taken in as a seed");
    }
    done
}

/// A seed is the whole VM's: a disk that is left out would be of another instant, or missing.
fn check_covers(base: Option<&Reader>, order: &Order) -> Result<(), SeedError> {
    let named = |target: &str| order.disks.iter().any(|disk| disk.target == target);
    let held = base.into_iter().flat_map(|base| base.plan().images());
    let mut held = held.map(|planned| &planned.image).filter(|image| image.kind == ImageKind::Disk);
    match held.find(|image| !named(&image.name)) {
        Some(image) => {
            let why =
                format!("the newest point has a disk {}, and the seed has none; name all disks", image.name);
            Err(SeedError::Disks(why))
        }
        None => Ok(()),
    }
}

/// One seed under way.
struct Work<'a> {
    seeder: &'a Seeder,
    order: &'a Order,
    base: Option<&'a Reader>,
    open: &'a OpenPoint,
    packer: Packer,
}

impl Work<'_> {
    async fn read(
        &mut self,
        images: &mut [DiskImage],
        tell: &mut (impl FnMut(SeedProgress) + Send),
    ) -> Result<(Vec<SeededDisk>, PointMeta), SeedError> {
        let mut told: Vec<Image> = Vec::new();
        for planned in self.base.iter().flat_map(|base| base.plan().images()) {
            if planned.image.kind == ImageKind::Ram {
                told.push(Image { no: number(&told), full: false, ..planned.image.clone() });
            }
        }
        let mut disks = Vec::new();
        for (disk, image) in self.order.disks.iter().zip(images) {
            let (target, bytes) = (disk.target.clone(), image.bytes());
            let known = self.fingerprints(&target, tell).await?;
            let (no, full) = (number(&told), known.is_none());
            told.push(Image { no, kind: ImageKind::Disk, name: target.clone(), bytes, full });
            let changed_bytes = self.read_disk(no, image, known, &target, tell).await?;
            disks.push(SeededDisk { target, path: disk.path.clone(), bytes, changed_bytes });
        }
        for (name, text) in self.blobs(&disks).await? {
            let (no, kind, bytes) = (number(&told), ImageKind::Blob, text.len() as u64);
            told.push(Image { no, kind, name: name.into(), bytes, full: true });
            self.packer.known(no, false);
            self.pack(0, Some(text.into()), pages_for(bytes), None).await?;
            self.finish().await?;
        }
        let disk_changed_bytes = disks.iter().map(|disk| disk.changed_bytes).sum();
        let stats = PointStats { disk_changed_bytes, ..PointStats::default() };
        let cut_at = self.seeder.store.clock().now();
        Ok((
            disks,
            PointMeta {
                cut_at,
                images: told,
                consistency: Consistency::Crash,
                was_running: false,
                stats,
                cut: None,
            },
        ))
    }

    /// Of the disk as the store holds it; `None` where it does not.
    async fn fingerprints(
        &self,
        target: &str,
        tell: &mut (impl FnMut(SeedProgress) + Send),
    ) -> Result<Option<ImageFingerprints>, SeedError> {
        let Some(base) = self.base.filter(|base| base.plan().image(ImageKind::Disk, target).is_some()) else {
            return Ok(None);
        };
        let disk = format!("{target}, as the store holds it");
        let progress = |at: crate::restore::Progress| {
            let (done_bytes, total_bytes) = (at.done_bytes, at.total_bytes);
            tell(SeedProgress { disk: disk.clone(), done_bytes, total_bytes });
        };
        let dir = &self.seeder.scratch_dir;
        Ok(Some(ImageFingerprints::read(base, ImageKind::Disk, target, dir, progress).await?))
    }

    /// Returns how many bytes differed.
    async fn read_disk(
        &mut self,
        no: u16,
        image: &mut DiskImage,
        known: Option<ImageFingerprints>,
        target: &str,
        tell: &mut (impl FnMut(SeedProgress) + Send),
    ) -> Result<u64, SeedError> {
        let total_bytes = image.bytes();
        self.packer.known(no, known.is_some());
        let known = known.map(Arc::new);
        let mut at = 0;
        while let Some(bytes) = image.next_region().await? {
            let pages = pages_for((total_bytes - at * REGION).min(REGION));
            self.pack(at, bytes, pages, known.clone()).await?;
            at += 1;
            let disk = target.to_owned();
            tell(SeedProgress { disk, done_bytes: (at * REGION).min(total_bytes), total_bytes });
            fault::point("seed.region");
        }
        self.finish().await?;
        Ok(std::mem::take(&mut self.packer.changed) * PAGE as u64)
    }

    /// Takes one region in, where it can be compared and packed without holding anybody up.
    async fn pack(
        &mut self,
        region: u64,
        bytes: Option<Bytes>,
        pages: u64,
        known: Option<Arc<ImageFingerprints>>,
    ) -> Result<(), SeedError> {
        let mut packer = std::mem::take(&mut self.packer);
        let packed = tokio::task::spawn_blocking(move || {
            let known = match known {
                Some(known) => Some((known.key(), known.table(region).map_err(SeedError::Died)?)),
                None => None,
            };
            let frames =
                packer.region(region * REGION_PAGES as u64, pages, bytes.as_deref(), known.as_ref())?;
            Ok::<_, SeedError>((packer, frames))
        });
        let (packer, frames) = packed.await.map_err(|panic| SeedError::Died(io::Error::other(panic)))??;
        self.packer = packer;
        self.append(frames).await
    }

    async fn finish(&mut self) -> Result<(), SeedError> {
        let frames = self.packer.finish()?;
        self.append(frames).await
    }

    async fn append(&self, frames: Vec<Frame>) -> Result<(), SeedError> {
        for frame in frames {
            self.open.append(frame).await?;
        }
        Ok(())
    }

    /// What a replica would be made of, and what tells that this is a seed.
    async fn blobs(&self, disks: &[SeededDisk]) -> Result<Vec<(&'static str, Vec<u8>)>, SeedError> {
        let mut blobs = Vec::new();
        match (&self.order.definition, self.base) {
            (Some(xml), _) => {
                blobs.push((blob::DOMAIN_XML, xml.clone().into_bytes()));
                blobs.push((blob::DEFINITION_XML, xml.clone().into_bytes()));
            }
            (None, Some(base)) => {
                for name in [blob::DOMAIN_XML, blob::DEFINITION_XML] {
                    if base.plan().image(ImageKind::Blob, name).is_some() {
                        blobs.push((name, base.read_whole(ImageKind::Blob, name, XML_MAX).await?));
                    }
                }
            }
            (None, None) => {}
        }
        let told = serde_json::to_vec(disks).map_err(|error| SeedError::Packing(error.to_string()))?;
        blobs.push((blob::SEED, told));
        Ok(blobs)
    }
}

fn number(images: &[Image]) -> u16 {
    u16::try_from(images.len()).unwrap_or(u16::MAX)
}

/// Turns pages that differ into frames.
#[derive(Default)]
struct Packer {
    image: u16,
    /// Zeros are told, because what lies below may be something else.
    over: bool,
    runs: Vec<PageRun>,
    raw: Vec<u8>,
    zeros: Vec<PageRun>,
    /// Pages that differed.
    changed: u64,
    /// Number of the next frame.
    next: u32,
}

impl Packer {
    /// From here on it is about this image.
    fn known(&mut self, image: u16, over: bool) {
        (self.image, self.over) = (image, over);
    }

    fn region(
        &mut self,
        first: u64,
        pages: u64,
        bytes: Option<&[u8]>,
        known: Option<&(FingerprintKey, RegionTable)>,
    ) -> Result<Vec<Frame>, SeedError> {
        let mut frames = Vec::new();
        for at in 0..pages {
            let from = at as usize * PAGE;
            let page = bytes.map_or(&[][..], |bytes| &bytes[from..bytes.len().min(from + PAGE)]);
            let zero = is_zero(page);
            let same = match known {
                Some((key, table)) => table.get(at as usize) == Some(&key.page(page)),
                None => zero,
            };
            if same {
                continue;
            }
            self.changed += 1;
            if zero {
                PageRun::push_page(&mut self.zeros, first + at);
                if self.zeros.len() == RUNS_MAX {
                    frames.push(self.seal_zeros()?);
                }
                continue;
            }
            PageRun::push_page(&mut self.runs, first + at);
            self.raw.extend_from_slice(page);
            // The image may end within its last page.
            self.raw.resize(self.raw.len().next_multiple_of(PAGE), 0);
            if self.raw.len() == GROUP_PAGES * PAGE {
                frames.push(self.seal_pages()?);
            }
        }
        Ok(frames)
    }

    fn finish(&mut self) -> Result<Vec<Frame>, SeedError> {
        let mut frames = Vec::new();
        if !self.raw.is_empty() {
            frames.push(self.seal_pages()?);
        }
        if self.over && !self.zeros.is_empty() {
            frames.push(self.seal_zeros()?);
        }
        Ok(frames)
    }

    fn seal_pages(&mut self) -> Result<Frame, SeedError> {
        let content = Content::Bytes(std::mem::take(&mut self.raw).into());
        let runs = std::mem::take(&mut self.runs);
        self.seal(PageGroup { image: self.image, runs, content })
    }

    fn seal_zeros(&mut self) -> Result<Frame, SeedError> {
        let runs = std::mem::take(&mut self.zeros);
        self.seal(PageGroup { image: self.image, runs, content: Content::Zero })
    }

    fn seal(&mut self, group: PageGroup) -> Result<Frame, SeedError> {
        let sealed = Frame::seal(self.next, &group, LEVEL);
        let frame = sealed.map_err(|error| SeedError::Packing(error.to_string()))?;
        self.next += 1;
        Ok(frame)
    }
}

/// zstd's level: as for folds.
const LEVEL: i32 = 1;
/// A domain's XML is far shorter.
const XML_MAX: u64 = 16 << 20;
