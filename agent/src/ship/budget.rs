//! What all VMs of one agent share: bytes of frames on their way, and threads that compress.
//! Promises: however many VMs there are, frames held stay within the budget plus one frame each, and groups in work
//! within the lanes plus one each; a VM that holds nothing always gets its one, so nobody starves. A VM alone gets half
//! of the bytes, and of n busy ones each gets an (n+1)th: what is left is there for the next that comes.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that may be held by all VMs together.
#[derive(Clone, Debug)]
pub struct Budget(Arc<Bytes>);

#[derive(Debug)]
struct Bytes {
    total: u64,
    held: AtomicU64,
}

/// One VM's part of it; given back when dropped.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Bytes>,
    mine: u64,
}

impl Budget {
    pub const DEFAULT: u64 = 128 << 20;

    pub fn new(total: u64) -> Self {
        Self(Arc::new(Bytes { total, held: AtomicU64::new(0) }))
    }

    pub fn share(&self) -> Share {
        Share { budget: self.0.clone(), mine: 0 }
    }

    pub fn held(&self) -> u64 {
        self.0.held.load(Ordering::Relaxed)
    }
}

impl Share {
    /// This VM holds so much now.
    pub fn hold(&mut self, bytes: u64) {
        if bytes >= self.mine {
            self.budget.held.fetch_add(bytes - self.mine, Ordering::Relaxed);
        } else {
            self.budget.held.fetch_sub(self.mine - bytes, Ordering::Relaxed);
        }
        self.mine = bytes;
    }

    /// How much it may hold: as much as is left for everybody else.
    pub fn most(&self) -> u64 {
        self.budget.total.saturating_sub(self.budget.held.load(Ordering::Relaxed))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.hold(0);
    }
}

/// Groups that may be compressed at once, by all VMs together.
#[derive(Clone, Debug)]
pub struct Lanes {
    most: usize,
    free: Arc<Semaphore>,
}

impl Lanes {
    /// None at all compresses in place.
    pub fn new(most: usize) -> Self {
        Self { most, free: Arc::new(Semaphore::new(most)) }
    }

    pub fn in_place(&self) -> bool {
        self.most == 0
    }

    /// One more for a VM that has `mine` groups in work: if at least as many are left for everybody else.
    pub fn try_take(&self, mine: usize) -> Option<OwnedSemaphorePermit> {
        if mine > self.free.available_permits() {
            return None;
        }
        self.free.clone().try_acquire_owned().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Everybody wants all there is, and takes turns by one frame.
    #[test]
    fn twenty_greedy_vms_stay_within_the_budget_and_get_the_same() {
        const FRAME: u64 = 256 << 10;
        let budget = Budget::new(Budget::DEFAULT);
        let mut shares: Vec<Share> = (0..20).map(|_| budget.share()).collect();
        for _ in 0..10_000 {
            for share in &mut shares {
                if share.mine == 0 || share.mine < share.most() {
                    share.hold(share.mine + FRAME);
                }
            }
        }
        assert!(budget.held() <= Budget::DEFAULT + 20 * FRAME, "{}", budget.held());
        let (least, most) =
            (shares.iter().map(|share| share.mine).min(), shares.iter().map(|share| share.mine).max());
        assert!(least.unwrap() >= Budget::DEFAULT / 21 - FRAME, "{least:?}");
        assert!(most.unwrap() <= least.unwrap() + 2 * FRAME, "{least:?} to {most:?}");
        shares.truncate(1);
        assert!(shares[0].most() > 100 << 20);
        drop(shares);
        assert_eq!(budget.held(), 0);
    }

    #[test]
    fn one_alone_gets_half_and_leaves_room_for_the_next() {
        let budget = Budget::new(1000);
        let mut alone = budget.share();
        while alone.mine < alone.most() {
            alone.hold(alone.mine + 1);
        }
        assert_eq!(budget.held(), 500);
        assert_eq!(budget.share().most(), 500);
    }
}
