//! Sets of pages, one bit each. Promises: a page beyond the end is never in a set.

use std::ops::Range;

/// Pages per word.
pub const WORD: usize = 64;

/// Some of the pages of one block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
}

impl PageSet {
    pub fn none(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(WORD)] }
    }

    pub fn all(pages: usize) -> Self {
        let mut words = vec![u64::MAX; pages.div_ceil(WORD)];
        if let Some(last) = words.last_mut()
            && !pages.is_multiple_of(WORD)
        {
            *last = (1 << (pages % WORD)) - 1;
        }
        Self { words }
    }

    pub fn is_for(&self, pages: usize) -> bool {
        self.words.len() == pages.div_ceil(WORD)
    }

    /// None of the same pages.
    pub fn cleared(&self) -> Self {
        Self { words: vec![0; self.words.len()] }
    }

    /// Adds the pages of `other`; `false` if that is not of the same block.
    pub fn add(&mut self, other: &Self) -> bool {
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
        self.words.len() == other.words.len()
    }

    pub fn words(&self) -> &[u64] {
        &self.words
    }

    pub fn words_mut(&mut self) -> &mut [u64] {
        &mut self.words
    }
}

/// The runs of pages in `words`, in order, none longer than `longest`; the first word's first page is `first`.
pub fn runs(words: &[u64], first: u64, longest: u64) -> impl Iterator<Item = Range<u64>> {
    let end = words.len() * WORD;
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = next(words, at, 0)?;
        let stop = next(words, start, u64::MAX).unwrap_or(end).min(start + longest as usize);
        at = stop;
        Some(first + start as u64..first + stop as u64)
    })
}

/// The next page from `at` on that is in the set; with `flip` all ones, that is not.
fn next(words: &[u64], at: usize, flip: u64) -> Option<usize> {
    let mut index = at / WORD;
    let mut word = (words.get(index)? ^ flip) & (u64::MAX << (at % WORD));
    while word == 0 {
        index += 1;
        word = words.get(index)? ^ flip;
    }
    Some(index * WORD + word.trailing_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_the_set_and_nothing_else(
            words in prop::collection::vec(prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..6),
            first in 0u64..1 << 40, longest in 1u64..200,
        ) {
            let bit = |page: usize| words[page / WORD] >> (page % WORD) & 1 == 1;
            let expected: Vec<u64> =
                (0..words.len() * WORD).filter(|page| bit(*page)).map(|page| first + page as u64).collect();
            let found: Vec<Range<u64>> = runs(&words, first, longest).collect();
            prop_assert!(found.iter().all(|run| !run.is_empty() && run.end - run.start <= longest));
            prop_assert_eq!(found.into_iter().flatten().collect::<Vec<_>>(), expected);
        }

        #[test]
        fn all_pages_are_those_there_are(pages in 1usize..300) {
            let all = PageSet::all(pages);
            prop_assert!(runs(all.words(), 0, u64::from(u32::MAX)).eq(std::iter::once(0..pages as u64)));
            prop_assert!(all.is_for(pages) && !all.is_for(pages + WORD));
        }
    }
}
