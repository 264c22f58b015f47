//! The actor's part about a guest that is off: it has a point of what stands on its disks, and needs no other as long as
//! nothing of that changes; in a cut of several VMs it takes part with one all the same.
//! Promises: one that goes on elsewhere is left alone, and the site is told that this copy does not run; whoever starts the
//! guest is neither asked nor held up.

use super::{Actor, Setback};
use crate::capture::source::{CaptureError, Source};
use lifeboat::{
    id::PointId,
    wire::message::{Place, Refusal, VmState},
};
use std::time::Duration;
use tokio::time::Instant;

/// What the actor knows of a guest that is off.
pub(super) struct AtRest {
    /// It may be off: it was when it was looked at last, or nobody has looked yet.
    pub maybe: bool,
    /// The site said that another agent's copy is the VM.
    others: Option<(Instant, String)>,
}

impl Default for AtRest {
    fn default() -> Self {
        Self { maybe: true, others: None }
    }
}

impl<S: Source> Actor<S> {
    /// Whether no point is due by the clock, as the guest is off and the newest one is of what stands there.
    pub(super) async fn rests(&mut self, over: &[PointId]) -> bool {
        if !self.at_rest.maybe || self.taking.is_some() {
            return false;
        }
        if !matches!(self.given.source.rests(over).await, Ok(true)) {
            return false;
        }
        if self.under_way.is_empty() {
            self.goes_off().await;
            if self.status.state != VmState::Protected || self.status.reason.as_deref() != Some(OFF) {
                self.set_state(VmState::Protected, Some(OFF.into())).await;
            }
        }
        true
    }

    /// A point was begun. Notes whether the guest is off, and refuses one of a copy that is not the VM.
    pub(super) async fn note_power(&mut self, is_off: bool) -> Result<(), Setback> {
        let was_off = self.status.off;
        self.at_rest.maybe = is_off;
        if !is_off {
            (self.status.off, self.at_rest.others) = (false, None);
            if was_off && self.status.state == VmState::Protected {
                self.set_state(VmState::Comparing, Some(STARTED.into())).await;
            }
            return Ok(());
        }
        self.goes_off().await;
        if self.place.left || self.given.neighbour.state().away {
            return Err(CaptureError::NotRunning("it is off here".into()).into());
        }
        match &self.at_rest.others {
            Some((at, why)) if at.elapsed() < ASK_OTHERS_AGAIN => {
                Err(CaptureError::NotRunning(format!("it is off here: {why}")).into())
            }
            _ => Ok(()),
        }
    }

    async fn goes_off(&mut self) {
        self.status.off = true;
        self.place.absent();
        self.say(Place::NotHere).await;
    }

    /// Where another agent's copy is the VM, one that is off here is nobody's rival.
    pub(super) fn note_others(&mut self, setback: Setback) -> Setback {
        match setback {
            Setback::Refused(Refusal::HeldElsewhere { why }) if self.status.off => {
                self.at_rest.others = Some((Instant::now(), why.clone()));
                CaptureError::NotRunning(format!("it is off here: {why}")).into()
            }
            other => other,
        }
    }

    /// An error if a guest that did not run does now.
    pub(super) async fn did_not_start(&mut self) -> Result<(), CaptureError> {
        if self.given.source.runs().await? {
            return Err(CaptureError::Failed("it was started meanwhile".into()));
        }
        Ok(())
    }

    /// Why it is in its state, where all is well.
    pub(super) fn why_well(&self) -> Option<String> {
        self.status.off.then(|| OFF.to_owned())
    }
}

const OFF: &str = "it is off; its newest point is of its disks as they stand";
const STARTED: &str = "it was started; its first point since is on its way";
const ASK_OTHERS_AGAIN: Duration = Duration::from_secs(60);
