//! The actor's part of a resync: asks the site, waits for its answers, ships what differs.
//! Promises: before the pause everything that could be asked was answered; nothing waits inside it.

use super::{Actor, Setback};
use crate::{
    capture::source::CaptureError, capture::source::Source, protect::resync::Resync, ship::seal::Sealer,
};
use lifeboat::{
    format::manifest::{Image, PointMeta},
    id::PointId,
    page::{PAGE, PageGroup},
    session::sender::Standing,
    wire::message::VmState,
};

impl<S: Source> Actor<S> {
    /// Forgets what the site holds where an operator wants it compared: the next point is then of everything.
    pub(super) async fn forget_if_asked(&mut self) -> Result<(), Setback> {
        if !self.given.neighbour.state().afresh {
            return Ok(());
        }
        self.given.source.leave().await?;
        self.given.neighbour.set_forgotten();
        tracing::info!(vm = %self.given.name, "the next point is compared with the site's copy, as was asked for");
        Ok(())
    }

    /// Learns what the site holds of those images that the source would send in full.
    pub(super) async fn prepare_comparison(
        &mut self,
        basis: Option<PointId>,
        images: &[Image],
    ) -> Result<(), Setback> {
        self.resync = basis.and_then(|basis| Resync::begin(self.given.vm, basis, images));
        while self.resync.as_ref().is_some_and(|resync| !resync.is_prepared()) {
            self.ask().await;
            self.show_comparison().await;
            self.outcome()?;
            self.step(None).await?;
        }
        if let Some(resync) = &self.resync {
            let (compared, full) = resync.counts();
            tracing::info!(vm = %self.given.name, compared, full, "comparing images with the site's");
        }
        Ok(())
    }

    /// Ships captured pages, or those of them that differ from the site's.
    pub(super) async fn take(&mut self, sealer: &mut Sealer, group: PageGroup) -> Result<(), Setback> {
        let Some(resync) = &mut self.resync else { return self.ship(sealer, group).await };
        resync.put(group);
        self.show_comparison().await;
        self.hand_on(sealer, |resync| !resync.is_full()).await
    }

    /// Judges what was captured before the pause.
    pub(super) async fn close_comparison(&mut self, sealer: &mut Sealer) -> Result<(), Setback> {
        if let Some(resync) = &mut self.resync {
            resync.close();
        }
        self.hand_on(sealer, Resync::is_quiet).await
    }

    /// Everything was captured: judges the rest, and says what the images then are.
    pub(super) async fn finish_comparison(
        &mut self,
        sealer: &mut Sealer,
        meta: &mut PointMeta,
    ) -> Result<(), Setback> {
        if let Some(resync) = &mut self.resync {
            if !resync.fits(meta) {
                let why = "the guest's memory or disks changed while they were being compared";
                return Err(CaptureError::Failed(why.into()).into());
            }
            resync.finish();
        }
        self.hand_on(sealer, Resync::is_quiet).await?;
        if let Some(resync) = self.resync.take() {
            resync.amend(meta);
            let tally = resync.tally();
            let [memory, disks] = [0, 1].map(|kind| (tally.captured[kind], tally.handed_on[kind]));
            for (bytes, (captured, sent)) in
                [(&mut meta.stats.memory_changed_bytes, memory), (&mut meta.stats.disk_changed_bytes, disks)]
            {
                *bytes = bytes.saturating_sub(captured * PAGE as u64) + sent * PAGE as u64;
            }
            tracing::info!(
                vm = %self.given.name, memory_pages = memory.0, memory_pages_sent = memory.1,
                disk_pages = disks.0, disk_pages_sent = disks.1, "compared with the site's copy"
            );
        }
        Ok(())
    }

    /// Ships what differs, until `enough`.
    async fn hand_on(&mut self, sealer: &mut Sealer, enough: fn(&Resync) -> bool) -> Result<(), Setback> {
        loop {
            self.ask().await;
            while let Some(group) = self.resync.as_mut().and_then(Resync::pop) {
                self.ship(sealer, group).await?;
            }
            self.drain_events().await?;
            self.outcome()?;
            match &self.resync {
                Some(resync) if resync.has_ready() => {}
                Some(resync) if !enough(resync) => self.step(None).await?,
                Some(_) | None => return Ok(()),
            }
        }
    }

    /// Asks what is to be asked, if the site listens.
    pub(super) async fn ask(&mut self) {
        if let (Some(resync), Standing::Open { .. }) = (&mut self.resync, self.sender.standing()) {
            let questions = resync.questions().into_iter().map(lifeboat::session::sender::Action::Tell);
            let questions = questions.collect();
            self.perform(questions).await;
        }
    }

    async fn show_comparison(&mut self) {
        let Some(resync) = &self.resync else { return };
        let reason = format!("comparing with the site: {} %", resync.percent());
        if self.outbox.is_some() && self.status.reason.as_ref() != Some(&reason) {
            self.set_state(VmState::Comparing, Some(reason)).await;
        }
    }
}
