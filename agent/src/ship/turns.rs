//! Whose frame is next: each VM has a lane of its own, and of those that may send, the one that was served least is next.
//! Promises: over any stretch of time, VMs that have something to send get the same bytes, give or take a frame each; one
//! that comes back after a rest gets its fair part from then on, and no more; a VM at its limit holds up nobody else.
//! Filled by the VMs' actors through their outboxes, emptied by the streams of `uplink`.

use crate::{protect::link::Shipment, ship::limit::Limits};
use lifeboat::id::VmId;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::{
    sync::mpsc,
    time::{Instant, Sleep},
};

/// Frames that may wait in one VM's lane. They are the ones that its sender holds anyway.
const LANE_FRAMES: usize = 4;

pub struct Turns {
    limits: Arc<Limits>,
    joining: mpsc::UnboundedReceiver<Lane>,
    lanes: Vec<Lane>,
    /// What whoever is served now had been served before: where one that comes back takes its place.
    level: u64,
    alarm: Pin<Box<Sleep>>,
}

/// Adds lanes. Clones add to the same turns.
#[derive(Clone, Debug)]
pub struct Door(mpsc::UnboundedSender<Lane>);

#[derive(Debug)]
struct Lane {
    vm: VmId,
    frames: mpsc::Receiver<Shipment>,
    head: Option<Shipment>,
    served: u64,
}

impl Turns {
    pub fn new(limits: Arc<Limits>) -> (Self, Door) {
        let (door, joining) = mpsc::unbounded_channel();
        let alarm = Box::pin(tokio::time::sleep_until(Instant::now()));
        (Self { limits, joining, lanes: Vec::new(), level: 0, alarm }, Door(door))
    }

    /// Waits for the next frame that may be sent, and counts it as sent. Cancel-safe.
    pub async fn next(&mut self) -> Shipment {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Shipment> {
        loop {
            self.fill(context);
            let now = Instant::now();
            let wake = match self.pick(now) {
                Ok(at) => match self.serve(at) {
                    Some(shipment) => return Poll::Ready(shipment),
                    None => continue,
                },
                Err(Some(wake)) => wake,
                Err(None) => return Poll::Pending,
            };
            self.alarm.as_mut().reset(wake);
            if self.alarm.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Looks into every lane, and takes away those that nobody will fill any more.
    fn fill(&mut self, context: &mut Context<'_>) {
        while let Poll::Ready(Some(lane)) = self.joining.poll_recv(context) {
            self.lanes.push(lane);
        }
        let level = self.level;
        self.lanes.retain_mut(|lane| {
            if lane.head.is_some() {
                return true;
            }
            match lane.frames.poll_recv(context) {
                Poll::Ready(Some(frame)) => {
                    lane.head = Some(frame);
                    lane.served = lane.served.max(level);
                    true
                }
                Poll::Ready(None) => false,
                Poll::Pending => true,
            }
        });
    }

    /// The lane whose turn it is; or when to look again, if a limit is what all wait for.
    fn pick(&self, now: Instant) -> Result<usize, Option<Instant>> {
        let full = || self.lanes.iter().enumerate().filter(|(_, lane)| lane.head.is_some());
        if full().next().is_none() {
            return Err(None);
        }
        if let Some(wait) = self.limits.link_wait(now) {
            return Err(Some(wait));
        }
        let mut wake: Option<Instant> = None;
        let mut next: Option<(usize, u64)> = None;
        for (at, lane) in full() {
            match self.limits.vm_wait(lane.vm, now) {
                Some(wait) => wake = Some(wake.map_or(wait, |wake| wake.min(wait))),
                None if next.is_none_or(|(_, served)| lane.served < served) => next = Some((at, lane.served)),
                None => {}
            }
        }
        next.map(|(at, _)| at).ok_or(wake)
    }

    fn serve(&mut self, at: usize) -> Option<Shipment> {
        let lane = self.lanes.get_mut(at)?;
        let shipment = lane.head.take()?;
        let bytes = shipment.frame.encoded_len();
        self.level = self.level.max(lane.served);
        lane.served += bytes as u64;
        self.limits.pay(lane.vm, bytes);
        Some(shipment)
    }
}

impl Door {
    /// A lane for a VM. It ends with its sender.
    pub fn lane(&self, vm: VmId) -> mpsc::Sender<Shipment> {
        let (sender, frames) = mpsc::channel(LANE_FRAMES);
        // Without turns there is no link: the sender then finds its channel closed.
        let _ = self.0.send(Lane { vm, frames, head: None, served: 0 });
        sender
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ship::limit::Plan;
    use lifeboat::{
        clock::SystemClock,
        format::frame::Frame,
        id::PointId,
        page::{Content, PageGroup, PageRun},
        units::BitRate,
    };
    use std::{collections::BTreeMap, time::Duration};

    fn vm(no: u8) -> VmId {
        VmId::from_bytes([no; 16])
    }

    fn frame(pages: u64) -> Frame {
        let content = Content::Bytes(vec![1; pages as usize * 4096].into());
        Frame::seal(0, &PageGroup { image: 0, runs: vec![PageRun::new(0, pages as u32)], content }, 0)
            .unwrap()
    }

    fn limits(link: Option<u64>) -> Arc<Limits> {
        let plan = Plan { link: link.map(BitRate), windows: Vec::new() };
        Arc::new(Limits::new(plan, Arc::new(SystemClock)))
    }

    /// A VM that always has frames of so many pages to send.
    fn greedy(door: &Door, no: u8, pages: u64) -> tokio::task::JoinHandle<()> {
        let lane = door.lane(vm(no));
        tokio::spawn(async move {
            let point = PointId::from_bytes([no; 16]);
            while lane.send(Shipment { vm: vm(no), point, frame: frame(pages) }).await.is_ok() {}
        })
    }

    async fn served(turns: &mut Turns, until: Instant) -> BTreeMap<VmId, u64> {
        let mut bytes = BTreeMap::new();
        while let Ok(shipment) = tokio::time::timeout_at(until, turns.next()).await {
            *bytes.entry(shipment.vm).or_default() += shipment.frame.encoded_len() as u64;
        }
        bytes
    }

    #[tokio::test(start_paused = true)]
    async fn twenty_vms_get_the_same_of_a_limited_link_whatever_the_size_of_their_frames() {
        let (mut turns, door) = Turns::new(limits(Some(80_000_000)));
        for no in 0..20 {
            greedy(&door, no, [64, 1, 16][usize::from(no) % 3]);
        }
        let bytes = served(&mut turns, Instant::now() + Duration::from_secs(10)).await;
        let total: u64 = bytes.values().sum();
        assert!((95_000_000..102_000_000).contains(&total), "{total}");
        for (vm, bytes) in &bytes {
            assert!(bytes.abs_diff(total / 20) <= 600_000, "{vm}: {bytes} of {total}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_vm_at_its_limit_holds_up_nobody_else() {
        let limits = limits(Some(80_000_000));
        limits.set_vm(vm(1), "one", Some(BitRate(800_000)));
        let (mut turns, door) = Turns::new(limits.clone());
        greedy(&door, 1, 64);
        greedy(&door, 2, 64);
        let bytes = served(&mut turns, Instant::now() + Duration::from_secs(10)).await;
        assert!((900_000..1_400_000).contains(&bytes[&vm(1)]), "{bytes:?}");
        assert!(bytes[&vm(2)] > 97_000_000, "{bytes:?}");
        // And once the limit is lifted, while the agent runs, both get the same.
        limits.set_vm(vm(1), "one", None);
        let bytes = served(&mut turns, Instant::now() + Duration::from_secs(10)).await;
        assert!(bytes[&vm(1)].abs_diff(bytes[&vm(2)]) < 2_000_000, "{bytes:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_comes_later_gets_its_part_and_does_not_make_up_for_its_rest() {
        let (mut turns, door) = Turns::new(limits(Some(80_000_000)));
        greedy(&door, 1, 64);
        served(&mut turns, Instant::now() + Duration::from_secs(10)).await;
        greedy(&door, 2, 64);
        let bytes = served(&mut turns, Instant::now() + Duration::from_secs(2)).await;
        assert!(bytes[&vm(1)].abs_diff(bytes[&vm(2)]) <= 600_000, "{bytes:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lane_whose_vm_has_gone_is_taken_away_and_its_last_frame_still_sent() {
        let (mut turns, door) = Turns::new(limits(None));
        let lane = door.lane(vm(1));
        lane.send(Shipment { vm: vm(1), point: PointId::from_bytes([1; 16]), frame: frame(1) })
            .await
            .unwrap();
        drop(lane);
        assert_eq!(turns.next().await.vm, vm(1));
        assert!(tokio::time::timeout(Duration::from_secs(1), turns.next()).await.is_err());
        assert!(turns.lanes.is_empty());
    }
}
