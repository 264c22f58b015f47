//! The actor's part about one point: cut, compared, compressed, and handed to the link up to its last frame.
//! Promises: a cut that is not sent whole is put back, and what was sent of it and is lost is not named to the source again.

use super::{Actor, Setback};
use crate::{
    capture::source::{Cut, Source},
    protect::pace::Stage,
    ship::{delta::Load, seal::Sealer},
};
use lifeboat::{format::manifest::PointMeta, id::PointId, page::PageGroup, wire::message::VmState};

impl<S: Source> Actor<S> {
    /// Cuts one point and sends it; one of several VMs if the site has asked for that.
    pub(super) async fn point(&mut self, over: Vec<PointId>) -> Result<(), Setback> {
        let point = (self.given.new_point)();
        let mut sent = self.cut_and_send(point, over).await;
        if let Ok(pause_us) = sent {
            self.has_cut(point, pause_us).await;
            sent = self.see_through(point).await.map(|()| pause_us);
        }
        if let Err(setback) = &sent {
            self.has_not_cut(setback).await;
        }
        sent.map(drop)
    }

    /// Returns how long the guest stood, in microseconds.
    async fn cut_and_send(&mut self, point: PointId, over: Vec<PointId>) -> Result<u64, Setback> {
        let basis = over.last().copied();
        self.gauge.begin(basis.is_some());
        self.gauge.enter(Stage::Capture);
        let mut cut = match self.given.source.begin(point, &over).await {
            Ok(cut) => cut,
            Err(error) => {
                let setback = error.into();
                self.give_up(&setback, None).await;
                return Err(setback);
            }
        };
        if let Err(setback) = self.note_power(cut.is_off()).await {
            self.give_up(&setback, None).await;
            let _ = cut.put_back().await; // nothing was begun
            return Err(setback);
        }
        self.status.set_memory(self.given.source.memory());
        if basis.is_none() {
            self.set_state(VmState::Seeding, None).await;
        }
        let carried = self.carry(point, cut.as_mut(), basis).await;
        self.resync = None;
        let setback = match carried {
            // From here on the next point may be begun over it, and nothing of it is forgotten.
            Ok(meta) => match cut.sent().await {
                Ok(()) => {
                    let pause_us = meta.stats.pause_us;
                    self.sent(point, meta).await;
                    return Ok(pause_us);
                }
                Err(error) => error.into(),
            },
            Err(setback) => {
                self.give_up(&setback, Some(point)).await;
                if let Err(error) = cut.put_back().await {
                    // Still owed: the source starts from what the site holds at the next `begin`, or in full.
                    tracing::warn!(vm = %self.given.name, %error, "putting a lost point back did not go cleanly");
                }
                return Err(setback);
            }
        };
        self.give_up(&setback, Some(point)).await;
        Err(setback)
    }

    /// Carries a cut to the site, up to its last frame.
    async fn carry(
        &mut self,
        point: PointId,
        cut: &mut dyn Cut,
        basis: Option<PointId>,
    ) -> Result<PointMeta, Setback> {
        self.make_way(basis, &cut.images()).await?;
        let reads_deltas = self.outbox.as_ref().is_some_and(|outbox| outbox.reads_deltas);
        self.deltas.begin(point, basis, reads_deltas);
        self.deltas.images(&cut.images());
        let actions = self.sender.begin(point, basis);
        self.perform(actions).await;
        self.prepare_comparison(basis, &cut.images()).await?;
        let mut sealer = Sealer::new(self.gauge.level(), self.given.settings.lanes.clone());
        while let Some(group) = cut.before().await? {
            self.take(&mut sealer, group).await?;
        }
        self.close_comparison(&mut sealer).await?;
        self.flush(&mut sealer).await?;
        self.gauge.cut();
        let mut meta = self.at_the_barrier(cut).await?;
        self.status.last_pause_us = Some(meta.stats.pause_us);
        self.deltas.all_images(&meta.images);
        while let Some(group) = cut.after().await? {
            self.take(&mut sealer, group).await?;
        }
        (meta.stats.memory_changed_bytes, meta.stats.disk_changed_bytes) = cut.changed();
        self.finish_comparison(&mut sealer, &mut meta).await?;
        self.flush(&mut sealer).await?;
        Ok(meta)
    }

    pub(super) async fn ship(&mut self, sealer: &mut Sealer, group: PageGroup) -> Result<(), Setback> {
        self.deltas.put(group);
        while let Some(load) = self.deltas.ready() {
            self.seal(sealer, load).await?;
        }
        Ok(())
    }

    async fn seal(&mut self, sealer: &mut Sealer, load: Load) -> Result<(), Setback> {
        while sealer.is_full() {
            self.ship_next(sealer).await?;
        }
        let level = self.gauge.level();
        self.status.zstd_level = level;
        sealer.set_level(level);
        sealer.put(load)?;
        self.gauge.enter(Stage::Capture);
        Ok(())
    }

    async fn flush(&mut self, sealer: &mut Sealer) -> Result<(), Setback> {
        while let Some(load) = self.deltas.finish_next() {
            self.seal(sealer, load).await?;
        }
        while self.ship_next(sealer).await? {}
        self.gauge.enter(Stage::Capture);
        Ok(())
    }

    /// Hands the next sealed frame to the sender, once there is room; `false` when none is in work.
    async fn ship_next(&mut self, sealer: &mut Sealer) -> Result<bool, Setback> {
        self.gauge.enter(Stage::Pack);
        let Some(frame) = sealer.take().await? else { return Ok(false) };
        self.gauge.enter(Stage::Link);
        self.drain_events().await?;
        while !self.sender.has_room(self.gauge.may_hold()) || self.lane_is_full() {
            self.outcome()?;
            self.step(None).await?;
        }
        self.outcome()?;
        self.gauge.shipped(frame.encoded_len());
        let actions = self.sender.push(frame);
        self.gauge.holds(self.sender.held_bytes());
        self.perform(actions).await;
        Ok(true)
    }

    /// Whether the link would make us wait for a frame to leave: nothing else could be heard meanwhile.
    pub(super) fn lane_is_full(&self) -> bool {
        self.outbox.as_ref().is_some_and(|outbox| outbox.frames.capacity() == 0 && !outbox.frames.is_closed())
    }
}
