//! What is to be done about a copy of a VM, given all that is known: a pure function, which the daemon and the simulation
//! call alike.
//! Promises: a copy that was fenced is paused, and never resumed or started by us; each step may be done again, and
//! whoever dies between two of them is followed by somebody who is told the rest.

use super::book::Record;
use crate::{protect::neighbour::SiteWord, witness::hold::Kept};
use lifeboat::units::Generation;
use std::time::Duration;

/// What the operator wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// A copy that was fenced is paused, and put away.
    pub pause_fenced: bool,
    /// A guest whose site has not answered for so long is paused.
    pub isolation: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    Off,
    Runs,
    /// libvirt knows why: its operator's word, or ours.
    Stands,
    /// Stopped past libvirt: a point is being cut, and it will run again.
    Cut,
}

/// What the hook finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    Missing,
    /// Good, and for long enough.
    Fresh,
    /// It ends soon, or has ended.
    Stale,
    /// It says that this copy was fenced.
    Fenced,
}

/// All that is known.
#[derive(Clone, Debug)]
pub struct Facts<'a> {
    pub site: SiteWord,
    /// How long the site has not answered.
    pub silent_for: Duration,
    pub guest: Guest,
    /// The failover that put this copy here, if one did.
    pub label: Option<Generation>,
    pub record: &'a Record,
    pub lease: Lease,
    /// The hook refused to start it.
    pub start_refused: bool,
    /// It is to start with its host.
    pub autostart: bool,
    /// Nothing of ours is in its QEMU, nobody else is at work, and there is a reason to try now.
    pub may_save: bool,
    /// A saved state lies there that the record does not know.
    pub saved_unnoted: bool,
    /// It is held for a planned failover: what becomes of it the site says, and its actor does.
    pub held: bool,
    /// Whether a lease lets it run, where it is bound to a witness.
    pub kept: Kept,
}

/// In this order; after a failure the rest is left for the next look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The hook refuses it from here on, a migration that comes in as well.
    RefuseStarts(Generation),
    NoteFenced(Generation),
    ForgetFenced,
    NoteIsolated,
    ForgetIsolated,
    ForgetAllowed,
    Pause,
    Resume,
    /// Put what only this copy knows into a file, and end its QEMU.
    Save,
    NoteSaved,
    WriteLease,
    DropLease,
    Start,
    ForgetRefusal,
}

/// Whose the VM is, as far as can be known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The site has answered: nobody failed it over.
    Owner,
    /// The operator says so.
    Allowed,
    /// A failover to this host, later than the one that this copy would be fenced for, put it here.
    Replica(Generation),
    Fenced(Generation),
    /// The site has not answered.
    Unsure,
}

/// `label` is that of the copy that is here. Generations order all failovers of a VM, over both sites: of two copies the one
/// that a later failover made is right.
pub fn verdict(site: SiteWord, record: &Record, label: Option<Generation>) -> Verdict {
    let said = if let SiteWord::Fenced(current) = site { Some(current) } else { None };
    let fenced = said.max(record.fenced.as_ref().map(|fenced| fenced.current));
    let allowed = record.allowed.as_ref().map(|allowed| allowed.up_to);
    // What an operator overruled was that failover, and none after it.
    let overruled = |current| allowed.is_some_and(|up_to| up_to >= current);
    match (fenced, site) {
        (Some(current), SiteWord::Open(ours)) if ours >= current => Verdict::Owner,
        (Some(current), _) => match label.filter(|made_by| *made_by > current) {
            Some(made_by) => Verdict::Replica(made_by),
            None if overruled(current) => Verdict::Allowed,
            None => Verdict::Fenced(current),
        },
        (None, SiteWord::Open(_)) => Verdict::Owner,
        (None, _) if allowed.is_some() => Verdict::Allowed,
        (None, _) => Verdict::Unsure,
    }
}

pub fn decide(facts: &Facts<'_>, policy: Policy) -> Vec<Step> {
    if facts.held {
        // Nor is it started by anybody else.
        let dropped = matches!(facts.lease, Lease::Fresh | Lease::Stale);
        return dropped.then_some(Step::DropLease).into_iter().collect();
    }
    match verdict(facts.site, facts.record, facts.label) {
        Verdict::Fenced(current) => fenced(facts, policy, current),
        // Whatever the site said was said before its promise ended.
        Verdict::Owner | Verdict::Unsure if facts.kept == Kept::Lapsed => stand(facts),
        Verdict::Owner => may_run(facts, true),
        Verdict::Allowed | Verdict::Replica(_) => may_run(facts, false),
        Verdict::Unsure => unsure(facts, policy),
    }
}

fn fenced(facts: &Facts<'_>, policy: Policy, current: Generation) -> Vec<Step> {
    let mut steps = Vec::new();
    let known = facts.record.fenced.as_ref();
    let news = known.is_none_or(|known| known.current < current);
    // The hook goes by the generation that it is told.
    if facts.lease != Lease::Fenced || news {
        steps.push(Step::RefuseStarts(current));
    }
    if news {
        steps.push(Step::NoteFenced(current));
    }
    if facts.record.allowed.is_some() {
        steps.push(Step::ForgetAllowed);
    }
    if facts.record.isolated.is_some() {
        steps.push(Step::ForgetIsolated);
    }
    if !policy.pause_fenced {
        return steps;
    }
    let saved = known.is_some_and(|known| known.saved.is_some());
    match facts.guest {
        Guest::Runs | Guest::Cut => steps.push(Step::Pause),
        // One that was put away and started again stands: what was kept first is not written over.
        Guest::Stands if facts.may_save && known.is_some() && !saved => steps.push(Step::Save),
        Guest::Off if facts.saved_unnoted && !saved => steps.push(Step::NoteSaved),
        Guest::Stands | Guest::Off => {}
    }
    steps
}

fn may_run(facts: &Facts<'_>, answered: bool) -> Vec<Step> {
    let mut steps = Vec::new();
    if answered && facts.record.fenced.is_some() {
        steps.push(Step::ForgetFenced);
    }
    if answered && facts.record.allowed.is_some() {
        steps.push(Step::ForgetAllowed);
    }
    if facts.lease != Lease::Fresh {
        steps.push(Step::WriteLease);
    }
    steps.extend(go_on(facts));
    if facts.start_refused {
        if facts.guest == Guest::Off && facts.autostart {
            steps.push(Step::Start);
        }
        steps.push(Step::ForgetRefusal);
    }
    steps
}

/// Ends a pause for isolation. Resumed first: a resumed guest with a record is paused again, a paused one without would
/// stand for ever.
fn go_on(facts: &Facts<'_>) -> Vec<Step> {
    match (facts.record.isolated.is_some(), facts.guest) {
        (false, _) => Vec::new(),
        (true, Guest::Stands) => vec![Step::Resume, Step::ForgetIsolated],
        (true, Guest::Off | Guest::Runs | Guest::Cut) => vec![Step::ForgetIsolated],
    }
}

fn unsure(facts: &Facts<'_>, policy: Policy) -> Vec<Step> {
    let Some(after) = policy.isolation else { return go_on(facts) };
    let isolated = facts.record.isolated.is_some();
    if !isolated && facts.silent_for < after {
        return Vec::new();
    }
    stand(facts)
}

/// It may have been failed over.
fn stand(facts: &Facts<'_>) -> Vec<Step> {
    let isolated = facts.record.isolated.is_some();
    let mut steps = Vec::new();
    if matches!(facts.lease, Lease::Fresh | Lease::Stale) {
        steps.push(Step::DropLease);
    }
    // A guest that stands for a reason of its operator's is not noted: we would resume it.
    if matches!(facts.guest, Guest::Runs | Guest::Cut) {
        if !isolated {
            steps.push(Step::NoteIsolated);
        }
        steps.push(Step::Pause);
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fence::book::{Allowed, Fenced};
    use lifeboat::units::UnixMs;

    #[test]
    fn of_two_copies_the_one_that_a_later_failover_made_is_right() {
        let at = |current| Fenced { current: Generation(current), at: UnixMs(1), saved: None };
        let record = |fenced: Option<u64>| Record { fenced: fenced.map(at), ..Record::default() };
        let (silent, open) = (SiteWord::Silent, |no| SiteWord::Open(Generation(no)));
        let fenced = |no| SiteWord::Fenced(Generation(no));
        for (site, noted, label, want) in [
            (silent, Some(2), None, Verdict::Fenced(Generation(2))),
            (silent, Some(2), Some(2), Verdict::Fenced(Generation(2))),
            (silent, Some(2), Some(4), Verdict::Replica(Generation(4))),
            // The site that fenced it goes by what it knows, until the VM is handed over.
            (fenced(2), Some(2), Some(4), Verdict::Replica(Generation(4))),
            (open(5), Some(2), Some(4), Verdict::Owner),
            // It was failed over once more, heard now or before.
            (fenced(6), Some(2), Some(4), Verdict::Fenced(Generation(6))),
            (fenced(6), None, Some(4), Verdict::Fenced(Generation(6))),
            (silent, Some(6), Some(4), Verdict::Fenced(Generation(6))),
            // A label alone says nothing of what came after it.
            (silent, None, Some(4), Verdict::Unsure),
        ] {
            let got = verdict(site, &record(noted), label.map(Generation));
            assert_eq!(got, want, "{site:?} {noted:?} {label:?}");
        }
        let allowed = Allowed { at: UnixMs(1), by: "root".into(), up_to: Generation(2) };
        let record = Record { allowed: Some(allowed), ..Record::default() };
        assert_eq!(verdict(fenced(2), &record, None), Verdict::Allowed);
        assert_eq!(verdict(fenced(3), &record, None), Verdict::Fenced(Generation(3)));
    }

    #[test]
    fn a_bound_copy_stands_while_no_lease_holds_and_goes_on_when_one_does() {
        let isolated = Record { isolated: Some(UnixMs(1)), ..Record::default() };
        let allowed = Allowed { at: UnixMs(1), by: "root".into(), up_to: Generation(0) };
        let allowed = Record { allowed: Some(allowed), ..Record::default() };
        let (open, none) = (SiteWord::Open(Generation(1)), Record::default());
        let (silent, runs, stands) = (SiteWord::Silent, Guest::Runs, Guest::Stands);
        let pause: &[Step] = &[Step::DropLease, Step::NoteIsolated, Step::Pause];
        let go_on: &[Step] = &[Step::Resume, Step::ForgetIsolated];
        for (site, kept, record, guest, want) in [
            (silent, Kept::Unbound, &none, runs, &[][..]),
            (silent, Kept::Held, &none, runs, &[]),
            (silent, Kept::Lapsed, &none, runs, pause),
            (open, Kept::Lapsed, &none, runs, pause),
            (open, Kept::Lapsed, &isolated, stands, &[Step::DropLease]),
            (SiteWord::Refused, Kept::Lapsed, &isolated, stands, &[Step::DropLease]),
            (silent, Kept::Held, &isolated, stands, go_on),
            (open, Kept::Held, &isolated, stands, go_on),
            // Behind its back somebody resumed it.
            (silent, Kept::Lapsed, &isolated, runs, &[Step::DropLease, Step::Pause]),
            (silent, Kept::Lapsed, &allowed, runs, &[]),
        ] {
            let facts = Facts {
                site,
                silent_for: Duration::from_secs(3600),
                guest,
                label: None,
                record,
                lease: Lease::Fresh,
                start_refused: false,
                autostart: false,
                may_save: false,
                saved_unnoted: false,
                held: false,
                kept,
            };
            let got = decide(&facts, Policy { pause_fenced: true, isolation: None });
            assert_eq!(got, want, "{site:?} {kept:?} {record:?}");
        }
    }

    #[test]
    fn the_hook_is_told_of_each_failover_though_it_refuses_already() {
        let fenced = Fenced { current: Generation(2), at: UnixMs(1), saved: None };
        let record = Record { fenced: Some(fenced), ..Record::default() };
        let steps = |site| {
            let facts = Facts {
                site,
                silent_for: Duration::ZERO,
                guest: Guest::Off,
                label: None,
                record: &record,
                lease: Lease::Fenced,
                start_refused: false,
                autostart: false,
                may_save: false,
                saved_unnoted: false,
                held: false,
                kept: Kept::Unbound,
            };
            decide(&facts, Policy { pause_fenced: true, isolation: None })
        };
        assert_eq!(steps(SiteWord::Silent), []);
        let six = Generation(6);
        assert_eq!(steps(SiteWord::Fenced(six)), [Step::RefuseStarts(six), Step::NoteFenced(six)]);
    }
}
