//! Questions about the site's copy of an image, and their answers: what a resync is made of.
//! First the fingerprints of regions (coarse), then those of the pages of regions that differ (fine). Promises: an answer
//! is bounded by [`FINGERPRINTS_MAX`]; [`Fingerprints::read`] takes nothing that its question did not ask for.
//! Spoken by the agent's `protect::resync` and the site's `intake::compare`.

use crate::{
    chunk::fingerprint::{Fingerprint, FingerprintKey},
    format::manifest::ImageKind,
    id::PointId,
};
use serde::{Deserialize, Serialize};

/// Fingerprints in one answer at the most: 64 KiB.
pub const FINGERPRINTS_MAX: u32 = 4096;

/// "What are the fingerprints of this part of an image of your newest point?"
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Names the question in its answers; chosen by the agent.
    pub no: u32,
    /// The newest durable point, as the agent was told; of another one nothing is said.
    pub point: PointId,
    pub kind: ImageKind,
    pub image: String,
    pub level: Level,
    /// First region, or page.
    pub first: u64,
    /// Regions, or pages; at most [`FINGERPRINTS_MAX`].
    pub count: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Level {
    Regions,
    Pages,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub no: u32,
    pub reply: Reply,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    /// The site is still reading its copy; another answer follows.
    Reading {
        done_bytes: u64,
        total_bytes: u64,
    },
    Fingerprints(Fingerprints),
    /// There is nothing to compare with (damaged, no such image, no longer the newest point): send the image in full.
    Refused {
        why: String,
    },
}

/// Fingerprints from the question's `first` on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprints {
    /// The same in all answers about one image, as long as the site remembers what it has read.
    pub key: FingerprintKey,
    /// Bytes of the site's image; it is zero from there on.
    pub image_bytes: u64,
    /// One past the last region or page told. Beyond what was asked only where all of that is zero.
    pub end: u64,
    pub spans: Vec<Span>,
}

/// Some zeros, then some fingerprints.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    pub zeros: u64,
    pub then: Vec<Fingerprint>,
}

/// An answer that is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the site's answer does not fit the question")]
pub struct Misfit;

impl Fingerprints {
    /// Collects fingerprints in order, from `first` on.
    pub fn collect(
        key: FingerprintKey,
        image_bytes: u64,
        all: impl IntoIterator<Item = Fingerprint>,
        first: u64,
    ) -> Self {
        let mut made = Self { key, image_bytes, end: first, spans: Vec::new() };
        for one in all {
            made.push(one);
        }
        made
    }

    /// Tells the next one.
    pub fn push(&mut self, one: Fingerprint) {
        self.end = self.end.saturating_add(1);
        match self.spans.last_mut() {
            Some(last) if one != Fingerprint::ZERO => last.then.push(one),
            Some(last) if last.then.is_empty() => last.zeros = last.zeros.saturating_add(1),
            Some(_) | None if one == Fingerprint::ZERO => {
                self.spans.push(Span { zeros: 1, then: Vec::new() })
            }
            Some(_) | None => self.spans.push(Span { zeros: 0, then: vec![one] }),
        }
    }

    /// Says that all is zero up to `end`.
    pub fn extend_zeros(&mut self, end: u64) {
        let more = end.saturating_sub(self.end);
        if more > 0 {
            self.spans.push(Span { zeros: more, then: Vec::new() });
            self.end = end;
        }
    }

    /// The places that are not zero, in order; all others up to `end` are.
    pub fn read(self, question: &Question) -> Result<Vec<(u64, Fingerprint)>, Misfit> {
        let asked_end = question.first.checked_add(u64::from(question.count)).ok_or(Misfit)?;
        let (mut at, mut found) = (question.first, Vec::new());
        for Span { zeros, then } in self.spans {
            at = at.checked_add(zeros).ok_or(Misfit)?;
            for one in then {
                if at >= asked_end || one == Fingerprint::ZERO {
                    return Err(Misfit);
                }
                found.push((at, one));
                at += 1;
            }
        }
        let whole = question.level == Level::Regions || at >= asked_end;
        if at == self.end && at > question.first && whole { Ok(found) } else { Err(Misfit) }
    }
}

impl Question {
    /// Whether it may be asked at all.
    pub fn is_sound(&self) -> bool {
        (1..=FINGERPRINTS_MAX).contains(&self.count)
            && self.first.checked_add(u64::from(self.count)).is_some()
            && (1..=255).contains(&self.image.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEY: FingerprintKey = FingerprintKey::from_bytes([1; 32]);

    fn question(level: Level, first: u64, count: u32) -> Question {
        let point = PointId::from_bytes([1; 16]);
        Question { no: 1, point, kind: ImageKind::Disk, image: "vda".into(), level, first, count }
    }

    fn print(value: u8) -> Fingerprint {
        Fingerprint::from_bytes([value; 16])
    }

    proptest! {
        #[test]
        fn what_was_collected_is_read_again(
            values in prop::collection::vec(0u8..3, 1..200), first in 0u64..1000, more in 0u64..1000,
        ) {
            let mut made = Fingerprints::collect(KEY, 5, values.iter().map(|value| print(*value)), first);
            let question = question(Level::Regions, first, values.len() as u32);
            made.extend_zeros(made.end + more);
            prop_assert_eq!(made.end, first + values.len() as u64 + more);
            let expected: Vec<_> = (first..)
                .zip(&values)
                .filter(|(_, value)| **value != 0)
                .map(|(at, value)| (at, print(*value)))
                .collect();
            prop_assert_eq!(made.read(&question), Ok(expected));
        }

        /// Goal: hostile answers are refused. Method: any spans at all; what is read lies within what was asked.
        #[test]
        fn nothing_is_read_that_was_not_asked_for(
            spans in prop::collection::vec((prop_oneof![0u64..50, any::<u64>()], 0usize..20, 0u8..2), 0..20),
            first in prop_oneof![0u64..50, any::<u64>()], count in 0u32..60, end in prop_oneof![0u64..200, any::<u64>()],
            pages: bool,
        ) {
            let spans = spans.into_iter().map(|(zeros, n, value)| Span { zeros, then: vec![print(value); n] });
            let made = Fingerprints { key: KEY, image_bytes: 0, end, spans: spans.collect() };
            let level = if pages { Level::Pages } else { Level::Regions };
            if let Ok(found) = made.read(&question(level, first, count)) {
                let within = first..first + u64::from(count);
                prop_assert!(found.iter().all(|(at, one)| within.contains(at) && *one != Fingerprint::ZERO));
                prop_assert!(found.is_sorted_by(|one, next| one.0 < next.0) && end > first);
                prop_assert!(!pages || end >= within.end);
            }
        }
    }

    #[test]
    fn questions_out_of_bounds_are_unsound() {
        assert!(question(Level::Pages, 0, FINGERPRINTS_MAX).is_sound());
        let unsound = [
            question(Level::Pages, 0, 0),
            question(Level::Pages, 0, FINGERPRINTS_MAX + 1),
            question(Level::Pages, u64::MAX, 1),
            Question { image: String::new(), ..question(Level::Pages, 0, 1) },
            Question { image: "x".repeat(256), ..question(Level::Pages, 0, 1) },
        ];
        assert!(unsound.iter().all(|question| !question.is_sound()));
    }
}
