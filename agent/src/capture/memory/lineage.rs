//! What must be undone to go back from the newest point that was sent to one that the site holds.
//! Promises: going back is exact, to any point from the newest durable one on; a point that is not among them is unknown.
//! Pure. Called by `held` and by `soft_dirty`.

use lifeboat::id::PointId;
use std::collections::VecDeque;

/// Points sent and not known to be durable, each with what it changed: a `T` that leads back to the one before it.
#[derive(Debug)]
pub struct Lineage<T> {
    tip: Option<PointId>,
    /// Oldest first: the point that it leads back to, and how.
    steps: VecDeque<(PointId, T)>,
}

impl<T> Default for Lineage<T> {
    fn default() -> Self {
        Self { tip: None, steps: VecDeque::new() }
    }
}

impl<T> Lineage<T> {
    /// `point` was made over the tip and is the tip now; `back` leads back.
    pub fn advance(&mut self, point: PointId, back: T) {
        if let Some(before) = self.tip.replace(point) {
            self.steps.push_back((before, back));
        }
        // Nobody may go back so far.
        if self.steps.len() > STEPS_MAX {
            self.steps.pop_front();
        }
    }

    /// Makes `basis` the tip. What leads back to it, in the order in which it is to be undone; `None` if nothing is known
    /// of it, and then nothing is known of any point any more.
    pub fn back_to(&mut self, basis: Option<PointId>) -> Option<Vec<T>> {
        if basis.is_some() && basis == self.tip {
            return Some(Vec::new());
        }
        let at = self.steps.iter().position(|(point, _)| Some(*point) == basis);
        let Some(at) = at else {
            self.forget();
            return None;
        };
        self.tip = basis;
        Some(self.steps.drain(at..).rev().map(|(_, back)| back).collect())
    }

    /// Nobody goes back beyond `point` any more.
    pub fn durable(&mut self, point: PointId) {
        if self.tip == Some(point) {
            self.steps.clear();
        } else if let Some(at) = self.steps.iter().position(|(of, _)| *of == point) {
            self.steps.drain(..at);
        }
    }

    pub fn forget(&mut self) {
        self.tip = None;
        self.steps.clear();
    }
}

const STEPS_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;

    fn point(no: u8) -> PointId {
        PointId::from_bytes([no; 16])
    }

    #[test]
    fn what_was_sent_can_be_undone_as_far_back_as_what_is_durable_and_no_further() {
        let made = || {
            let mut lineage = Lineage::default();
            (1..=4).for_each(|no| lineage.advance(point(no), no));
            lineage.durable(point(2));
            lineage
        };
        assert_eq!(made().back_to(Some(point(4))), Some(vec![]));
        assert_eq!(made().back_to(Some(point(3))), Some(vec![4]));
        assert_eq!(made().back_to(Some(point(2))), Some(vec![4, 3]));
        for unknown in [None, Some(point(1)), Some(point(9))] {
            let mut lineage = made();
            assert_eq!(lineage.back_to(unknown), None);
            assert_eq!(lineage.back_to(Some(point(4))), None, "what was known is of no use any more");
        }
        // Gone back, it goes on from there.
        let mut lineage = made();
        lineage.back_to(Some(point(2)));
        lineage.advance(point(7), 7);
        assert_eq!(lineage.back_to(Some(point(2))), Some(vec![7]));
        // The first point leads back to nothing.
        let mut first = Lineage::default();
        first.advance(point(1), 1);
        assert_eq!(first.back_to(None), None);
    }
}
