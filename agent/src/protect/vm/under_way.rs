//! The actor's part about points that were sent and are not durable yet: the next one may be cut meanwhile.
//! Promises: what builds on what is told to the source as it is; a point counts as durable on the site's word only; where
//! one of them is lost all are given up, and what the site then says it holds is what the next one starts from.

use super::{Actor, Setback};
use crate::{
    capture::source::Source,
    protect::{pace::Stage, resync::Resync},
};
use lifeboat::{
    format::manifest::{Image, PointMeta},
    id::PointId,
    session::sender::{Outcome, Standing},
};

/// All frames of it were handed to the link, and its end was told.
pub(super) struct Sent {
    point: PointId,
    meta: PointMeta,
}

/// Points that may be under way before the next one must wait: while one travels, the next one does too.
const UNDER_WAY_MAX: usize = 2;

impl<S: Source> Actor<S> {
    /// What the next point builds on: the newest durable point and those under way since, the basis last. `None`: it must
    /// wait.
    pub(super) fn may_begin(&self) -> Option<Vec<PointId>> {
        let Standing::Open { latest, .. } = self.sender.standing() else { return None };
        let mut over: Vec<PointId> = latest.iter().map(|latest| latest.point).collect();
        if !self.under_way.is_empty() {
            let overlaps = self.outbox.as_ref().is_some_and(|outbox| outbox.overlaps);
            // Nothing is begun over a first point: there would be nothing to go back to.
            if !overlaps || over.is_empty() || self.under_way.len() >= UNDER_WAY_MAX {
                return None;
            }
        }
        over.extend(self.under_way.iter().map(|sent| sent.point));
        Some(over)
    }

    /// Sees to it that nothing is under way if images of the next point must be compared: the site compares with its newest
    /// durable point.
    pub(super) async fn make_way(&mut self, basis: Option<PointId>, images: &[Image]) -> Result<(), Setback> {
        let compares = |basis| Resync::begin(self.given.vm, basis, images).is_some();
        if !basis.is_some_and(compares) {
            return Ok(());
        }
        while !self.under_way.is_empty() {
            self.gauge.enter(self.waits_for());
            self.step(None).await?;
            self.outcome()?;
        }
        Ok(())
    }

    /// What is waited for while nothing is left to do but to wait for the site's word.
    pub(super) fn waits_for(&self) -> Stage {
        if self.sender.held_bytes() > 0 { Stage::Link } else { Stage::Site }
    }

    /// The point is on its way, whole.
    pub(super) async fn sent(&mut self, point: PointId, meta: PointMeta) {
        self.under_way.push_back(Sent { point, meta: meta.clone() });
        let actions = self.sender.end(meta);
        self.perform(actions).await;
        self.status.under_way = self.under_way.len();
        self.given.board.put(self.status.clone());
    }

    /// Notes what the site has said to be durable.
    pub(super) async fn note_arrivals(&mut self) {
        while let Some(Outcome::Durable { point, committed_at, .. }) = self.outcomes.front().cloned() {
            self.outcomes.pop_front();
            let Some(at) = self.under_way.iter().position(|sent| sent.point == point) else { continue };
            self.deltas.durable(point);
            self.unsettled.push(point);
            for Sent { point, meta } in self.under_way.drain(..=at).collect::<Vec<_>>() {
                self.succeeded(point, &meta, committed_at).await;
            }
        }
    }

    /// Losing what is under way is an error.
    pub(super) fn outcome(&mut self) -> Result<(), Setback> {
        let Some(Outcome::Lost { .. }) = self.outcomes.front() else { return Ok(()) };
        match self.outcomes.pop_front() {
            Some(Outcome::Lost { why, .. }) => Err(why.into()),
            _ => Ok(()),
        }
    }

    /// Has the source forget what durable points carried; no cut is open.
    pub(super) async fn settle(&mut self) {
        for point in std::mem::take(&mut self.unsettled) {
            if let Err(error) = self.given.source.settle(point).await {
                // The next `begin` names what is durable.
                tracing::warn!(vm = %self.given.name, %point, %error, "settling a point did not go cleanly");
            }
        }
    }

    /// Gives up what the setback has lost: `cut`, if one was open, or everything under way.
    pub(super) async fn give_up(&mut self, setback: &Setback, cut: Option<PointId>) {
        self.status.points_lost += u64::from(cut.is_some());
        let actions = if setback.is_of_the_cut() {
            self.gauge.cut_lost();
            let newest = self.sender.points().last();
            if cut.is_some() && newest == cut { self.sender.abort_newest() } else { Vec::new() }
        } else {
            self.gauge.lost();
            self.outcomes.clear();
            self.status.points_lost += self.under_way.len() as u64;
            self.under_way.clear();
            self.sender.abort()
        };
        self.perform(actions).await;
    }
}

impl Setback {
    /// Only the point that was being cut is lost; those before it travel on.
    pub(super) fn is_of_the_cut(&self) -> bool {
        match self {
            Self::Stopping | Self::Capture(_) | Self::Seal(_) | Self::Hold(_) | Self::CalledOff => true,
            Self::Aside(_) | Self::Refused(_) | Self::LinkDown(_) => false,
        }
    }
}
