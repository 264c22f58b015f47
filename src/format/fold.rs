//! Folds: what takes the place of a point's own packs once the points below it were laid together.
//! A fold of point P over Q holds every page that may differ between Q and P, as P has it, each frame complete in
//! itself; over nothing, it holds all of P. Promises: a fold names the digest of the manifest whose point it serves, and
//! of the one that it stands on, so that the history stays one chain; [`FoldRecord::decode`] refuses what can't be.
//! File: `FileHeader` (kind fold), then the postcard body. Called by the site's store.

use crate::{
    chunk::digest::Digest,
    format::{
        header::Kind,
        manifest::IMAGES_MAX,
        pack::PackRef,
        record::{self, RecordError},
    },
    id::{PointId, VmId},
    units::{Seq, UnixMs},
};
use serde::{Deserialize, Serialize};

/// The point that a fold stands on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseRef {
    pub seq: Seq,
    pub point: PointId,
    /// Digest of that point's whole manifest file.
    pub manifest: Digest,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoldRecord {
    pub vm: VmId,
    pub seq: Seq,
    pub point: PointId,
    /// Digest of the point's whole manifest file.
    pub manifest: Digest,
    /// Counts the folds of this point: the highest one there is holds.
    pub no: u32,
    /// None where the fold holds every image in full.
    pub base: Option<BaseRef>,
    /// Numbers of the images that are complete in this fold, ascending.
    pub full: Vec<u16>,
    pub packs: Vec<PackRef>,
    pub made_at: UnixMs,
}

impl FoldRecord {
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        self.check()?;
        record::seal(Kind::Fold, VERSION, self)
    }

    pub fn decode(file: &[u8]) -> Result<Self, RecordError> {
        let fold: Self = record::open(Kind::Fold, VERSION, file)?;
        fold.check()?;
        Ok(fold)
    }

    fn check(&self) -> Result<(), RecordError> {
        let refuse = |why: &str| Err(RecordError::Malformed(why.into()));
        if self.no == 0 {
            return refuse("a fold's number begins at 1");
        }
        if self.base.is_some_and(|base| base.seq >= self.seq) {
            return refuse("a fold stands on an older point");
        }
        if self.full.len() > IMAGES_MAX || !self.full.is_sorted_by(|a, b| a < b) {
            return refuse("the numbers of its images do not ascend");
        }
        Ok(())
    }
}

const VERSION: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{format::header::FileHeader, id::PackId};
    use proptest::prelude::*;

    fn sample() -> FoldRecord {
        FoldRecord {
            vm: VmId::from_bytes([1; 16]),
            seq: Seq(300),
            point: PointId::from_bytes([3; 16]),
            manifest: Digest::from_bytes([4; 32]),
            no: 2,
            base: Some(BaseRef {
                seq: Seq(284),
                point: PointId::from_bytes([5; 16]),
                manifest: Digest::from_bytes([6; 32]),
            }),
            full: vec![2, 300],
            packs: vec![PackRef {
                id: PackId::from_bytes([7; 16]),
                len: 1000,
                index_offset: 900,
                index_digest: Digest::from_bytes([8; 32]),
                file_digest: Digest::from_bytes([9; 32]),
                frames: 9,
            }],
            made_at: UnixMs(1_700_000_000_000),
        }
    }

    /// Version 1 as it was first shipped: a change here is a new version, not a new expectation.
    #[test]
    fn golden_bytes_of_a_fold_of_version_1() {
        let file = sample().encode().unwrap();
        let hex: String = file.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("golden/fold_v1.hex").split_whitespace().collect::<String>());
        assert_eq!(FoldRecord::decode(&file), Ok(sample()));
    }

    #[test]
    fn a_flipped_bit_anywhere_a_cut_or_an_impossible_fold_is_refused() {
        let file = sample().encode().unwrap();
        for bit in 0..file.len() * 8 {
            let mut bad = file.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(FoldRecord::decode(&bad).is_err(), "bit {bit}");
        }
        for len in 0..file.len() {
            assert!(FoldRecord::decode(&file[..len]).is_err(), "{len} bytes");
        }
        let upward = FoldRecord { seq: Seq(284), ..sample() };
        let unordered = FoldRecord { full: vec![3, 3], ..sample() };
        let unnumbered = FoldRecord { no: 0, ..sample() };
        for bad in [upward, unordered, unnumbered] {
            assert!(bad.encode().is_err());
            assert!(FoldRecord::decode(&record::seal(Kind::Fold, 1, &bad).unwrap()).is_err());
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let body_digest = Digest::of(&body);
            let header = FileHeader { kind: Kind::Fold, version: 1, body_len: body.len() as u32, body_digest };
            let _ = FoldRecord::decode(&body);
            let _ = FoldRecord::decode(&[header.encode().as_slice(), &body].concat());
        }
    }
}
