//! Pages with real content: what the programs of this build are made of (code, tables, text, debug information), as a
//! guest's memory holds them in its page cache. Pages of zeros are left out, because they cost nothing anywhere.

use anyhow::{Context, Result};
use bytes::Bytes;
use lifeboat::page::{Content, GROUP_PAGES, PAGE, PageGroup, PageRun, is_zero};
use std::fs;

/// Groups of pages as the agent makes them.
pub struct Corpus {
    raw: Bytes,
}

impl Corpus {
    pub fn of_programs() -> Result<Self> {
        let mut raw = Vec::new();
        for name in ["lifeboat-site-controller", "lifeboat-agent", "lifeboat"] {
            let path = rig::binary(name)?;
            let file = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            file.chunks_exact(PAGE)
                .filter(|page| !is_zero(page))
                .for_each(|page| raw.extend_from_slice(page));
        }
        raw.truncate(MOST);
        Ok(Self { raw: raw.into() })
    }

    pub fn bytes(&self) -> u64 {
        self.raw.len() as u64
    }

    /// The bytes of each group.
    pub fn chunks(&self) -> impl Iterator<Item = Bytes> {
        let size = GROUP_PAGES * PAGE;
        (0..self.raw.len()).step_by(size).map(move |at| self.raw.slice(at..self.raw.len().min(at + size)))
    }

    /// The same as changed pages of image `image`, from its first page on.
    pub fn groups(&self, image: u16) -> impl Iterator<Item = PageGroup> {
        self.chunks().enumerate().map(move |(at, bytes)| {
            let pages = (bytes.len() / PAGE) as u32;
            let runs = vec![PageRun::new((at * GROUP_PAGES) as u64, pages)];
            PageGroup { image, runs, content: Content::Bytes(bytes) }
        })
    }
}

const MOST: usize = 192 << 20;
