//! Where the references of a point lead, as its frames arrive: checked against its images when it is committed.
//! Promises: a frame is unpacked and hashed before it is taken; a committed point refers only from disks and the like to
//! pages of its own RAM. Called by `commit`.

use crate::store::{
    error::{PointError, StoreError},
    paths,
};
use lifeboat::{
    format::{
        frame::{Codec, Frame, FrameError},
        manifest::{ImageKind, PointMeta},
        refs::RefView,
    },
    id::VmId,
    page::pages_for,
};
use std::collections::{BTreeMap, BTreeSet};
use tokio::sync::Semaphore;

/// Opens and so verifies `frame`, a large one on a thread of its own, of which there are as many as `verifying` says.
pub(super) async fn verified(
    verifying: &Semaphore,
    vm: VmId,
    frame: Frame,
) -> Result<(Frame, Leads), PointError> {
    if (frame.head.raw_len as usize) < APART_FROM {
        let leads = Leads::open(&frame)?;
        return Ok((frame, leads));
    }
    let _permit = verifying.acquire().await;
    let checked = tokio::task::spawn_blocking(move || Leads::open(&frame).map(|leads| (frame, leads))).await;
    let failed = |error| StoreError::disk(&paths::of_vm(vm), "verifying a frame", error);
    Ok(checked.map_err(failed)??)
}

#[derive(Debug, Default)]
pub(super) struct Leads {
    /// Numbers of the images that refer.
    from: BTreeSet<u16>,
    /// Per number of an image referred to, the highest page.
    to: BTreeMap<u16, u64>,
}

impl Leads {
    /// Opens and so verifies `frame`; says where it leads.
    pub fn open(frame: &Frame) -> Result<Self, FrameError> {
        let (mut raw, mut leads) = (Vec::new(), Self::default());
        frame.open(&mut raw)?;
        if frame.head.codec == Codec::Refs {
            leads.from.insert(frame.head.image);
            for to in RefView::of(frame.head.pages() as usize, &raw)?.iter() {
                let highest = leads.to.entry(to.image).or_default();
                *highest = to.page.max(*highest);
            }
        }
        Ok(leads)
    }

    pub fn add(&mut self, other: Self) {
        self.from.extend(other.from);
        for (image, page) in other.to {
            let highest = self.to.entry(image).or_default();
            *highest = page.max(*highest);
        }
    }

    pub fn check(&self, meta: &PointMeta) -> Result<(), String> {
        let image = |no: &u16| meta.images.iter().find(|image| image.no == *no);
        for no in &self.from {
            if image(no).is_some_and(|image| image.kind == ImageKind::Ram) {
                return Err(format!("image {no} is RAM, and refers to RAM"));
            }
        }
        for (no, page) in &self.to {
            let there = image(no).filter(|image| image.kind == ImageKind::Ram);
            if there.is_none_or(|image| *page >= pages_for(image.bytes)) {
                return Err(format!(
                    "a reference leads to page {page} of image {no}, which is no page of RAM"
                ));
            }
        }
        Ok(())
    }
}

/// Frames with fewer bytes of pages are verified where they are.
const APART_FROM: usize = 64 << 10;
