//! Which points of a history were taken away on purpose, so that a missing manifest is told from a lost one.
//! A record lists all that were ever pruned; it is written before anything is removed, and a newer one replaces it.
//! Promises: at both edges of each gap the digests by which manifests name each other are kept, so that the chain is
//! checked across it. File: `FileHeader` (kind pruned), then the postcard body. Called by the site's store.

use crate::{
    format::{
        header::Kind,
        manifest::PreviousRef,
        record::{self, RecordError},
    },
    id::VmId,
    units::{Seq, UnixMs},
};
use serde::{Deserialize, Serialize};

/// Points `first` to `last`, all of them pruned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    pub first: Seq,
    pub last: Seq,
    /// What the first of them named as the point before it.
    pub before: Option<PreviousRef>,
    /// The last of them, as the point after it names it.
    pub end: PreviousRef,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrunedRecord {
    pub vm: VmId,
    /// Counts the records of this VM: the highest one there is holds.
    pub no: u64,
    /// Ascending, without overlap.
    pub gaps: Vec<Gap>,
    pub made_at: UnixMs,
}

impl PrunedRecord {
    pub fn encode(&self) -> Result<Vec<u8>, RecordError> {
        self.check()?;
        record::seal(Kind::Pruned, VERSION, self)
    }

    pub fn decode(file: &[u8]) -> Result<Self, RecordError> {
        let pruned: Self = record::open(Kind::Pruned, VERSION, file)?;
        pruned.check()?;
        Ok(pruned)
    }

    /// The gap that point `seq` lies in.
    pub fn gap(&self, seq: Seq) -> Option<&Gap> {
        let at = self.gaps.partition_point(|gap| gap.last < seq);
        self.gaps.get(at).filter(|gap| gap.first <= seq)
    }

    /// Adds one point, named as the point after it names it. Does nothing if it was pruned before.
    pub fn add(&mut self, seq: Seq, point: PreviousRef, before: Option<PreviousRef>) {
        if self.gap(seq).is_some() {
            return;
        }
        let at = self.gaps.partition_point(|gap| gap.last < seq);
        self.gaps.insert(at, Gap { first: seq, last: seq, before, end: point });
        // Neighbours whose edges agree are one gap.
        for left in [at, at.saturating_sub(1)] {
            if let (Some(a), Some(b)) = (self.gaps.get(left).copied(), self.gaps.get(left + 1).copied())
                && a.last.0 + 1 == b.first.0
                && b.before == Some(a.end)
            {
                self.gaps[left] = Gap { last: b.last, end: b.end, ..a };
                self.gaps.remove(left + 1);
            }
        }
    }

    fn check(&self) -> Result<(), RecordError> {
        let ordered = self.gaps.iter().all(|gap| gap.first <= gap.last && gap.last.0 < u64::MAX)
            && self.gaps.is_sorted_by(|a, b| a.last < b.first);
        if ordered && self.no > 0 {
            return Ok(());
        }
        Err(RecordError::Malformed("its gaps overlap or descend, or it has no number".into()))
    }
}

const VERSION: u16 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{chunk::digest::Digest, format::header::FileHeader, id::PointId};
    use proptest::prelude::*;

    fn named(seq: u64) -> PreviousRef {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&seq.to_be_bytes());
        PreviousRef { point: PointId::from_bytes(id), manifest: Digest::of(&id) }
    }

    fn of(seqs: &[u64]) -> PrunedRecord {
        let vm = VmId::from_bytes([1; 16]);
        let mut record = PrunedRecord { vm, no: 7, gaps: Vec::new(), made_at: UnixMs(1_700_000_000_000) };
        for seq in seqs {
            let before = seq.checked_sub(1).filter(|seq| *seq > 0).map(named);
            record.add(Seq(*seq), named(*seq), before);
        }
        record
    }

    /// Version 1 as it was first shipped: a change here is a new version, not a new expectation.
    #[test]
    fn golden_bytes_of_a_pruned_record_of_version_1() {
        let file = of(&[3, 4, 5, 300]).encode().unwrap();
        let hex: String = file.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, include_str!("golden/pruned_v1.hex").split_whitespace().collect::<String>());
        assert_eq!(PrunedRecord::decode(&file), Ok(of(&[3, 4, 5, 300])));
    }

    #[test]
    fn a_flipped_bit_anywhere_a_cut_or_gaps_that_overlap_are_refused() {
        let file = of(&[3, 4, 9]).encode().unwrap();
        for bit in 0..file.len() * 8 {
            let mut bad = file.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(PrunedRecord::decode(&bad).is_err(), "bit {bit}");
        }
        for len in 0..file.len() {
            assert!(PrunedRecord::decode(&file[..len]).is_err(), "{len} bytes");
        }
        let mut overlapping = of(&[3, 9]);
        overlapping.gaps[1].first = Seq(3);
        assert!(overlapping.encode().is_err());
    }

    proptest! {
        #[test]
        fn gaps_hold_exactly_what_was_pruned_and_join_where_they_meet(
            seqs in proptest::collection::vec(1u64..40, 0..60)
        ) {
            let record = of(&seqs);
            for seq in 1..45 {
                prop_assert_eq!(record.gap(Seq(seq)).is_some(), seqs.contains(&seq), "{}", seq);
            }
            for pair in record.gaps.windows(2) {
                prop_assert!(pair[0].last.0 + 1 < pair[1].first.0);
            }
            for gap in &record.gaps {
                prop_assert_eq!(gap.end, named(gap.last.0));
                prop_assert_eq!(gap.before, Some(gap.first.0 - 1).filter(|seq| *seq > 0).map(named));
            }
            prop_assert_eq!(PrunedRecord::decode(&record.encode().unwrap()), Ok(record));
        }

        #[test]
        fn arbitrary_bytes_never_panic(body in proptest::collection::vec(any::<u8>(), 0..300)) {
            let body_digest = Digest::of(&body);
            let header = FileHeader { kind: Kind::Pruned, version: 1, body_len: body.len() as u32, body_digest };
            let _ = PrunedRecord::decode(&body);
            let _ = PrunedRecord::decode(&[header.encode().as_slice(), &body].concat());
        }
    }
}
