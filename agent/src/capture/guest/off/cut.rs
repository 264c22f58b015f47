//! A point of a guest that is off. Promises: everything is read before the instant, and whoever has it started meanwhile is
//! neither waited for nor held up: what was read is then worth nothing, and the point is lost. At the instant it is seen that
//! what was read stands there still; one that meets other guests is off until all of them stand.

use super::{AtRest, STARTED, Stood};
use crate::capture::{
    disk::DiskImage,
    guest::{Owned, blobs::Blob, failed, images},
    meeting::Meeting,
    source::{CaptureError, Cut},
};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use lifeboat::{
    fault,
    format::manifest::{Consistency, Image, PointMeta, PointStats, blob},
    hypervisor::libvirt::{DomainEvent, Happened},
    id::PointId,
    nbd::{Beside, ImageFile, REGION},
    page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun, is_zero},
};
use serde_json::json;
use std::{collections::VecDeque, sync::Arc};
use tokio::sync::broadcast;

pub struct OffCut {
    state: Owned,
    point: PointId,
    stood: Arc<Stood>,
    sizes: Vec<(String, u64)>,
    images: Vec<Image>,
    /// Disks that are still to be read, and the region of the first one that comes next.
    unread: VecDeque<(u16, ImageFile)>,
    region: u64,
    ready: VecDeque<PageGroup>,
    events: broadcast::Receiver<DomainEvent>,
    blobs: Option<VecDeque<PageGroup>>,
    disk_bytes: u64,
}

impl OffCut {
    pub async fn open(state: Owned, point: PointId, stood: Stood) -> Result<Self, CaptureError> {
        let (events, run_dir) = (state.hypervisor.subscribe(), state.settings.run_dir.clone());
        let (mut unread, mut sizes) = (VecDeque::new(), Vec::new());
        if let Some(known) = &stood.unchanged {
            sizes.clone_from(known);
        } else {
            for disk in &stood.disks {
                let opened = ImageFile::open(&disk.path, &disk.format, Beside::Writers, &run_dir).await;
                let told = |error| failed(format!("disk {}, {}: {error}", disk.target, disk.path.display()));
                let image = opened.map_err(told)?;
                sizes.push((disk.target.clone(), image.bytes()));
                let no = u16::try_from(unread.len()).map_err(|_| failed("the guest has too many disks"))?;
                unread.push_back((no, image));
            }
        }
        let images = images::number(&[], disk_images(&sizes, stood.unchanged.is_none()))?;
        let (ready, stood) = (VecDeque::new(), Arc::new(stood));
        let (region, blobs, disk_bytes) = (0, None, 0);
        Ok(Self { state, point, stood, sizes, images, unread, region, ready, events, blobs, disk_bytes })
    }

    /// That it was started is told at once; that it was, and was not told, shows at the instant.
    fn give_way(&mut self) -> Result<(), CaptureError> {
        while let Ok(event) = self.events.try_recv() {
            let ours = event.vm == Some(self.state.settings.vm);
            if ours && matches!(event.happened, Happened::Started | Happened::Undefined) {
                self.unread.clear();
                return Err(failed(STARTED));
            }
        }
        Ok(())
    }

    async fn is_still_so(&mut self) -> Result<(), CaptureError> {
        let stood = self.stood.clone();
        tokio::task::spawn_blocking(move || stood.is_still_so()).await.map_err(failed)?
    }

    fn meta(
        &self,
        cut_at: lifeboat::units::UnixMs,
    ) -> Result<(PointMeta, VecDeque<PageGroup>), CaptureError> {
        let xml = Bytes::from(self.stood.xml.clone());
        let told = json!({ "wanted": self.stood.wanted }).to_string();
        let texts = [
            (blob::DOMAIN_XML, xml.clone()),
            (blob::DEFINITION_XML, xml),
            (blob::AT_REST, Bytes::from(told)),
        ];
        let mut images = self.images.clone();
        let mut groups = VecDeque::new();
        for (name, bytes) in texts {
            let no = u16::try_from(images.len()).map_err(|_| failed("the guest has too many images"))?;
            let blob = Blob { no, name, bytes };
            images.push(blob.image());
            groups.extend(blob.groups());
        }
        let meta = PointMeta {
            cut_at,
            images,
            consistency: Consistency::Crash,
            was_running: !self.stood.wanted,
            stats: PointStats::default(),
            cut: None,
        };
        meta.check().map_err(failed)?;
        Ok((meta, groups))
    }
}

#[async_trait]
impl Cut for OffCut {
    fn is_off(&self) -> bool {
        true
    }

    fn images(&self) -> Vec<Image> {
        self.images.clone()
    }

    async fn before(&mut self) -> Result<Option<PageGroup>, CaptureError> {
        loop {
            if let Some(group) = self.ready.pop_front() {
                self.disk_bytes += group.pages() * PAGE as u64;
                return Ok(Some(group));
            }
            self.give_way()?;
            let Some((no, image)) = self.unread.front_mut() else { return Ok(None) };
            let no = *no;
            fault::point("off.reading");
            match image.next_region().await.map_err(failed)? {
                Some(content) => {
                    let first = self.region * (REGION / PAGE as u64);
                    self.region += 1;
                    if let Some(content) = content {
                        self.ready = groups(no, first, &content);
                    }
                }
                None => {
                    self.unread.pop_front();
                    self.region = 0;
                }
            }
        }
    }

    async fn barrier(&mut self, meeting: Option<Arc<Meeting>>) -> Result<PointMeta, CaptureError> {
        fault::point("off.read");
        self.give_way()?;
        self.is_still_so().await?;
        let mut cut_at = self.state.clock.now();
        if let Some(meeting) = meeting {
            cut_at = meeting.at;
            tokio::task::spawn_blocking(move || {
                meeting.stands(false);
                meeting.wait()
            })
            .await
            .map_err(failed)?;
            self.is_still_so().await?;
        }
        let (meta, groups) = self.meta(cut_at)?;
        self.blobs = Some(groups);
        Ok(meta)
    }

    async fn after(&mut self) -> Result<Option<PageGroup>, CaptureError> {
        let none = || failed("pages after the instant were asked for before it");
        Ok(self.blobs.as_mut().ok_or_else(none)?.pop_front())
    }

    fn changed(&self) -> (u64, u64) {
        (0, self.disk_bytes)
    }

    async fn sent(mut self: Box<Self>) -> Result<(), CaptureError> {
        if self.blobs.as_ref().is_none_or(|blobs| !blobs.is_empty()) {
            return Err(failed("a point that was not handed over whole can't be sent"));
        }
        let (stands, wanted) = (self.stood.stands.clone(), self.stood.wanted);
        let at_rest = AtRest { point: self.point, stands, disks: self.sizes.clone(), wanted };
        self.state.resting.sent(at_rest);
        Ok(())
    }

    /// What stands there is owed as long as no point of it is known.
    async fn put_back(self: Box<Self>) -> Result<(), CaptureError> {
        Ok(())
    }
}

fn disk_images(sizes: &[(String, u64)], full: bool) -> Vec<DiskImage> {
    let image = |(target, bytes): &(String, u64)| DiskImage { target: target.clone(), bytes: *bytes, full };
    sizes.iter().map(image).collect()
}

/// The pages of a region that are not zero, from page `first` on.
fn groups(image: u16, first: u64, content: &Bytes) -> VecDeque<PageGroup> {
    let mut groups = VecDeque::new();
    for (at, part) in content.chunks(GROUP_PAGES * PAGE).enumerate() {
        let (mut runs, mut bytes) = (Vec::new(), BytesMut::new());
        for (page, found) in part.chunks(PAGE).enumerate().filter(|(_, found)| !is_zero(found)) {
            PageRun::push_page(&mut runs, first + (at * GROUP_PAGES + page) as u64);
            bytes.extend_from_slice(found);
        }
        // The image may end within its last page.
        bytes.resize(bytes.len().next_multiple_of(PAGE), 0);
        if !runs.is_empty() {
            groups.push_back(PageGroup { image, runs, content: Content::Bytes(bytes.freeze()) });
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_region_the_pages_that_are_not_zero_are_handed_over_with_their_places() {
        let mut content = vec![0u8; 70 * PAGE + 100];
        for page in [0, 1, 5, 63, 64, 69] {
            content[page * PAGE + 9] = page as u8 + 1;
        }
        content[70 * PAGE + 99] = 7;
        let found = groups(3, 512, &Bytes::from(content));
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].runs, [PageRun::new(512, 2), PageRun::new(517, 1), PageRun::new(575, 1)]);
        assert_eq!(found[1].runs, [PageRun::new(576, 1), PageRun::new(581, 2)]);
        for group in &found {
            let Content::Bytes(bytes) = &group.content else { panic!("zeros") };
            assert_eq!(bytes.len() as u64, group.pages() * PAGE as u64);
            assert_eq!(group.image, 3);
        }
        let Content::Bytes(last) = &found[1].content else { panic!("zeros") };
        assert_eq!((last[9], last[PAGE + 9], last[2 * PAGE + 99]), (65, 70, 7));
        assert!(groups(3, 0, &Bytes::from(vec![0u8; PAGE])).is_empty());
    }
}
