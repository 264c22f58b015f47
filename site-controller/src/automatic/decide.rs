//! Why a group is not failed over by itself, and the claim where nothing is against it: pure, called by [`super`] and by the
//! simulation alike. Promises: a VM is claimed only over the word that was seen, of the agent that this site knows as the VM's, and
//! only while its lease is gone.

use lifeboat::{
    id::VmId,
    units::Generation,
    witness::{Change, Entry, Leasing, Revision, Word},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

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
        format!("the agent of {name} has been silent for {now} s, {wanted} are waited for")
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
