//! The small state of a point (XML, machine configuration, device state) as images made of pages.

use bytes::Bytes;
use lifeboat::{
    format::manifest::{Image, ImageKind},
    page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun},
};
use std::collections::VecDeque;

/// One blob and the number of its image.
pub struct Blob {
    pub no: u16,
    pub name: &'static str,
    pub bytes: Bytes,
}

impl Blob {
    pub fn image(&self) -> Image {
        Image {
            no: self.no,
            kind: ImageKind::Blob,
            name: self.name.into(),
            bytes: self.bytes.len() as u64,
            full: true,
        }
    }

    /// Its pages; the last one is filled up with zeros.
    pub fn groups(&self) -> VecDeque<PageGroup> {
        let starts = (0u64..).step_by(GROUP_PAGES);
        let group = |(first, part): (u64, &[u8])| {
            let mut bytes = part.to_vec();
            bytes.resize(part.len().next_multiple_of(PAGE), 0);
            let runs = vec![PageRun::new(first, (bytes.len() / PAGE) as u32)];
            PageGroup { image: self.no, runs, content: Content::Bytes(Bytes::from(bytes)) }
        };
        starts.zip(self.bytes.chunks(GROUP_PAGES * PAGE)).map(group).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_of_any_length_becomes_whole_pages_in_order() {
        for len in [0, 1, PAGE, GROUP_PAGES * PAGE, GROUP_PAGES * PAGE + 1] {
            let bytes: Vec<u8> = (0..len).map(|at| at as u8 | 1).collect();
            let blob = Blob { no: 7, name: "x", bytes: bytes.clone().into() };
            let mut joined = Vec::new();
            for group in blob.groups() {
                assert_eq!((group.image, group.runs[0].first as usize * PAGE), (7, joined.len()));
                let Content::Bytes(part) = group.content else { panic!("a blob is bytes") };
                assert_eq!(part.len() as u64, group.runs[0].bytes());
                joined.extend_from_slice(&part);
            }
            assert_eq!(joined.len(), len.next_multiple_of(PAGE));
            assert!(joined.starts_with(&bytes));
            assert_eq!(blob.image().bytes, len as u64);
        }
    }
}
