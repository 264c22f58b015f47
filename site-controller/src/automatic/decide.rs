//! Why a group is not failed over by itself, the claim where nothing is against it, and when a failover that went wrong
//! is tried again: pure, called by [`super`] and by the simulation alike. Promises: a VM is claimed only over the word
//! that was seen, of the agent that this site knows as the VM's, and only while its lease is gone.

use lifeboat::{
    id::VmId,
    units::{Generation, UnixMs},
    witness::{Change, Entry, Leasing, Revision, Word},
};
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// All that is known of one member.
#[derive(Clone, Debug)]
pub struct Member {
    pub vm: VmId,
    pub name: String,
    /// An agent is connected that has it running, or protects it.
    pub connected: bool,
    pub silent_for: Duration,
    /// The agent that writes its history, as this site knows it.
    pub owner: Option<String>,
    pub generation: Generation,
    pub entry: Entry,
}

/// One member's part of a claim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    pub vm: VmId,
    /// The word that was seen.
    pub over: u64,
    /// The failover's generation.
    pub generation: Generation,
}

/// Before the witness is asked.
pub fn heard_of(member: &Member, silent: Duration) -> Option<String> {
    let name = &member.name;
    if member.connected {
        return Some(format!("the agent of {name} is connected"));
    }
    (member.silent_for < silent).then(|| {
        let (now, wanted) = (member.silent_for.as_secs(), silent.as_secs());
        format!("the agent of {name}{SILENT_FOR}{now} s, {wanted} are waited for")
    })
}

/// By what the witness says.
pub fn why_not(member: &Member) -> Option<String> {
    let name = &member.name;
    let (agent, generation) = match &member.entry.word {
        Some(Word::Kept { agent, generation }) => (agent, *generation),
        Some(Word::Free { agent, .. }) => {
            return Some(format!("agent {agent} does not keep {name} at the witness"));
        }
        Some(Word::Claimed { site, generation, .. }) => {
            return Some(format!(
                "site {site} has claimed {name} (generation {generation}), and nobody keeps it since"
            ));
        }
        None => return Some(format!("no agent keeps {name} at the witness")),
    };
    if member.entry.leased {
        return Some(format!("the lease of agent {agent} is alive: {name} may run there"));
    }
    if member.owner.as_ref() != Some(agent) {
        let known = member.owner.as_deref().unwrap_or("nobody");
        return Some(format!(
            "the witness says that agent {agent} keeps {name}, and this site knows {known}"
        ));
    }
    (generation != member.generation).then(|| {
        let ours = member.generation;
        format!("the witness knows {name} by generation {generation}, this site by {ours}")
    })
}

/// Of a member that nothing is against.
pub fn part(member: &Member) -> Part {
    Part { vm: member.vm, over: member.entry.revision.0, generation: member.generation.next() }
}

/// Done once or not at all, however often it is asked for.
pub fn claims(site: &str, claim: &str, parts: &[Part]) -> Vec<Change> {
    let one = |part: &Part| {
        let (site, claim, generation) = (site.to_owned(), claim.to_owned(), part.generation);
        let word = Word::Claimed { site, claim, generation };
        Change { vm: part.vm, over: Revision(part.over), word, leasing: Leasing::Gone }
    };
    parts.iter().map(one).collect()
}

/// What became of a claim, by what the witness says.
pub fn is_claimed(claim: &str, entries: &[Entry]) -> bool {
    let ours =
        |entry: &Entry| matches!(&entry.word, Some(Word::Claimed { claim: said, .. }) if said == claim);
    !entries.is_empty() && entries.iter().all(ours)
}

/// A claim's failover that was tried in vain, one time or several, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failed {
    times: u32,
    at: Instant,
    /// The group's last change then.
    changed_at: UnixMs,
    why: String,
}

impl Failed {
    /// What was tried since a change of the group is counted alone.
    pub fn again(before: Option<&Self>, at: Instant, changed_at: UnixMs, why: String) -> Self {
        let before = before.filter(|before| before.changed_at == changed_at);
        let times = before.map_or(0, |before| before.times).saturating_add(1);
        Self { times, at, changed_at, why }
    }

    /// How long it is waited from now on; `None`: it is to be tried.
    pub fn left(&self, now: Instant, changed_at: UnixMs) -> Option<Duration> {
        let doubled = 1u32.checked_shl(self.times.saturating_sub(1)).unwrap_or(u32::MAX);
        let wait = FIRST_WAIT.saturating_mul(doubled).min(LONGEST_WAIT);
        let left = wait.saturating_sub(now.saturating_duration_since(self.at));
        (self.changed_at == changed_at && !left.is_zero()).then_some(left)
    }

    pub fn said(&self, left: Duration) -> String {
        let often = if self.times > 1 { format!(" {} times", self.times) } else { String::new() };
        let seconds = left.as_millis().div_ceil(1000);
        format!("failed{often}: {}{AGAIN}{seconds} s", self.why)
    }
}

/// What is said but for the time that runs.
pub fn news(said: &str) -> &str {
    let cut = [SILENT_FOR, AGAIN].iter().filter_map(|word| said.find(word)).min();
    &said[..cut.unwrap_or(said.len())]
}

const SILENT_FOR: &str = " has been silent for ";
const AGAIN: &str = "; tried again in ";
const FIRST_WAIT: Duration = Duration::from_secs(5);
const LONGEST_WAIT: Duration = Duration::from_secs(300);

#[cfg(test)]
mod tests {
    use super::*;

    const CHANGED: UnixMs = UnixMs(7);

    fn again(before: Option<&Failed>, at: Instant) -> Failed {
        Failed::again(before, at, CHANGED, "no network `lan`".into())
    }

    #[test]
    fn what_fails_is_tried_again_later_and_later_but_never_later_than_in_five_minutes() {
        let (mut now, mut failed, mut waits) = (Instant::now(), None, Vec::new());
        for _ in 0..70 {
            failed = Some(again(failed.as_ref(), now));
            let of = failed.as_ref().unwrap();
            let left = of.left(now, CHANGED).unwrap();
            assert!(of.left(now + left / 2, CHANGED).is_some(), "too early");
            now += left;
            assert_eq!(of.left(now, CHANGED), None, "it is time");
            waits.push(left.as_secs());
        }
        assert_eq!(waits[..9], [5, 10, 20, 40, 80, 160, 300, 300, 300]);
        assert!(waits[9..].iter().all(|wait| *wait == 300));
    }

    #[test]
    fn a_group_that_was_changed_is_tried_at_once_and_its_tries_are_counted_anew() {
        let now = Instant::now();
        let third = again(Some(&again(Some(&again(None, now)), now)), now);
        assert_eq!(third.left(now, UnixMs(8)), None);
        let first = Failed::again(Some(&third), now, UnixMs(8), "again".into());
        assert_eq!(first.left(now, UnixMs(8)), Some(FIRST_WAIT));
        assert_eq!(again(Some(&third), now).left(now, CHANGED), Some(FIRST_WAIT * 8));
    }

    #[test]
    fn why_it_failed_and_when_it_is_tried_again_is_said_and_a_time_that_runs_is_no_news() {
        let now = Instant::now();
        let first = again(None, now);
        let said = first.said(Duration::from_millis(4_001));
        assert_eq!(said, "failed: no network `lan`; tried again in 5 s");
        let second = again(Some(&first), now).said(Duration::from_secs(10));
        assert_eq!(second, "failed 2 times: no network `lan`; tried again in 10 s");
        assert_eq!(news(&said), news(&first.said(Duration::from_secs(1))));
        assert_ne!(news(&said), news(&second));
        let silent = |secs| Member {
            vm: VmId::from_bytes([1; 16]),
            name: "web".into(),
            connected: false,
            silent_for: Duration::from_secs(secs),
            owner: None,
            generation: Generation(1),
            entry: Entry::default(),
        };
        let heard = |secs| heard_of(&silent(secs), Duration::from_secs(30)).unwrap();
        assert!(heard(1) != heard(2) && news(&heard(1)) == news(&heard(2)));
    }
}
