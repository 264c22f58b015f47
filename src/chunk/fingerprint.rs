//! Fingerprints: short keyed digests by which two sides find out where their copies of an image differ.
//! A page has one, and so has a region of [`REGION_PAGES`] pages, made of its pages' fingerprints. Promises: zero pages
//! and zero regions have the fingerprint [`Fingerprint::ZERO`] and nothing else has; whoever does not know the key can't
//! prepare two pages that look the same. Used by the agent's resync and by the site that it asks.

use crate::{
    chunk::digest::Digest,
    page::{PAGE, is_zero},
};
use serde::{Deserialize, Serialize};
use std::fmt;

/// Pages in one region: 1 MiB. Their fingerprints fill one page.
pub const REGION_PAGES: usize = PAGE / Fingerprint::LEN;

/// 128 bits of a keyed blake3 digest.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint([u8; Self::LEN]);

impl Fingerprint {
    pub const LEN: usize = 16;
    pub const ZERO: Self = Self([0; Self::LEN]);

    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }
    pub const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The fingerprints of a region's pages.
pub type RegionTable = [Fingerprint; REGION_PAGES];

/// A random key, made anew for each comparison, so that no guest can know it when it writes.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct FingerprintKey([u8; 32]);

impl FingerprintKey {
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Of one page; a page that its image cuts short counts as filled up with zeros.
    pub fn page(&self, page: &[u8]) -> Fingerprint {
        if is_zero(page) {
            return Fingerprint::ZERO;
        }
        let padding = [0; PAGE];
        self.shorten(&[page, padding.get(page.len()..).unwrap_or_default()])
    }

    pub fn region(&self, pages: &RegionTable) -> Fingerprint {
        if pages.iter().all(|page| *page == Fingerprint::ZERO) {
            return Fingerprint::ZERO;
        }
        let mut bytes = [0; PAGE];
        for (place, page) in bytes.chunks_exact_mut(Fingerprint::LEN).zip(pages) {
            place.copy_from_slice(&page.0);
        }
        // Longer than a page, so that nothing is both.
        self.shorten(&[&bytes, b"region"])
    }

    fn shorten(&self, parts: &[&[u8]]) -> Fingerprint {
        let mut short = [0; Fingerprint::LEN];
        short.copy_from_slice(&Digest::keyed(&self.0, parts).as_bytes()[..Fingerprint::LEN]);
        // One digest in 2^128 would look like zeros.
        short[0] |= u8::from(short == [0; Fingerprint::LEN]);
        Fingerprint(short)
    }
}

impl fmt::Debug for FingerprintKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FingerprintKey(…)")
    }
}

const _: () = assert!(REGION_PAGES * Fingerprint::LEN == PAGE);

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: FingerprintKey = FingerprintKey::from_bytes([7; 32]);

    /// Both sides must agree on these for ever: a change is a new protocol version.
    #[test]
    fn golden_fingerprints() {
        let page = KEY.page(&[1; PAGE]);
        let mut table = [Fingerprint::ZERO; REGION_PAGES];
        table[3] = page;
        let golden = (format!("{page:?}"), format!("{:?}", KEY.region(&table)));
        assert_eq!(golden, (GOLDEN_PAGE.into(), GOLDEN_REGION.into()));
    }

    #[test]
    fn zeros_look_like_zeros_and_nothing_else_does() {
        assert_eq!(KEY.page(&[0; PAGE]), Fingerprint::ZERO);
        assert_eq!(KEY.page(&[]), Fingerprint::ZERO);
        assert_eq!(KEY.region(&[Fingerprint::ZERO; REGION_PAGES]), Fingerprint::ZERO);
        let mut page = [0; PAGE];
        page[PAGE - 1] = 1;
        assert_ne!(KEY.page(&page), Fingerprint::ZERO);
    }

    #[test]
    fn a_page_cut_short_is_one_filled_up_with_zeros_and_keys_tell_apart() {
        let mut page = [0; PAGE];
        page[..100].fill(9);
        assert_eq!(KEY.page(&page[..100]), KEY.page(&page));
        assert_ne!(KEY.page(&page[..99]), KEY.page(&page));
        assert_ne!(KEY.page(&page), FingerprintKey::from_bytes([8; 32]).page(&page));
    }

    const GOLDEN_PAGE: &str = "72d7be7fb956fdfe83a1db4f789738a1";
    const GOLDEN_REGION: &str = "b081bf82df50b88c49a7d1067ce1fbd6";
}
