//! What is said of a copy: what was done to it, and what its operator can do. Called by `keeper`, for status.

use super::{
    book::{Allowed, Fenced, Record},
    decide::{Guest, Policy, Verdict},
};
use crate::witness::{hold::Kept, keeping::Keeping};
use lifeboat::units::Generation;

/// Nothing where there is nothing to say.
pub fn say(name: &str, record: &Record, verdict: Verdict, guest: Guest, policy: Policy) -> Option<String> {
    match (verdict, &record.fenced, record.isolated) {
        (Verdict::Fenced(_), Some(fenced), _) => Some(fenced_words(name, fenced, guest, policy)),
        (Verdict::Replica(made_by), _, _) => Some(format!(
            "brought up here by a failover of generation {made_by}, later than the one that had fenced this host's copy; it is \
             not protected from here until `lifeboat reprotect` says so"
        )),
        (Verdict::Allowed, _, _) => record.allowed.as_ref().map(allowed_words),
        (_, _, Some(since)) if policy.isolation.is_none() => Some(format!(
            "paused since {since}: neither the site nor the witness has confirmed in time that this copy may run; it goes on \
             when one of them does, or at `lifeboat-agent allow {name}`"
        )),
        (_, _, Some(since)) => {
            let after = policy.isolation.unwrap_or_default().as_secs();
            Some(format!(
                "paused since {since}: the site has not answered for {after} s (on_isolation = \"pause\"); it goes on when \
                 the site says that it was not failed over, or at `lifeboat-agent allow {name}`"
            ))
        }
        _ => None,
    }
}

/// How the VM stands with the witness.
pub fn of_witness(keeping: &Keeping) -> String {
    let kept = match keeping.kept() {
        Kept::Unbound if !keeping.keeps() => "not kept, as `keep = false` says",
        Kept::Unbound => "not kept",
        Kept::Held => "kept",
        Kept::Lapsed => "no lease holds: it may not run",
    };
    keeping.said().map_or_else(|| kept.into(), |said| format!("{kept}; {said}"))
}

fn fenced_words(name: &str, fenced: &Fenced, guest: Guest, policy: Policy) -> String {
    let (current, at) = (fenced.current, fenced.at);
    let was = format!("failed over to the site (generation {current}), seen at {at}");
    match (&fenced.saved, guest) {
        (Some(folder), Guest::Off) => format!(
            "{was}; this copy does not run any more: what only it knows is in {}, its disks are where they were. \
             `lifeboat-agent diverged show {name}` shows it, `diverged discard {name}` gives it up",
            folder.display()
        ),
        (_, Guest::Off) => format!("{was}; this copy does not run, and must not be started"),
        (Some(folder), Guest::Stands) => format!(
            "{was}; it was put away in {}, and then somebody started it again: it is paused. End it with `virsh destroy {name}`",
            folder.display()
        ),
        (None, Guest::Stands) => format!(
            "{was}; this copy is paused, and only its memory knows what it did since. `virsh dumpxml {name}` shows it; \
             `lifeboat-agent diverged discard {name}` gives it up"
        ),
        (_, Guest::Runs | Guest::Cut) if !policy.pause_fenced => {
            format!("{was}; this copy RUNS ON, as on_fenced = \"keep\" says: shut it off")
        }
        (_, Guest::Runs | Guest::Cut) => format!("{was}; this copy is being paused"),
    }
}

fn allowed_words(allowed: &Allowed) -> String {
    let Allowed { at, by, up_to } = allowed;
    let over = if *up_to > Generation(0) { format!(", against generation {up_to}") } else { String::new() };
    format!("{by} has said at {at} that this copy is the right one{over}")
}
