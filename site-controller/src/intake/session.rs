//! One agent's session: its control stream and its data streams.
//! Promises: a message out of place ends the session with a protocol refusal, never more; an agent can have only as many
//! VMs, streams and bytes in work as the bounds here and in the transport say. Started by `listener`.

use super::{
    board::Board,
    compare::Comparisons,
    promises::Promises,
    slot::{Claim, Replies, Slots},
    switchboard::{self, Heard, Switchboard},
};
use lifeboat::{
    clock::Clock,
    format::manifest::PointMeta,
    id::{PointId, VmId},
    transport::{
        Connection, ControlRecv, ControlSend, DataRecv, Peer, RefusalCode, TransportError,
        version::ProtocolVersion,
    },
    wire::message::{AgentMessage, PROMISE_MS, Refusal, SiteMessage},
};
use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{sync::mpsc, task::JoinSet};

/// Bytes of frames of one VM that an agent may have on the way, untaken.
pub const WINDOW: u64 = 32 << 20;
/// VMs that one session may watch.
const VMS_MAX: usize = 1000;
/// Longest VM name that is taken; libvirt's own limit is shorter.
const NAME_MAX: usize = 255;
const REPLIES_QUEUED: usize = 1024;
const GREETING_TIMEOUT: Duration = Duration::from_secs(10);

/// What all sessions share.
#[derive(Debug)]
pub struct Intake {
    pub site: String,
    pub slots: Slots,
    pub comparisons: Arc<Comparisons>,
    pub board: Board,
    pub switchboard: Switchboard,
    /// That this site fails nothing over by itself.
    pub promises: Promises,
    pub clock: Arc<dyn Clock>,
    sessions: AtomicU64,
}

impl Intake {
    pub fn new(site: String, slots: Slots, comparisons: Arc<Comparisons>, clock: Arc<dyn Clock>) -> Self {
        let (board, switchboard, promises) = Default::default();
        Self { site, slots, comparisons, board, switchboard, promises, clock, sessions: AtomicU64::new(0) }
    }

    /// Speaks with one agent until the connection ends.
    pub async fn serve(self: Arc<Self>, peer: Peer, connection: Connection) {
        let session = self.sessions.fetch_add(1, Ordering::Relaxed);
        let agent = peer.agent.to_string();
        self.board.certified(&agent, peer.certificate_expires);
        tracing::info!(%agent, from = %connection.remote_address(), "agent connected");
        let ended = self.converse(session, &agent, &connection).await;
        self.board.gone(session, self.clock.now());
        self.slots.gone(session);
        self.switchboard.gone(session);
        match ended {
            Err(TransportError::Protocol(why)) => {
                tracing::warn!(%agent, %why, "agent refused: it broke the protocol");
                connection.close(RefusalCode::PROTOCOL, &why);
            }
            Err(error) => tracing::info!(%agent, %error, "agent disconnected"),
            Ok(()) => tracing::info!(%agent, "agent disconnected"),
        }
    }

    async fn converse(
        self: &Arc<Self>,
        session: u64,
        agent: &str,
        connection: &Connection,
    ) -> Result<(), TransportError> {
        let greeted = async {
            let (send, mut recv) = connection.accept_control().await?;
            let first = recv.recv::<AgentMessage>().await?;
            Ok::<_, TransportError>((send, recv, first))
        };
        let (mut send, recv, first) = tokio::time::timeout(GREETING_TIMEOUT, greeted)
            .await
            .map_err(|_| TransportError::Protocol("no greeting in time".into()))??;
        let Some(AgentMessage::Hello { host, release }) = first else {
            return Err(TransportError::Protocol("the first message must be a greeting".into()));
        };
        tracing::debug!(agent, host = %host.escape_debug(), release = %release.escape_debug(), "greeted");
        let release = env!("CARGO_PKG_VERSION").to_owned();
        send.send(&SiteMessage::Welcome { site: self.site.clone(), release, window: WINDOW }).await?;

        if connection.version().knows_freezes() {
            self.switchboard.knows_freezes(session);
        }
        let (replies, queue) = mpsc::channel(REPLIES_QUEUED);
        let mut tasks = JoinSet::new();
        tasks.spawn(write_replies(send, queue, connection.version()));
        tasks.spawn(self.clone().read_control(session, agent.to_owned(), recv, replies));
        loop {
            tokio::select! {
                stream = connection.accept_data() => {
                    tasks.spawn(self.clone().read_frames(stream?));
                }
                Some(ended) = tasks.join_next() => match ended {
                    // A data stream that ended in order.
                    Ok(Ok(Finished::Stream)) => {}
                    Ok(Ok(Finished::Session)) => return Ok(()),
                    Ok(Err(error)) => return Err(error),
                    Err(panic) => return Err(TransportError::Protocol(format!("a session task died: {panic}"))),
                },
            }
        }
    }

    async fn read_control(
        self: Arc<Self>,
        session: u64,
        agent: String,
        mut recv: ControlRecv,
        replies: Replies,
    ) -> Result<Finished, TransportError> {
        let mut watched = BTreeSet::new();
        while let Some(message) = recv.recv::<AgentMessage>().await? {
            self.on_message(session, &agent, &mut watched, message, &replies).await?;
        }
        Ok(Finished::Session)
    }

    async fn on_message(
        &self,
        session: u64,
        agent: &str,
        watched: &mut BTreeSet<VmId>,
        message: AgentMessage,
        replies: &Replies,
    ) -> Result<(), TransportError> {
        let out_of_place = |what: &str| Err(TransportError::Protocol(what.into()));
        let now = self.clock.now();
        match message {
            AgentMessage::Hello { .. } => return out_of_place("a second greeting"),
            AgentMessage::Watch { vm, name, generation } => {
                if !is_name(&name) {
                    return out_of_place("a VM's name must be 1 to 255 bytes without control characters");
                }
                watched.insert(vm);
                if self.refused_as_closed(vm, replies).await {
                    return Ok(());
                }
                if watched.len() > VMS_MAX || !self.board.watch(session, vm, &name, agent, now) {
                    let detail = "more VMs than this site takes".to_owned();
                    let refusal = Refusal::Invalid { detail };
                    let _ = replies.send(SiteMessage::VmRefused { vm, refusal }).await;
                    return Ok(());
                }
                let slot = self.slots.slot(vm);
                if slot.watch(session, agent, name.clone(), generation, replies.clone()).await {
                    self.board.take(session, vm, &name, agent, now);
                }
            }
            AgentMessage::Alive { vm, .. } if !watched.contains(&vm) => {}
            AgentMessage::Alive { vm, generation, no } => {
                // Of a VM that was failed over nothing is promised.
                if self.slots.slot(vm).generation().await == generation && self.promises.heard(vm) {
                    let _ = replies.send(SiteMessage::Alive { vm, no, for_ms: PROMISE_MS }).await;
                }
            }
            AgentMessage::Begin { vm, .. }
            | AgentMessage::EndV1 { vm, .. }
            | AgentMessage::End { vm, .. }
            | AgentMessage::Abort { vm, .. }
            | AgentMessage::Report { vm, .. }
            | AgentMessage::Compare { vm, .. }
            | AgentMessage::Place { vm, .. }
                if !watched.contains(&vm) =>
            {
                // A report may precede the first `Watch`; anything else may not.
                if !matches!(message, AgentMessage::Report { .. }) {
                    return out_of_place("a message about a VM that was not announced");
                }
            }
            AgentMessage::Begin { vm, generation, point, parent } => {
                self.slots.slot(vm).begin(agent, generation, point, parent, replies.clone()).await;
            }
            AgentMessage::EndV1 { vm, point, frames, meta } => {
                self.end(vm, point, frames, Box::new((*meta).into()));
            }
            AgentMessage::End { vm, point, frames, meta } => self.end(vm, point, frames, meta),
            AgentMessage::Abort { vm, point } => self.slots.slot(vm).abort(point).await,
            AgentMessage::Report { vm, report } => self.board.report(session, vm, report, now),
            AgentMessage::Place { vm, .. } if self.refused_as_closed(vm, replies).await => {}
            AgentMessage::Place { vm, place } => {
                let claim = self.slots.slot(vm).place(session, agent, place, replies.clone()).await;
                let why = match claim {
                    Some(Claim::Refused(why)) => Some(why),
                    Some(Claim::Granted) => {
                        self.board.own(session, vm, agent, now);
                        None
                    }
                    None => None,
                };
                self.board.contend(vm, agent, why, now);
            }
            AgentMessage::Compare { vm, question } => self.comparisons.ask(vm, question, replies).await,
            AgentMessage::Inventory { vms } => {
                if vms.len() > switchboard::VMS_MAX || vms.iter().any(|vm| !is_name(&vm.name)) {
                    return out_of_place("too many VMs, or a name that is none, in what a host has");
                }
                self.switchboard.inventory(session, agent, vms, replies).await;
            }
            AgentMessage::Part { vm, cut, part } => self.switchboard.heard(session, Heard { vm, cut, part }),
        }
        Ok(())
    }

    /// No agent is told that a VM is its own that this site may be claiming.
    async fn refused_as_closed(&self, vm: VmId, replies: &Replies) -> bool {
        let closed = self.promises.is_closed(vm);
        if closed {
            let why = "this site is about to fail the VM over by itself".to_owned();
            let refusal = Refusal::HeldElsewhere { why };
            let _ = replies.send(SiteMessage::VmRefused { vm, refusal }).await;
        }
        closed
    }

    /// A commit takes as long as the disk takes; other VMs' messages do not wait for it.
    fn end(&self, vm: VmId, point: PointId, frames: u32, meta: Box<PointMeta>) {
        let slot = self.slots.slot(vm);
        tokio::spawn(async move { slot.end(point, frames, meta).await });
    }

    async fn read_frames(self: Arc<Self>, mut stream: DataRecv) -> Result<Finished, TransportError> {
        while let Some(landed) = stream.recv().await? {
            // A VM that nobody announced has no open point, and is not given a slot by a frame.
            if let Some(slot) = self.slots.find(landed.vm) {
                slot.frame(landed.point, landed.frame).await;
            }
        }
        Ok(Finished::Stream)
    }
}

fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME_MAX && !name.chars().any(char::is_control)
}

/// What it was that ended without an error.
enum Finished {
    Stream,
    Session,
}

async fn write_replies(
    mut send: ControlSend,
    mut queue: mpsc::Receiver<SiteMessage>,
    version: ProtocolVersion,
) -> Result<Finished, TransportError> {
    while let Some(message) = queue.recv().await {
        let message = if version.knows_orders() { message } else { message.before_version_5() };
        let message = if version.knows_places() { message } else { message.before_version_4() };
        send.send(&message).await?;
    }
    Ok(Finished::Session)
}
