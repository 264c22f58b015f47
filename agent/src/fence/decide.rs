//! What is to be done about a copy of a VM, given all that is known: a pure function, which the daemon and the simulation
//! call alike.
//! Promises: a copy that was fenced is paused, and never resumed or started by us; each step may be done again, and
//! whoever dies between two of them is followed by somebody who is told the rest.

use super::book::Record;
use crate::protect::neighbour::SiteWord;
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
    Fenced(Generation),
    /// The site has not answered.
    Unsure,
}

pub fn verdict(site: SiteWord, record: &Record) -> Verdict {
    let said = if let SiteWord::Fenced(current) = site { Some(current) } else { None };
    let fenced = said.max(record.fenced.as_ref().map(|fenced| fenced.current));
    let allowed = record.allowed.as_ref().map(|allowed| allowed.up_to);
    // What an operator overruled was that failover, and none after it.
    let overruled = |current| allowed.is_some_and(|up_to| up_to >= current);
    match (fenced, site) {
        (Some(current), SiteWord::Open(ours)) if ours >= current => Verdict::Owner,
        (Some(current), _) if !overruled(current) => Verdict::Fenced(current),
        (Some(_), _) => Verdict::Allowed,
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
    match verdict(facts.site, facts.record) {
        Verdict::Fenced(current) => fenced(facts, policy, current),
        Verdict::Owner => may_run(facts, true),
        Verdict::Allowed => may_run(facts, false),
        Verdict::Unsure => unsure(facts, policy),
    }
}

fn fenced(facts: &Facts<'_>, policy: Policy, current: Generation) -> Vec<Step> {
    let mut steps = Vec::new();
    if facts.lease != Lease::Fenced {
        steps.push(Step::RefuseStarts(current));
    }
    let known = facts.record.fenced.as_ref();
    if known.is_none_or(|known| known.current < current) {
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
