//! Whose points of a VM are taken: the rules by which a VM changes hands between agents. Pure.
//! Promises: two agents never write one history in turns. A VM changes hands only if the guest is known to have moved (it
//! came in by a live migration, and its owner does not say that it runs there), or on an operator's word. Called by `slot`.

use lifeboat::{format::owner::Owner, wire::message::Place};

/// What the site has of the owner, now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// No session of it watches the VM.
    Absent,
    /// It watches the VM and has not said where the guest is.
    Unsaid,
    Said(Place),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has it already.
    Keep,
    /// It takes over, once that is on stable storage.
    Take,
    Refuse(String),
}

/// Judges `claimant`, whose host runs the guest; `migrated`: it came in by a live migration.
pub fn judge(owner: Option<&Owner>, word: Word, claimant: &str, migrated: bool) -> Verdict {
    let who = match owner {
        None | Some(Owner::Released(_)) => return Verdict::Take,
        Some(owner) if owner.writer() == Some(claimant) => return Verdict::Keep,
        Some(Owner::Left(agent)) if migrated => {
            tracing::debug!(from = agent, to = claimant, "a guest that had left has arrived");
            return Verdict::Take;
        }
        Some(Owner::Left(agent)) => {
            format!(
                "this VM was migrated away from {agent}'s host, and this copy of it did not come in by a migration"
            )
        }
        Some(Owner::Agent(agent) | Owner::HandedTo { agent, .. }) => match word {
            Word::Said(Place::Here { .. }) => format!("agent {agent} protects this VM and has it running"),
            Word::Unsaid => format!("agent {agent} protects this VM and does not say that it left"),
            Word::Absent | Word::Said(Place::NotHere | Place::Left) if migrated => return Verdict::Take,
            Word::Absent => {
                format!(
                    "agent {agent} protects this VM and is not connected; nothing shows that the guest moved"
                )
            }
            Word::Said(Place::NotHere | Place::Left) => {
                format!(
                    "agent {agent} protects this VM; it is off there, and nothing shows that the guest moved"
                )
            }
        },
    };
    Verdict::Refuse(format!(
        "{who}. No point of it is taken from {claimant}. If this is the right copy, and no other runs, run `lifeboat \
         release VM` at the site"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lifeboat::units::Generation;

    const WORDS: [Word; 6] = [
        Word::Absent,
        Word::Unsaid,
        Word::Said(Place::Here { migrated: false }),
        Word::Said(Place::Here { migrated: true }),
        Word::Said(Place::NotHere),
        Word::Said(Place::Left),
    ];

    fn takes(owner: &Owner, word: Word, claimant: &str, migrated: bool) -> bool {
        judge(Some(owner), word, claimant, migrated) == Verdict::Take
    }

    #[test]
    fn a_vm_changes_hands_only_if_it_came_in_by_a_migration_and_its_owner_does_not_say_that_it_runs_there() {
        let handed = Owner::HandedTo { agent: "a".into(), generation: Generation(3) };
        for (owner, word) in
            [Owner::Agent("a".into()), handed].iter().flat_map(|owner| WORDS.map(|word| (owner, word)))
        {
            let runs = matches!(word, Word::Unsaid | Word::Said(Place::Here { .. }));
            assert_eq!(takes(owner, word, "b", true), !runs, "{word:?}");
            assert!(!takes(owner, word, "b", false), "{word:?}");
            for migrated in [false, true] {
                assert_eq!(judge(Some(owner), word, "a", migrated), Verdict::Keep, "{word:?}");
            }
        }
    }

    #[test]
    fn a_copy_started_where_the_guest_left_is_refused_there_and_anywhere_else() {
        let left = Owner::Left("a".into());
        for (word, claimant) in WORDS.into_iter().flat_map(|word| [(word, "a"), (word, "b")]) {
            assert!(takes(&left, word, claimant, true), "{word:?} {claimant}");
            let Verdict::Refuse(why) = judge(Some(&left), word, claimant, false) else {
                panic!("{word:?} {claimant}")
            };
            assert!(why.contains("migrated away from a") && why.contains("lifeboat release"), "{why}");
        }
    }

    #[test]
    fn a_new_vm_and_one_that_was_released_are_whoever_s_has_them_running() {
        for (word, migrated) in WORDS.into_iter().flat_map(|word| [(word, false), (word, true)]) {
            assert_eq!(judge(None, word, "b", migrated), Verdict::Take);
            for claimant in ["a", "b"] {
                assert!(takes(&Owner::Released("a".into()), word, claimant, migrated));
            }
        }
    }
}
