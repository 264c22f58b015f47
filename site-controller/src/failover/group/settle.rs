//! Sources that could not be told what became of them are told until all have heard it. Promises that one task does so for a
//! group, however often its failover is asked for meanwhile. Called by `api`, `automatic` and the daemon after each failover.

use super::{GroupError, Groups, Kind, Phase};
use crate::failover::progress::Watcher;
use lifeboat::id::GroupId;
use std::{sync::PoisonError, time::Duration};

/// Between two tries to end a source's hold.
const TRY_AGAIN: Duration = Duration::from_secs(2);

impl Groups {
    /// Ends when all have heard it, or at once where another task sees to that; for a task of its own.
    pub async fn settle(&self, id: GroupId) {
        if !self.settling.lock().unwrap_or_else(PoisonError::into_inner).insert(id) {
            return;
        }
        while !self.is_settled(id) {
            tokio::time::sleep(TRY_AGAIN).await;
            match self.take_up(id, &Watcher::nobody()).await {
                Ok(()) | Err(GroupError::Busy) => {}
                Err(error) => tracing::warn!(%error, "a group's failover is not settled yet"),
            }
        }
    }

    /// Looked at under the lock: whoever has a failover to settle from now on begins a task of his own.
    fn is_settled(&self, id: GroupId) -> bool {
        let mut settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let settled = match self.journal.load_group(id) {
            Ok(None) => true,
            // An emergency is its operator's to finish.
            Ok(Some(record)) if record.kind == Kind::Emergency && record.phase < Phase::Running => true,
            Ok(Some(record)) => record.is_over(),
            Err(error) => {
                tracing::warn!(%error, "a group's failover can't be settled");
                false
            }
        };
        if settled {
            settling.remove(&id);
        }
        settled
    }
}
