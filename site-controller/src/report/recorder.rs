//! Records how old the newest points of each group and VM were, while the points that tell it are still there.
//! Promises: a slot is written once, whole, and after it is over; what could not be written is tried again, from the points
//! that are left by then. Called by the daemon.

use super::{
    gather::{Ages, ReportError, Sources},
    log::{Of, SlotLog},
    slot::Slot,
};
use lifeboat::{error::chain, units::UnixMs};
use std::{collections::BTreeMap, time::Duration};
use tokio::sync::watch;

/// Until the daemon stops.
pub async fn keep_recording(sources: Sources<'_>, mut stop: watch::Receiver<bool>) {
    let mut recorder = Recorder { log: sources.slots.clone(), next: BTreeMap::new() };
    loop {
        let now = sources.clock.now();
        if let Err(error) = recorder.look(&sources, now).await {
            tracing::warn!(error = chain(&error), "how old the newest points were could not be recorded");
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = stop.wait_for(|stop| *stop) => return,
        }
    }
}

struct Recorder {
    log: SlotLog,
    /// When the next slot begins; none, if there never was one.
    next: BTreeMap<Of, Option<UnixMs>>,
}

impl Recorder {
    async fn look(&mut self, sources: &Sources<'_>, now: UnixMs) -> Result<(), ReportError> {
        for group in sources.coordinator.book.list() {
            let of = Of::Group(group.id);
            if self.is_due(of, now).await? {
                let ages = sources.group_ages(&group, now).await?;
                self.record(of, ages, now).await?;
            }
        }
        for found in sources.catalog.vms().await? {
            let of = Of::Vm(found.vm);
            if self.is_due(of, now).await? {
                let ages = sources.vm_ages(found.vm, now).await?;
                self.record(of, ages, now).await?;
            }
        }
        let log = self.log.clone();
        Ok(tokio::task::spawn_blocking(move || log.tidy(now)).await??)
    }

    async fn is_due(&mut self, of: Of, now: UnixMs) -> Result<bool, ReportError> {
        let next = match self.next.get(&of) {
            Some(next) => *next,
            None => {
                let log = self.log.clone();
                let until = tokio::task::spawn_blocking(move || log.until(of)).await??;
                *self.next.entry(of).or_insert(until)
            }
        };
        Ok(next.is_none_or(|next| is_over(next, now)))
    }

    async fn record<P>(&mut self, of: Of, ages: Ages<P>, now: UnixMs) -> Result<(), ReportError> {
        let next = self.next.get(&of).copied().flatten();
        let first = ages.moments.first().map(|first| first.durable_at);
        let mut slots = Vec::new();
        for from in due(next, first, now) {
            slots.push(Slot::of(&ages.moments, ages.since(from), UnixMs(from.0 + SLOT_MS)));
        }
        let Some(until) = slots.last().map(|slot| slot.until) else { return Ok(()) };
        let log = self.log.clone();
        tokio::task::spawn_blocking(move || log.add(of, &slots)).await??;
        self.next.insert(of, Some(until));
        Ok(())
    }
}

/// The beginnings of the slots that are over and not recorded; of no more than a day, and of nothing before the first
/// point.
fn due(next: Option<UnixMs>, first: Option<UnixMs>, now: UnixMs) -> impl Iterator<Item = UnixMs> {
    let first = first.map(|first| first.0 / SLOT_MS * SLOT_MS);
    let day = now.0.saturating_sub(DAY_MS).div_ceil(SLOT_MS) * SLOT_MS;
    let begin = next.map(|next| next.0.div_ceil(SLOT_MS) * SLOT_MS).or(first).map(|begin| begin.max(day));
    let begins = begin.into_iter().flat_map(|begin| (begin..).step_by(SLOT_MS as usize)).map(UnixMs);
    begins.take_while(move |from| is_over(*from, now))
}

/// A point that was durable in it may be listed a little later.
fn is_over(from: UnixMs, now: UnixMs) -> bool {
    from.0.saturating_add(SLOT_MS + GRACE_MS) <= now.0
}

const LOOK: Duration = Duration::from_secs(60);
const SLOT_MS: u64 = 600_000;
const GRACE_MS: u64 = 10_000;
const DAY_MS: u64 = 86_400_000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{age::Moment, rpo::attained, slot::tests::a_second_each};
    use lifeboat::id::VmId;

    const OF: Of = Of::Vm(VmId::from_bytes([1; 16]));

    fn ages(moments: &[Moment]) -> Ages<()> {
        Ages { points: (), moments: moments.to_vec(), until: UnixMs(u64::MAX), target_ms: Some(2000) }
    }

    /// Goal: an hour whose points are gone is told as if they were there. Method: looked at each minute, where the points
    /// of the last quarter of an hour are there; with another recorder, as after a restart, in the middle.
    #[tokio::test]
    async fn what_was_recorded_outlives_its_points() {
        let dir = tempfile::tempdir().unwrap();
        let log = SlotLog::new(dir.path().to_owned());
        let all = a_second_each(7200, 4000..4100);
        let lately = |now: u64| -> Vec<Moment> {
            let mut left = all.clone();
            left.retain(|moment| moment.durable_at.0 <= now && moment.cut_at.0 + 900_000 >= now);
            left
        };
        let mut recorder = Recorder { log: log.clone(), next: BTreeMap::new() };
        for minute in 0..=120 {
            let now = UnixMs(minute * 60_000);
            if minute == 57 {
                recorder = Recorder { log: log.clone(), next: BTreeMap::new() };
            }
            if recorder.is_due(OF, now).await.unwrap() {
                recorder.record(OF, ages(&lately(now.0)), now).await.unwrap();
            }
        }
        let (now, slots) = (UnixMs(7_200_000), log.since(OF, UnixMs(0)).unwrap());
        assert_eq!(slots.len(), 11, "the last one is not over for long enough");
        let told = |moments: &[Moment], slots: &[Slot]| {
            let found = attained(moments, slots, ages(moments).since(UnixMs(1000)), now);
            (
                found.known_ms,
                found.within_percent,
                found.exceeded,
                found.longest_ms,
                found.worst,
                found.over_time,
            )
        };
        let (with, without) = (told(&lately(now.0), &slots), told(&all, &[]));
        // The first ten minutes have no slot that begins in the time of the report, nor points.
        assert_eq!(
            (with.0 + 599_000, with.2, with.3, &with.4),
            (without.0, without.2, without.3, &without.4)
        );
    }

    #[test]
    fn slots_are_due_from_the_first_point_on_and_for_a_day_at_the_most() {
        let due = |next: Option<u64>, first: Option<u64>, now: u64| -> Vec<u64> {
            due(next.map(UnixMs), first.map(UnixMs), UnixMs(now)).map(|from| from.0 / SLOT_MS).collect()
        };
        assert!(due(None, None, 10 * DAY_MS).is_empty());
        assert_eq!(due(None, Some(SLOT_MS + 5), 4 * SLOT_MS), [1, 2]);
        assert_eq!(due(Some(3 * SLOT_MS), Some(5), 4 * SLOT_MS + GRACE_MS), [3]);
        assert!(due(Some(9 * SLOT_MS), Some(5), 4 * SLOT_MS).is_empty(), "the clock was set back");
        let late = due(Some(0), Some(0), 10 * DAY_MS + 1);
        assert_eq!((late.len(), late[0]), (142, 9 * 144 + 1));
    }
}
