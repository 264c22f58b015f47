//! Which frames of a point are there: a set of numbers, kept as ranges.
//! Promises: memory follows the number of gaps, and gaps are bounded by what may be in flight.

use crate::wire::message::{FrameRange, FrameRanges};

/// A set of frame numbers: sorted, disjoint, non-adjacent ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameSet {
    ranges: Vec<FrameRange>,
}

impl FrameSet {
    /// Adds one number; `false` if it was there already.
    pub fn insert(&mut self, number: u32) -> bool {
        // The last number can't be held, since a range's end must be one past it; no point has 4 billion frames.
        let Some(next) = number.checked_add(1) else { return false };
        let at = self.ranges.partition_point(|range| range.end < number);
        match self.ranges.get_mut(at) {
            Some(range) if range.first <= number && number < range.end => return false,
            Some(range) if range.end == number => {
                range.end = next;
                let end = self.ranges.get(at + 1).filter(|after| after.first == next).map(|after| after.end);
                if let Some(end) = end {
                    self.ranges[at].end = end;
                    self.ranges.remove(at + 1);
                }
            }
            Some(range) if range.first == next => range.first = number,
            _ => self.ranges.insert(at, FrameRange { first: number, end: next }),
        }
        true
    }

    pub fn contains(&self, number: u32) -> bool {
        let at = self.ranges.partition_point(|range| range.end <= number);
        self.ranges.get(at).is_some_and(|range| range.first <= number)
    }

    /// Whether it holds every number that `other` holds.
    pub fn covers(&self, other: &Self) -> bool {
        other.ranges.iter().all(|wanted| {
            let at = self.ranges.partition_point(|range| range.end <= wanted.first);
            self.ranges.get(at).is_some_and(|range| range.first <= wanted.first && wanted.end <= range.end)
        })
    }

    /// Whether it holds exactly `0..count`.
    pub fn is_exactly(&self, count: u32) -> bool {
        match self.ranges.as_slice() {
            [] => count == 0,
            [only] => only.first == 0 && only.end == count,
            _ => false,
        }
    }

    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|range| u64::from(range.end - range.first)).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// One past the highest number held.
    pub fn end(&self) -> u32 {
        self.ranges.last().map_or(0, |range| range.end)
    }

    pub fn ranges(&self) -> &[FrameRange] {
        &self.ranges
    }

    pub fn to_ranges(&self) -> FrameRanges {
        self.ranges.clone()
    }

    /// Reads ranges from the wire; `None` if they are not sorted, disjoint and non-empty.
    pub fn from_ranges(ranges: FrameRanges) -> Option<Self> {
        let ordered = ranges.windows(2).all(|pair| pair[0].end < pair[1].first);
        let sound = ranges.iter().all(|range| range.first < range.end);
        (ordered && sound).then_some(Self { ranges })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_holds_what_a_plain_set_holds(numbers in proptest::collection::vec(0u32..60, 0..80)) {
            let (mut set, mut model) = (FrameSet::default(), BTreeSet::new());
            for number in numbers {
                prop_assert_eq!(set.insert(number), model.insert(number));
            }
            prop_assert!((0..70).all(|number| set.contains(number) == model.contains(&number)));
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.is_exactly(set.end()), model.len() as u32 == set.end());
            prop_assert_eq!(FrameSet::from_ranges(set.to_ranges()), Some(set));
        }
    }
}
