//! Single pages as they were at some older point: where references lead, and what lies below a frozen layer's words.
//! Promises: a reference is followed from its own point backwards, whatever newer points made of that RAM; it may lead only
//! to a RAM image of the same point, within its size; memory grows with the pages wanted, and what they are made of.
//! Called by `plan`. [`read_refs`] reads the lists themselves.

use crate::{
    restore::{
        RestoreError,
        planned::{PackIndex, RefsBySeq},
    },
    store::{Objects, PointRef, StoreError},
};
use lifeboat::{
    format::{
        frame::{self, Codec, FrameHead},
        manifest::{Image, ImageKind, Manifest},
        refs::{PageRef, RefView},
    },
    page::{PageRun, pages_for},
};
use std::collections::{BTreeMap, BTreeSet};

/// Pages that are waited for, while points are laid under each other.
#[derive(Debug, Default)]
pub(super) struct Sources {
    images: Vec<SourceImage>,
    /// Per chain, the frames that make its page: the newest first, frame and place in it.
    chains: BTreeMap<u32, Vec<(u32, u32)>>,
    next: u32,
}

#[derive(Debug)]
struct SourceImage {
    kind: ImageKind,
    name: String,
    /// Its number in the point that is being laid, if one is.
    no: Option<u16>,
    /// Page and chain.
    wanted: BTreeSet<(u64, u32)>,
}

impl Sources {
    /// The next older point is to be laid.
    pub fn enter(&mut self, manifest: &Manifest) -> Result<(), String> {
        self.images.retain(|image| !image.wanted.is_empty());
        for image in &mut self.images {
            let here = manifest.image(image.kind, &image.name);
            let here = here.ok_or_else(|| format!("point {} has no image `{}`", manifest.seq, image.name))?;
            image.no = Some(here.no);
            // What lay beyond a smaller size was zero when it came back.
            drop(image.wanted.split_off(&(pages_for(here.bytes), 0)));
        }
        Ok(())
    }

    /// Follows `refs`, which stand in `frame` from its page `raw_page` on; returns the first one's chain.
    pub fn follow(
        &mut self,
        manifest: &Manifest,
        frame: u32,
        raw_page: u32,
        refs: &[PageRef],
    ) -> Result<u32, String> {
        let first = self.next;
        for (at, to) in (raw_page..).zip(refs) {
            let chain = self.chain(vec![(frame, at)])?;
            self.lead(manifest, *to, chain)?;
        }
        Ok(first)
    }

    /// Waits for what the layers below make of a page; returns its chain.
    pub fn want(&mut self, image: &Image, page: u64) -> Result<u32, String> {
        let chain = self.chain(Vec::new())?;
        self.image(image, None).wanted.insert((page, chain));
        Ok(chain)
    }

    /// Whether a frame of the next older layer, in which its image is `here`, holds a page that is waited for.
    pub fn want_of(&self, here: &Image, head: &FrameHead) -> bool {
        let image = self.images.iter().find(|image| image.kind == here.kind && image.name == here.name);
        image.is_some_and(|image| {
            let within = |run: &PageRun| (run.first, 0)..(run.end().unwrap_or(run.first), 0);
            head.runs.iter().any(|run| image.wanted.range(within(run)).next().is_some())
        })
    }

    fn chain(&mut self, links: Vec<(u32, u32)>) -> Result<u32, String> {
        let chain = self.next;
        self.next = chain.checked_add(1).ok_or("too many references")?;
        self.chains.insert(chain, links);
        Ok(chain)
    }

    fn image(&mut self, image: &Image, no: Option<u16>) -> &mut SourceImage {
        let known = |known: &SourceImage| known.kind == image.kind && known.name == image.name;
        let at = self.images.iter().position(known).unwrap_or_else(|| {
            let (kind, name) = (image.kind, image.name.clone());
            self.images.push(SourceImage { kind, name, no, wanted: BTreeSet::new() });
            self.images.len() - 1
        });
        &mut self.images[at]
    }

    /// A chain goes on where a reference leads.
    fn lead(&mut self, manifest: &Manifest, to: PageRef, chain: u32) -> Result<(), String> {
        let image = manifest.meta.images.iter().find(|image| image.no == to.image);
        let image = image.filter(|image| image.kind == ImageKind::Ram && to.page < pages_for(image.bytes));
        let image = image.ok_or_else(|| {
            let (seq, PageRef { page, image, .. }) = (manifest.seq, to);
            format!("point {seq} refers to page {page} of image {image}, which is not there")
        })?;
        self.image(image, Some(image.no)).wanted.insert((to.page, chain));
        Ok(())
    }

    /// Lays one frame of the point; returns whether anything waits for it. `refs`: what it says, if it holds references.
    pub fn lay(
        &mut self,
        manifest: &Manifest,
        head: &FrameHead,
        frame: u32,
        refs: Option<&[PageRef]>,
    ) -> Result<bool, String> {
        let Some(at) = self.images.iter().position(|image| image.no == Some(head.image)) else {
            return Ok(false);
        };
        let (mut raw_page, mut shows) = (0u32, false);
        for run in &head.runs {
            let end = run.end().unwrap_or(run.first);
            let hit = self.images[at].wanted.range((run.first, 0)..(end, 0)).copied().collect::<Vec<_>>();
            for (page, chain) in hit {
                shows = true;
                let at_raw = raw_page.wrapping_add((page - run.first) as u32);
                if head.codec != Codec::Zero {
                    self.chains.entry(chain).or_default().push((frame, at_raw));
                }
                // Words leave open what is below them.
                if head.codec != Codec::Words {
                    self.images[at].wanted.remove(&(page, chain));
                }
                if head.codec == Codec::Refs {
                    let to = refs.and_then(|refs| refs.get(at_raw as usize)).copied();
                    let to =
                        to.ok_or_else(|| format!("references of point {} are not at hand", manifest.seq))?;
                    self.lead(manifest, to, chain)?;
                }
            }
            raw_page = raw_page.wrapping_add(run.count);
        }
        Ok(shows)
    }

    /// The point has been laid.
    pub fn leave(&mut self, manifest: &Manifest) {
        self.images.retain(|image| {
            let full = manifest.image(image.kind, &image.name).is_some_and(|here| here.full);
            !full && !image.wanted.is_empty()
        });
    }

    pub fn is_settled(&self) -> bool {
        self.images.iter().all(|image| image.wanted.is_empty())
    }

    /// Per chain, the frames that make its page.
    pub fn finish(self) -> BTreeMap<u32, Vec<(u32, u32)>> {
        self.chains
    }
}

/// Reads what the point's frames of references say, where it would show.
pub(super) async fn read_refs(
    objects: &dyn Objects,
    point: PointRef,
    would_show: impl Fn(&FrameHead) -> bool,
    manifest: &Manifest,
    packs: &[PackIndex],
) -> Result<RefsBySeq, RestoreError> {
    let mut read = RefsBySeq::new();
    for (pack, path, entries) in packs {
        let refs = entries.iter().filter(|entry| entry.head.codec == Codec::Refs);
        for entry in refs.filter(|entry| would_show(&entry.head)) {
            let start = entry.body_offset();
            let range = start..start + u64::from(entry.head.body_len);
            let damaged = |what: String| RestoreError::Damaged {
                point,
                image: images_name(manifest, entry.head.image),
                pack: *pack,
                written: PointRef { seq: manifest.seq, point: manifest.point },
                offset: start,
                what,
            };
            let body = objects.get_range(path, range).await.map_err(|error| match error {
                error @ (StoreError::Damaged { .. } | StoreError::Missing { .. }) => damaged(error.what()),
                other => other.into(),
            })?;
            let mut raw = Vec::new();
            frame::open(&entry.head, &body, &mut raw).map_err(|error| damaged(error.to_string()))?;
            let view = RefView::of(entry.head.pages() as usize, &raw);
            let view = view.map_err(|error| damaged(error.to_string()))?;
            read.insert(entry.head.seq, view.iter().collect());
        }
    }
    Ok(read)
}

fn images_name(manifest: &Manifest, no: u16) -> String {
    let image = manifest.meta.images.iter().find(|image| image.no == no);
    image.map_or_else(|| no.to_string(), |image| image.name.clone())
}
