//! Newest-wins view of one address space over several layers.
//! Promises: layers are laid under each other, newest first; a range once covered keeps what covered it. Memory grows with
//! the number of pieces, never with the size of the address space. Called by the site's restore plan.

use std::collections::BTreeMap;

/// What covers a range. A piece can lose its front, because a newer layer covers it.
pub trait Piece: Clone {
    /// The same piece without its first `units`.
    fn skip(&self, units: u64) -> Self;
    /// Whether `next` goes on where this piece of `units` ends, so that both may be kept as one.
    fn continues(&self, units: u64, next: &Self) -> bool;
}

/// Disjoint ranges, each with the piece of the newest layer that covers it.
#[derive(Clone, Debug)]
pub struct Overlay<P> {
    /// By first unit: one past the last unit, and the piece.
    pieces: BTreeMap<u64, (u64, P)>,
}

impl<P> Default for Overlay<P> {
    fn default() -> Self {
        Self { pieces: BTreeMap::new() }
    }
}

impl<P: Piece> Overlay<P> {
    /// Lays `piece` over `first..end` under everything that is there: it fills only what nothing covers yet.
    /// Returns whether any of it shows; what shows once is never hidden later.
    pub fn lay_under(&mut self, first: u64, end: u64, piece: &P) -> bool {
        let mut shows = false;
        let mut at = match self.pieces.range(..=first).next_back() {
            Some((_, (covered, _))) if *covered > first => *covered,
            Some(_) | None => first,
        };
        while at < end {
            let (gap_end, next) = match self.pieces.range(at..end).next() {
                Some((start, (covered, _))) => (*start, *covered),
                None => (end, end),
            };
            if at < gap_end {
                self.insert(at, gap_end, piece.skip(at - first));
                shows = true;
            }
            at = next;
        }
        shows
    }

    /// The parts of `first..end` that nothing covers yet, in order.
    pub fn gaps(&self, first: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let mut at = match self.pieces.range(..=first).next_back() {
            Some((_, (covered, _))) if *covered > first => *covered,
            Some(_) | None => first,
        };
        std::iter::from_fn(move || {
            while at < end {
                let (gap_end, next) = match self.pieces.range(at..end).next() {
                    Some((start, (covered, _))) => (*start, *covered),
                    None => (end, end),
                };
                let from = std::mem::replace(&mut at, next);
                if from < gap_end {
                    return Some((from, gap_end));
                }
            }
            None
        })
    }

    /// The covered ranges in order: first unit, one past the last, piece.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64, &P)> {
        self.pieces.iter().map(|(first, (end, piece))| (*first, *end, piece))
    }

    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    fn insert(&mut self, mut first: u64, mut end: u64, mut piece: P) {
        if let Some((before, (until, held))) = self.pieces.range(..first).next_back()
            && *until == first
            && held.continues(until - before, &piece)
        {
            (first, piece) = (*before, held.clone());
        }
        if let Some((after, held)) = self.pieces.get(&end)
            && piece.continues(end - first, held)
        {
            let next = end;
            end = *after;
            self.pieces.remove(&next);
        }
        self.pieces.insert(first, (end, piece));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A piece of a numbered layer that starts at some unit of that layer.
    #[derive(Clone, Debug, PartialEq)]
    struct Part(usize, u64);

    impl Piece for Part {
        fn skip(&self, units: u64) -> Self {
            Self(self.0, self.1 + units)
        }
        fn continues(&self, units: u64, next: &Self) -> bool {
            self.0 == next.0 && self.1 + units == next.1
        }
    }

    proptest! {
        #[test]
        fn the_newest_layer_that_covers_a_unit_is_the_one_seen(
            layers in proptest::collection::vec((0u64..200, 0u64..60), 0..40)
        ) {
            let mut overlay = Overlay::default();
            let mut naive: Vec<Option<Part>> = vec![None; 300];
            for (no, (first, len)) in layers.iter().enumerate() {
                let gaps: Vec<u64> = overlay.gaps(*first, first + len).flat_map(|(from, to)| from..to).collect();
                let bare = (*first..first + len).filter(|unit| naive[*unit as usize].is_none());
                prop_assert_eq!(gaps, bare.collect::<Vec<_>>());
                let shows = overlay.lay_under(*first, first + len, &Part(no, 1000));
                for unit in *first..first + len {
                    naive[unit as usize].get_or_insert(Part(no, 1000 + unit - first));
                }
                prop_assert_eq!(shows, naive.iter().flatten().any(|part| part.0 == no));
            }
            let mut seen: Vec<Option<Part>> = vec![None; 300];
            let mut last = 0;
            for (first, end, piece) in overlay.iter() {
                prop_assert!(first >= last && first < end);
                last = end;
                for unit in first..end {
                    seen[unit as usize] = Some(piece.skip(unit - first));
                }
            }
            prop_assert_eq!(seen, naive);
            prop_assert!(overlay.len() <= 2 * layers.len());
        }
    }

    #[test]
    fn neighbours_that_continue_each_other_are_kept_as_one() {
        let mut overlay = Overlay::default();
        overlay.lay_under(4, 8, &Part(0, 4));
        overlay.lay_under(0, 4, &Part(0, 0));
        overlay.lay_under(8, 9, &Part(0, 8));
        assert_eq!(overlay.iter().collect::<Vec<_>>(), vec![(0, 9, &Part(0, 0))]);
    }
}
