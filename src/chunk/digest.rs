//! The one home of blake3: identity and integrity of everything that is stored or sent. And the check of one page that
//! was put together from several frames.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A blake3 digest, 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Digest([u8; 32]);

impl Digest {
    pub const LEN: usize = 32;

    pub fn of(bytes: &[u8]) -> Self {
        Self(blake3::hash(bytes).into())
    }
    /// Digest of several parts as if they were one.
    pub fn of_parts(parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new();
        for part in parts {
            hasher.update(part);
        }
        Self(hasher.finalize().into())
    }
    /// The same under a key: nobody without it can tell what the digest of anything will be.
    pub fn keyed(key: &[u8; 32], parts: &[&[u8]]) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(key);
        for part in parts {
            hasher.update(part);
        }
        Self(hasher.finalize().into())
    }
    /// Whether both are the same, told in a time that says nothing of where they differ.
    pub fn is(&self, other: &Self) -> bool {
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// Check of what a page holds once it was put together. It finds a page put together over a wrong base, which is a
/// mistake and no attack: each frame involved has a [`Digest`] of its own, and whoever can write frames can write pages.
/// xxh3 of 64 bits: an eighth of what blake3 costs for one page.
pub fn page_check(page: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(page)
}

/// A digest of bytes that arrive piece by piece.
#[derive(Clone, Debug, Default)]
pub struct Digester(blake3::Hasher);

impl Digester {
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    pub fn finish(&self) -> Digest {
        Digest(self.0.finalize().into())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}
