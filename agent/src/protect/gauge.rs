//! One actor's instruments: how long it waits for what, what that makes of its pace, and how hard to compress.
//! Puts together [`pace`](super::pace), `ship::level` and `ship::budget`, so that the actor only says what it does.
//! Promises: nothing here fails, and nothing here changes what is sent except how it is packed.

use crate::{
    protect::pace::{Lap, Meter, Pace, Stage, Times, Verdict},
    ship::{
        budget::{Budget, Share},
        level::{LevelControl, Observed},
        spare::SpareCpu,
    },
};
use lifeboat::units::Compression;
use std::{collections::VecDeque, time::Duration};
use tokio::time::Instant;

#[derive(Debug)]
pub struct Gauge {
    interval: Duration,
    meter: Meter,
    pace: Pace,
    share: Share,
    /// The newest point, and the laps of those before it that are not durable yet.
    point: Option<UnderWay>,
    sent: VecDeque<(Lap, Option<Instant>, bool)>,
    level: LevelControl,
    spare: SpareCpu,
    /// When the level was last thought about, and the times up to then.
    observed: (Instant, Times),
}

#[derive(Debug)]
struct UnderWay {
    begun: Instant,
    cut: Option<Instant>,
    /// Times and busy time when it began.
    times: Times,
    busy: Duration,
    bytes: u64,
    /// Bytes of those before it that were still on their way when it began.
    held: u64,
    /// When its lateness was last told.
    told: Instant,
    /// A first copy says nothing of the points that follow.
    counts: bool,
}

impl Gauge {
    pub fn new(interval: Duration, compression: Compression, budget: &Budget) -> Self {
        let now = Instant::now();
        Self {
            interval,
            meter: Meter::new(now),
            pace: Pace::new(interval),
            share: budget.share(),
            point: None,
            sent: VecDeque::new(),
            level: LevelControl::new(compression),
            spare: SpareCpu::default(),
            observed: (now, Times::default()),
        }
    }

    /// From now on this is what the actor waits for.
    pub fn enter(&mut self, stage: Stage) {
        self.meter.enter(stage, Instant::now());
    }

    /// A point begins. The lap of the one before ends here, if that is still under way.
    pub fn begin(&mut self, counts: bool) {
        if let Some(lap) = self.lap()
            && let Some(before) = self.point.take()
        {
            self.sent.push_back((lap, before.cut, before.counts));
        }
        let now = Instant::now();
        let (times, busy) = self.meter.read(now);
        let held = self.meter.held;
        self.point = Some(UnderWay { begun: now, cut: None, times, busy, bytes: 0, held, told: now, counts });
    }

    pub fn cut(&mut self) {
        if let Some(point) = &mut self.point {
            point.cut = Some(Instant::now());
        }
    }

    /// A frame of the point was handed to the link.
    pub fn shipped(&mut self, bytes: usize) {
        if let Some(point) = &mut self.point {
            point.bytes += bytes as u64;
        }
    }

    /// So much is on its way now, untaken.
    pub fn holds(&mut self, bytes: u64) {
        self.share.hold(bytes);
        self.meter.holds(bytes, Instant::now());
    }

    /// How much this VM may have on its way.
    pub fn may_hold(&self) -> u64 {
        self.share.most()
    }

    /// The oldest point under way is durable.
    pub fn durable(&mut self) {
        let (lap, cut, counts) = match self.sent.pop_front() {
            Some(sent) => sent,
            None => {
                let Some(lap) = self.lap() else { return };
                let Some(point) = self.point.take() else { return };
                (lap, point.cut, point.counts)
            }
        };
        if counts {
            let latency = cut.map_or(Duration::ZERO, |cut| cut.elapsed());
            self.pace.finished(Lap { latency, ..lap });
        }
    }

    /// The newest point is lost.
    pub fn cut_lost(&mut self) {
        self.point = None;
        self.enter(Stage::Rest);
    }

    /// All that is under way is lost.
    pub fn lost(&mut self) {
        self.sent.clear();
        self.cut_lost();
    }

    /// There is no link: what was is not what will be.
    pub fn link_down(&mut self) {
        self.pace.forget();
        self.point.iter_mut().for_each(|point| point.counts = false);
        self.sent.iter_mut().for_each(|(.., counts)| *counts = false);
    }

    /// What to show now.
    pub fn verdict(&mut self) -> Option<Verdict> {
        self.point.iter_mut().for_each(|point| point.told = Instant::now());
        let late =
            self.point.as_ref().is_some_and(|point| point.counts && point.begun.elapsed() > self.interval);
        match self.lap().filter(|_| late) {
            Some(lap) => self.pace.verdict_with(&lap, self.meter.held),
            None => self.pace.verdict(),
        }
    }

    /// When the point under way should have been there, and from then on each second.
    pub fn look_again(&self) -> Option<Instant> {
        let point = self.point.as_ref().filter(|point| point.counts)?;
        Some((point.begun + self.interval).max(point.told + EACH))
    }

    fn lap(&mut self) -> Option<Lap> {
        let now = Instant::now();
        let (times, busy) = self.meter.read(now);
        let point = self.point.as_ref()?;
        let latency = point.cut.map_or(Duration::ZERO, |cut| now.saturating_duration_since(cut));
        let taken = (point.held + point.bytes).saturating_sub(self.meter.held);
        Some(Lap { times: times - point.times, latency, bytes: point.bytes, taken, busy: busy - point.busy })
    }

    /// The level for the next frames.
    pub fn level(&mut self) -> i32 {
        let now = Instant::now();
        let span = now.saturating_duration_since(self.observed.0);
        if self.level.adapts() && span >= EACH {
            let (times, _) = self.meter.read(now);
            let spent = times - self.observed.1;
            self.observed = (now, times);
            let share = |of: Duration| of.as_secs_f64() / span.as_secs_f64();
            let (rest, pack, link) = (share(spent.rest), share(spent.pack), share(spent.link));
            self.level.observe(Observed { rest, pack, link, idle_cpu: self.spare.look() });
        }
        self.level.level()
    }
}

/// How often pace and level are thought about.
const EACH: Duration = Duration::from_secs(1);
