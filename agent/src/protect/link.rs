//! What a protection actor needs of the link to the site: events in, an outbox to write to.
//! The uplink implements it over QUIC, the simulation over a lossy channel.

use lifeboat::{
    format::frame::Frame,
    id::{PointId, VmId},
    wire::message::{AgentMessage, SiteMessage},
};
use tokio::sync::mpsc;

/// What the link tells a VM's actor.
#[derive(Debug)]
pub enum LinkEvent {
    /// The site has said `Welcome`; `outbox` lives as long as this link.
    Up {
        outbox: Outbox,
        window: u64,
        site: String,
    },
    Down {
        why: String,
    },
    /// About this VM.
    Message(SiteMessage),
}

/// One frame on its way.
#[derive(Debug)]
pub struct Shipment {
    pub vm: VmId,
    pub point: PointId,
    pub frame: Frame,
}

/// Where to put what is to be sent. Both channels are bounded; a closed one means that the link is gone.
#[derive(Clone, Debug)]
pub struct Outbox {
    /// The site reads frames of changed words and of references.
    pub reads_deltas: bool,
    /// The site takes a point over one that is not durable yet.
    pub overlaps: bool,
    /// The site wants to know where the guest is before it takes points of it.
    pub places: bool,
    /// The site gives orders, and hears how they are carried out.
    pub orders: bool,
    pub control: mpsc::Sender<AgentMessage>,
    pub frames: mpsc::Sender<Shipment>,
}

/// The link went away while something was being handed to it.
#[derive(Debug, Clone, Copy)]
pub struct LinkGone;

impl Outbox {
    pub async fn tell(&self, message: AgentMessage) -> Result<(), LinkGone> {
        self.control.send(message).await.map_err(|_| LinkGone)
    }
    pub async fn ship(&self, shipment: Shipment) -> Result<(), LinkGone> {
        self.frames.send(shipment).await.map_err(|_| LinkGone)
    }
}
