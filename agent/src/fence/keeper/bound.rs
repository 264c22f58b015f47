//! The keeper's part in keeping a VM under a witness: what the witness is to say of it, and what the guard has done to it.

use super::{FenceError, Keeper};
use crate::{
    fence::{
        book::Record,
        decide::{Guest, Verdict, verdict},
    },
    protect::neighbour::SiteWord,
    witness::hold::Wish,
};

impl Keeper {
    pub(super) fn wish(&self, wish: Wish) {
        if let Some(keeping) = &self.keeping {
            keeping.wish(wish);
        }
    }

    /// What the witness is to say of it.
    pub(super) fn wished(&self, site: SiteWord, guest: Guest, record: &Record) -> Wish {
        match verdict(site, record, self.label) {
            Verdict::Fenced(_) | Verdict::Allowed => Wish::Unbind,
            // A copy that runs on when it was failed over can't be kept.
            _ if !self.policy.pause_fenced || guest == Guest::Off => Wish::Free,
            Verdict::Owner | Verdict::Replica(_) | Verdict::Unsure => Wish::Keep,
        }
    }

    /// What the guard paused is ours to resume.
    pub(super) fn note_guard(&self, record: Record) -> Result<Record, FenceError> {
        let Some(keeping) = self.keeping.as_ref().filter(|keeping| keeping.files().was_paused(self.vm))
        else {
            return Ok(record);
        };
        if record.isolated.is_none() && record.fenced.is_none() {
            let now = self.tools.clock.now();
            self.change(|record| record.isolated = Some(now))?;
        }
        let failed = |source| FenceError::File { what: "taking note of what the guard did", source };
        keeping.files().forget_paused(self.vm).map_err(failed)?;
        self.tools.book.load(self.vm).map_err(failed)
    }
}
