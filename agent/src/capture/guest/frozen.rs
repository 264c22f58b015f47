//! File systems of a guest that are frozen for a cut without memory: whether that is wished, done, and what is told of it.
//! Promises: with memory nothing is frozen, as such a point lacks nothing; what was frozen for a cut is thawed when that
//! is dropped, wherever it stands.

use super::State;
use crate::capture::{
    freeze::{FreezeError, Frozen, WasFrozen},
    source::Attained,
};
use lifeboat::{
    format::manifest::Consistency,
    hypervisor::{
        domain_xml::resumed::Resumed,
        libvirt::{Domain, DomainAgent, XmlView},
    },
    wire::order::ConsistencyWish,
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Shared by the source and its cut.
#[derive(Clone, Default)]
pub struct Freezing(Arc<Mutex<Shared>>);

#[derive(Default)]
struct Shared {
    wish: ConsistencyWish,
    attained: Option<Attained>,
    frozen: Option<Frozen<DomainAgent>>,
}

impl Freezing {
    pub fn wish(&self, wish: ConsistencyWish) {
        let mut shared = self.lock();
        if shared.wish != wish {
            (shared.wish, shared.attained) = (wish, None);
        }
    }

    pub fn attained(&self) -> Option<Attained> {
        self.lock().attained.clone()
    }

    fn is_wished(&self) -> bool {
        self.lock().wish == ConsistencyWish::App
    }

    /// What of an earlier cut is still frozen is thawed.
    pub fn drop_frozen(&self) {
        let frozen = self.lock().frozen.take();
        drop(frozen);
    }

    fn take(&self) -> Option<Frozen<DomainAgent>> {
        self.lock().frozen.take()
    }

    fn tell(&self, attained: bool, words: String) {
        let mut shared = self.lock();
        let attained = Attained { attained, words };
        if shared.attained.as_ref().is_none_or(|before| before.attained != attained.attained) {
            tracing::info!(
                attained = attained.attained,
                words = attained.words,
                "points are app-consistent, or not"
            );
        }
        shared.attained = Some(attained);
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether file systems can be frozen for a cut. `None` where that is not wished.
pub type Freezable = Option<Result<(), FreezeError>>;

/// Asked when a cut begins.
pub fn ask(state: &mut State, domain: &Domain, has_memory: bool) -> Freezable {
    state.freezing.drop_frozen();
    let tidied = state.freezer.tidy();
    if !state.freezing.is_wished() {
        return None;
    }
    if has_memory {
        state.freezing.tell(true, "points have memory, for which nothing need be frozen".into());
        return None;
    }
    let has_channel = || Resumed::read(&domain.xml(XmlView::Active).ok()?).ok().map(|found| found.agent);
    let asked = tidied.and_then(|()| state.freezer.ask(has_channel() == Some(true), || domain.guest_agent()));
    Some(asked)
}

/// Freezes, where that is wished and can be done.
pub fn freeze(state: &mut State, domain: &Domain, freezable: &Freezable) {
    if let Some(Ok(())) = freezable
        && state.freezing.lock().frozen.is_none()
    {
        match state.freezer.freeze(domain.guest_agent()) {
            Ok(frozen) => state.freezing.lock().frozen = Some(frozen),
            Err(error) => not_frozen(state, &error),
        }
    }
}

/// Thaws before the guest stands, which may be for long.
pub fn flushed(state: &mut State, freezable: &Freezable) {
    if let Some(frozen) = state.freezing.take()
        && thaw(state, freezable, Some(frozen)) == Consistency::App
    {
        let words = "the last point before a planned failover is crash-consistent; what was written before was flushed to \
                     the disks";
        state.freezing.tell(false, words.into());
    }
}

/// What was frozen for this cut, to be thawed when its guest goes on, or dropped if that fails.
pub fn held(state: &State) -> Option<Frozen<DomainAgent>> {
    state.freezing.take()
}

/// The guest goes on: thaws, and says what the point is.
pub fn thaw(state: &mut State, freezable: &Freezable, frozen: Option<Frozen<DomainAgent>>) -> Consistency {
    let Some(frozen) = frozen else {
        match freezable {
            Some(Err(error)) => not_frozen(state, error),
            // Where it was tried, it was told why that failed.
            Some(Ok(())) if state.freezing.attained().is_none_or(|before| before.attained) => {
                let why = "points are crash-consistent only: the site did not say when to freeze; it is of an older release";
                state.freezing.tell(false, why.into());
            }
            Some(Ok(())) | None => {}
        }
        return Consistency::Crash;
    };
    match frozen.thaw() {
        Ok(WasFrozen { systems, lasted }) => {
            state.freezer.worked();
            tracing::debug!(systems, lasted_us = lasted.as_micros(), "frozen for the cut");
            let words = format!("file systems ({systems}) were frozen for {} ms", lasted.as_millis());
            state.freezing.tell(true, words);
            Consistency::App
        }
        Err(error) => {
            state.freezer.failed(error.clone());
            not_frozen(state, &error);
            Consistency::Crash
        }
    }
}

fn not_frozen(state: &State, error: &FreezeError) {
    state.freezing.tell(false, format!("points are crash-consistent only: {error}"));
}
