//! The books of pins: who reads what of a VM, and what waits to be removed until nobody can be reading it.

use lifeboat::units::Seq;
use std::collections::{BTreeMap, VecDeque};

#[derive(Debug, Default)]
pub(super) struct Pins {
    next: u64,
    live: BTreeMap<u64, Option<Seq>>,
    /// With the number that the next pin had when it came here.
    trash: VecDeque<(u64, String)>,
}

impl Pins {
    pub fn throw_away(&mut self, paths: impl IntoIterator<Item = String>) {
        let next = self.next;
        self.trash.extend(paths.into_iter().map(|path| (next, path)));
    }

    /// Somebody begins to read; under which number.
    pub fn begin(&mut self, seq: Option<Seq>) -> u64 {
        let id = self.next;
        self.next += 1;
        self.live.insert(id, seq);
        id
    }

    pub fn end(&mut self, id: u64) {
        self.live.remove(&id);
    }

    /// Whether somebody reads this very point.
    pub fn holds(&self, seq: Seq) -> bool {
        self.live.values().any(|held| *held == Some(seq))
    }

    pub fn trash_len(&self) -> usize {
        self.trash.len()
    }

    /// Trash that nobody can be reading, oldest first.
    pub fn take(&mut self, most: usize) -> Vec<(u64, String)> {
        let oldest = self.live.keys().next().copied().unwrap_or(u64::MAX);
        let mut taken = Vec::new();
        while taken.len() < most && self.trash.front().is_some_and(|(at, _)| *at <= oldest) {
            taken.extend(self.trash.pop_front());
        }
        taken
    }

    /// What was taken and could not be removed.
    pub fn put_back(&mut self, taken: VecDeque<(u64, String)>) {
        taken.into_iter().rev().for_each(|entry| self.trash.push_front(entry));
    }
}
