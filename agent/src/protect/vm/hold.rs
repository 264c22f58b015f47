//! The actor's part in a planned failover: its guest stands from the last cut on, until the site has decided.
//! Promises: as long as the site was not told that the guest is held, whatever goes wrong lets it go on; from then on only
//! the site's word does, or an operator's; both are remembered before anything is done. See [`crate::protect::holds`].

use super::{Actor, Setback};
use crate::{
    capture::source::{CaptureError, Source},
    protect::holds::Hold,
};
use lifeboat::{
    fault,
    id::{CutId, PointId},
    units::UnixMs,
    wire::{
        message::VmState,
        order::{CutOrder, Part},
    },
};
use std::time::Duration;
use tokio::time::Instant;

impl<S: Source> Actor<S> {
    /// Has the guest stand for its last cut.
    pub(super) async fn stand(&mut self, cut: CutId, at: UnixMs) -> Result<(), Setback> {
        let ran = self.given.source.runs().await?;
        if let Some(taking) = &mut self.taking {
            // From here on a setback undoes it.
            taking.standing = Some(ran);
        }
        let held = self.given.holds.file(self.given.vm);
        self.given.source.stand(&held).await?;
        fault::point("hold.stands");
        self.tell_part(cut, Part::Stopped { at, ran }).await;
        Ok(())
    }

    /// The final point is on its way: waits until it is durable, then holds the guest until the site has decided.
    pub(super) async fn see_through(&mut self, point: PointId) -> Result<(), Setback> {
        let Some((cut, ran)) = self.taking.as_ref().and_then(|taking| Some((taking.cut, taking.standing?)))
        else {
            return Ok(());
        };
        while !self.under_way.is_empty() {
            self.gauge.enter(self.waits_for());
            self.step(None).await?;
            self.outcome()?;
            let called_off = self.taking.as_ref().is_none_or(|taking| taking.cut != cut || taking.is_off());
            if called_off {
                return Err(Setback::CalledOff);
            }
        }
        self.settle().await;
        fault::point("hold.durable");
        let hold = Hold { cut, ran, point };
        self.given.holds.save(self.given.vm, &hold).map_err(Setback::Hold)?;
        fault::point("hold.kept");
        let kept = if ran { self.given.source.keep_standing().await } else { self.did_not_start().await };
        if let Err(error) = kept {
            self.given.holds.remove(self.given.vm).map_err(Setback::Hold)?;
            return Err(error.into());
        }
        fault::point("hold.unguarded");
        self.taking = None;
        self.hold(hold).await
    }

    /// Takes up, at the start, what an agent before us left standing.
    pub(super) async fn take_up_hold(&mut self) -> Result<(), Setback> {
        let vm = self.given.vm;
        let hold = match self.given.holds.load(vm) {
            Ok(None) => return Ok(()),
            Ok(Some(hold)) => hold,
            Err(error) => {
                let why = format!(
                    "its guest may be held for a failover, and the record of that can't be read: {error}"
                );
                self.set_state(VmState::Refused, Some(why)).await;
                return Err(Setback::Hold(error));
            }
        };
        if self.given.source.runs().await? {
            // Somebody let it go on: the site will be told when it asks.
            return self.given.holds.remove(vm).map_err(Setback::Hold);
        }
        // A guard that was left over must not be taken for that of a later cut.
        let _ = self.given.source.keep_standing().await;
        self.hold(hold).await
    }

    /// Holds the guest until the site says what becomes of it.
    async fn hold(&mut self, hold: Hold) -> Result<(), Setback> {
        let (vm, point) = (self.given.vm, hold.point);
        let held = Part::Held { point };
        self.set_state(VmState::Yielding, Some(HELD.into())).await;
        if let Some(before) = self.asked.take() {
            self.tell_part(before.cut, Part::Out { why: HELD.into() }).await;
        }
        tracing::warn!(vm = %self.given.name, %point, "the guest is held for a planned failover");
        let mut told = false;
        loop {
            if let Some((_, order)) = self.verdict.take_if(|(cut, _)| *cut == hold.cut) {
                match self.carry_out(&hold, order).await {
                    Ok(gone) => return self.end_hold(hold.cut, gone).await,
                    Err(error) => {
                        tracing::error!(vm = %self.given.name, %error, "the guest is still held; trying again");
                        self.verdict.get_or_insert((hold.cut, order));
                    }
                }
            }
            let linked = self.outbox.as_ref().is_some_and(|outbox| outbox.orders);
            if linked && !told {
                self.tell_part(hold.cut, held.clone()).await;
            }
            told = linked;
            if !self.given.holds.is_held(vm) || self.given.source.runs().await.unwrap_or(false) {
                tracing::warn!(vm = %self.given.name, "the guest was let go on by somebody else");
                return self.end_hold(hold.cut, false).await;
            }
            self.step(Some(Instant::now() + LOOK)).await?;
        }
    }

    /// What the site has decided; whether the guest is gone.
    async fn carry_out(&mut self, hold: &Hold, order: CutOrder) -> Result<bool, CaptureError> {
        if let CutOrder::Resume { generation } = order {
            self.adopt(generation).await;
            fault::point("hold.before-resume");
            if hold.ran {
                self.given.source.go_on().await?;
            }
            fault::point("hold.resumed");
            return Ok(false);
        }
        fault::point("hold.before-shut-off");
        self.given.source.shut_off().await?;
        fault::point("hold.shut-off");
        if let CutOrder::ShutOff { generation } = order {
            self.give_away(generation).await;
        }
        Ok(true)
    }

    async fn end_hold(&mut self, cut: CutId, gone: bool) -> Result<(), Setback> {
        self.given.holds.remove(self.given.vm).map_err(Setback::Hold)?;
        fault::point("hold.ended");
        tracing::info!(vm = %self.given.name, gone, "the guest is held no more");
        self.tell_part(cut, Part::HoldEnded { gone }).await;
        self.verdict = None;
        Ok(())
    }

    /// An order to end a hold that is over already: the answer was lost.
    pub(super) async fn answer_late_verdict(&mut self) {
        let Some((cut, order)) = self.verdict.take() else { return };
        let gone = match order {
            CutOrder::Resume { generation } => {
                self.adopt(generation).await;
                false
            }
            CutOrder::ShutOff { generation } => {
                self.give_away(generation).await;
                // One that somebody let go on is a copy that knows more than its replica: the fence keeps what that is.
                match self.given.source.runs().await {
                    Ok(true) => false,
                    Ok(false) => self.given.source.shut_off().await.is_ok(),
                    Err(_) => return,
                }
            }
            CutOrder::Prepare { .. }
            | CutOrder::Freeze
            | CutOrder::Stop { .. }
            | CutOrder::Go { .. }
            | CutOrder::CallOff => return,
        };
        self.tell_part(cut, Part::HoldEnded { gone }).await;
    }

    /// Lets a guest go on that stood for a cut which does not come about.
    pub(super) async fn undo_stand(&mut self, ran: bool) {
        while ran && let Err(error) = self.given.source.go_on().await {
            tracing::error!(vm = %self.given.name, %error, "the guest stands, and can't be let go on yet");
            tokio::time::sleep(AGAIN).await;
            if *self.given.stop.borrow() {
                // Its guard stays: the watchdog goes on trying.
                return;
            }
        }
    }
}

const HELD: &str = "it stands for a planned failover, until the site has decided; if the site is lost for good and no replica \
                    runs, `lifeboat-agent resume-held` lets it go on";
/// Between two looks whether somebody else let it go on.
const LOOK: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_millis(200);
