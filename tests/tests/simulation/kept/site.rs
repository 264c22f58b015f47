//! The site's part: when it claims a VM, and what follows; a claim outlives its controller.

use super::{Claim, ME, VM, World};
use lifeboat::witness::Entry;
use lifeboat_site_controller::automatic::decide::{Member, claims, heard_of, is_claimed, part, why_not};
use rand::Rng;
use std::time::Duration;

const SILENT: Duration = Duration::from_secs(20);

impl World {
    pub(super) fn site_looks(&mut self) {
        let now = self.clock(2);
        if self.replica {
            return;
        }
        if let Some(mut claim) = self.claim.take() {
            if claim.taken {
                // The failover's own steps, in time or late.
                if self.rng.random_bool(0.3) {
                    self.generation = claim.part.generation;
                    (self.replica, self.failovers) = (true, self.failovers + 1);
                    return;
                }
            } else if self.arrives(2) {
                let changes = claims("site", &claim.name, std::slice::from_ref(&claim.part));
                let done = self.witness.change_now(&changes);
                if !self.arrives(2) {
                    self.claim = Some(claim);
                    return;
                }
                claim.taken =
                    matches!(done, Ok(Some(_))) || is_claimed(&claim.name, &[self.witness.look_now(VM)]);
                if !claim.taken {
                    return;
                }
            }
            self.claim = Some(claim);
            return;
        }
        let silent_for = Duration::from_millis(now - self.site_heard.max(self.site_began));
        let mut member = Member {
            vm: VM,
            name: "web".into(),
            connected: false,
            silent_for,
            owner: Some(ME.into()),
            generation: self.generation,
            entry: Entry::default(),
        };
        if heard_of(&member, SILENT).is_some() || !self.arrives(2) {
            return;
        }
        member.entry = self.witness.look_now(VM);
        if self.arrives(2) && why_not(&member).is_none() {
            self.claims += 1;
            self.claim = Some(Claim { name: self.claims.to_string(), part: part(&member), taken: false });
        }
    }
}
