//! Real QUIC over loopback: who gets in, who does not, and what a bad peer can do. The rig is shared with `enrol`.

use super::{
    control::{ControlRecv, ControlSend},
    dial::{connect, dial_speaking},
    pki::{AgentIdentity, AgentKey, AgentName, SiteIdentity},
    *,
};
use crate::{
    clock::{Clock, ManualClock, SystemClock},
    format::frame::Frame,
    id::{PointId, VmId},
    page::{Content, PageGroup, PageRun},
    units::UnixMs,
};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::{net::SocketAddr, path::Path, time::Duration};
use tempfile::TempDir;

/// A site on loopback with its directory.
pub(super) struct Rig {
    pub dir: TempDir,
    pub site: SiteIdentity,
    pub endpoint: SiteEndpoint,
    pub address: String,
}

impl Rig {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let addresses = ["127.0.0.1".into(), "localhost".into()];
        let site =
            SiteIdentity::create(&dir.path().join("site"), "dr-east", &addresses, &SystemClock).unwrap();
        let endpoint = SiteEndpoint::bind(loopback(), &site, &TransportSettings::default()).unwrap();
        let address = endpoint.local_address().unwrap().to_string();
        Self { dir, site, endpoint, address }
    }

    pub fn agent(&self, name: &str) -> AgentIdentity {
        agent_of(&self.site, name, &self.dir.path().join(name), &SystemClock)
    }

    async fn admit(&mut self) -> (Peer, Connection) {
        match within(self.endpoint.accept()).await.unwrap() {
            Incoming::Agent { peer, connection } => (peer, connection),
            Incoming::Enrolment(_) => panic!("an agent was expected"),
        }
    }

    /// Both ends of one admitted connection.
    async fn pair(&mut self) -> (Connection, Connection) {
        let agent = self.agent("host-a");
        let settings = TransportSettings::default();
        let (dialled, (_, admitted)) = tokio::join!(dial(&self.address, &agent, &settings), async {
            match self.endpoint.accept().await.unwrap() {
                Incoming::Agent { peer, connection } => (peer, connection),
                Incoming::Enrolment(_) => panic!("an agent was expected"),
            }
        });
        (dialled.unwrap(), admitted)
    }

    /// A good agent still gets in, and nobody else is left.
    async fn still_serves(&mut self) {
        let (dialled, admitted) = self.pair().await;
        dialled.close_and_wait(RefusalCode::DONE, "").await;
        within(admitted.closed()).await;
    }
}

pub(super) fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

pub(super) async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), work).await.expect("it took longer than 20 s")
}

fn agent_of(site: &SiteIdentity, name: &str, dir: &Path, clock: &dyn Clock) -> AgentIdentity {
    let name: AgentName = name.parse().unwrap();
    let key = AgentKey::generate(&name).unwrap();
    let day = Duration::from_secs(86400);
    let own = site.issue_agent(&name, &key.request().unwrap(), day, clock).unwrap();
    key.store(dir, site.authority().clone(), own).unwrap()
}

async fn refused_by(rig: &mut Rig, agent: &AgentIdentity) -> TransportError {
    let before = rig.endpoint.refused();
    let error = within(dial(&rig.address, agent, &TransportSettings::default())).await.unwrap_err();
    poll(|| rig.endpoint.refused() > before).await;
    error
}

async fn poll(mut done: impl FnMut() -> bool) {
    within(async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Note(String);
impl Message for Note {
    const TAG: u16 = 7;
    const BODY_MAX: u32 = 1024;
}

/// Bytes that no compressor makes smaller.
fn noise(mut seed: u64) -> impl Iterator<Item = u8> {
    std::iter::repeat_with(move || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 56) as u8
    })
}

fn frame(seq: u32, bytes: usize) -> Frame {
    let raw = noise(u64::from(seq) + 1).take(bytes).collect::<Vec<_>>();
    let runs = vec![PageRun::new(5, (bytes / 4096) as u32)];
    Frame::seal(seq, &PageGroup { image: 1, runs, content: Content::Bytes(Bytes::from(raw)) }, 1).unwrap()
}

#[tokio::test]
async fn an_agent_of_this_site_gets_in_and_both_streams_carry_what_was_sent() {
    let mut rig = Rig::new();
    let agent = rig.agent("host-a");
    let settings = TransportSettings::default();
    let dialled = within(dial(&rig.address, &agent, &settings)).await.unwrap();
    let (peer, admitted) = rig.admit().await;
    assert_eq!((peer.agent.as_str(), peer.fingerprint), ("host-a", agent.fingerprint()));
    assert_eq!(peer.certificate_expires, agent.expires());
    assert_eq!(dialled.version(), version::ProtocolVersion::SPOKEN[0]);

    let (mut send, mut recv) = dialled.open_control().await.unwrap();
    send.send(&Note("ahoy".into())).await.unwrap();
    let (mut answer, mut heard): (ControlSend, ControlRecv) =
        within(admitted.accept_control()).await.unwrap();
    assert_eq!(within(heard.recv()).await.unwrap(), Some(Note("ahoy".into())));
    answer.send(&Note("aye".into())).await.unwrap();
    answer.finish();
    assert_eq!(within(recv.recv()).await.unwrap(), Some(Note("aye".into())));
    assert_eq!(within(recv.recv::<Note>()).await.unwrap(), None);

    let (vm, point) = (VmId::from_bytes([1; 16]), PointId::from_bytes([2; 16]));
    // More than the window of a peer that was not admitted, so that admission is seen to open it.
    let frames: Vec<_> = (0..64).map(|seq| frame(seq, 64 * 4096)).collect();
    let sent = frames.clone();
    let mut data = dialled.open_data().await.unwrap();
    let sender = tokio::spawn(async move {
        for frame in &sent {
            data.send(vm, point, frame).await.unwrap();
        }
        data.finish();
        data
    });
    let mut data = within(admitted.accept_data()).await.unwrap();
    for frame in frames {
        assert_eq!(within(data.recv()).await.unwrap(), Some(Landed { vm, point, frame }));
    }
    assert_eq!(within(data.recv()).await.unwrap(), None);
    within(sender).await.unwrap();
    let stats = dialled.stats();
    assert!(stats.sent_bytes > 16 << 20 && stats.current_mtu >= 1200, "{stats:?}");
    assert!(stats.current_mtu <= settings::MTU_MAX, "{stats:?}");
}

#[tokio::test]
async fn an_agent_of_another_site_is_refused_on_both_sides() {
    let mut rig = Rig::new();
    let other = Rig::new();
    // The agent's own check: it was enrolled elsewhere and does not take this site for its own.
    let error = refused_by(&mut rig, &other.agent("host-a")).await;
    assert!(matches!(error, TransportError::Certificate { .. }), "{error}");
    // The site's check: the agent trusts this site but was certified by another.
    let key = AgentKey::generate(&"host-b".parse().unwrap()).unwrap();
    let day = Duration::from_secs(86400);
    let own = other.site.issue_agent(&"host-b".parse().unwrap(), &key.request().unwrap(), day, &SystemClock);
    let forged = key.store(&rig.dir.path().join("b"), rig.site.authority().clone(), own.unwrap()).unwrap();
    let error = refused_by(&mut rig, &forged).await;
    assert!(matches!(error, TransportError::Certificate { .. }), "{error}");
    assert!(!error.is_transient());
    rig.still_serves().await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused_and_the_reason_reaches_the_agent() {
    let mut rig = Rig::new();
    let long_ago = ManualClock::at(UnixMs(SystemClock.now().0 - 30 * 86_400_000));
    let agent = agent_of(&rig.site, "host-a", &rig.dir.path().join("old"), &long_ago);
    let error = refused_by(&mut rig, &agent).await;
    assert!(matches!(error, TransportError::Certificate { .. }), "{error}");
    assert!(error.to_string().contains("expired"), "{error}");
}

#[tokio::test]
async fn a_peer_without_a_certificate_is_told_to_enrol_before_any_stream_is_read() {
    let mut rig = Rig::new();
    let tls = tls::stranger(rig.site.authority(), tls::spoken());
    let error = within(dial_speaking(&rig.address, tls, &TransportSettings::default())).await.unwrap_err();
    match error {
        TransportError::Refused { code, reason } => {
            assert_eq!(code, RefusalCode::NO_CERTIFICATE);
            assert!(reason.contains("enrol"), "{reason}");
        }
        other => panic!("{other}"),
    }
    rig.still_serves().await;
}

#[tokio::test]
async fn the_sites_own_certificate_is_none_for_an_agent() {
    let mut rig = Rig::new();
    let settings = TransportSettings::default();
    let site = rig.dir.path().join("site");
    let dir = rig.dir.path().join("thief");
    std::fs::create_dir(&dir).unwrap();
    for (from, to) in [("ca.pem", "ca.pem"), ("site.pem", "agent.pem"), ("site.key", "agent.key")] {
        std::fs::copy(site.join(from), dir.join(to)).unwrap();
    }
    let thief = AgentIdentity::load(&dir).unwrap();
    let error = within(dial(&rig.address, &thief, &settings)).await.unwrap_err();
    assert!(matches!(error, TransportError::Certificate { .. }), "{error}");
    rig.still_serves().await;
}

#[tokio::test]
async fn a_release_that_speaks_no_version_of_ours_is_told_so() {
    let mut rig = Rig::new();
    let agent = rig.agent("host-a");
    let tls = tls::agent(&agent, vec![b"lifeboat/900".to_vec()]).unwrap();
    let error = within(dial_speaking(&rig.address, tls, &TransportSettings::default())).await.unwrap_err();
    assert!(matches!(error, TransportError::VersionMismatch { .. }), "{error}");
    // A newer agent that still speaks ours gets in.
    let both = vec![b"lifeboat/900".to_vec(), b"lifeboat/1".to_vec()];
    let tls = tls::agent(&agent, both).unwrap();
    let dialled = within(dial_speaking(&rig.address, tls, &TransportSettings::default())).await.unwrap();
    assert_eq!(dialled.version(), version::ProtocolVersion(1));
    rig.admit().await;
}

#[tokio::test]
async fn a_site_under_another_name_is_refused_by_the_agent() {
    let mut rig = Rig::new();
    let agent = rig.agent("host-a");
    let port = rig.endpoint.local_address().unwrap().port();
    let site = SiteIdentity::load(&rig.dir.path().join("site")).unwrap();
    let renamed = site.reissue(&["dr.example.org".into()], &SystemClock).unwrap();
    assert_eq!(renamed.fingerprint(), rig.site.fingerprint());
    rig.endpoint = SiteEndpoint::bind(loopback(), &renamed, &TransportSettings::default()).unwrap();
    assert_ne!(rig.endpoint.local_address().unwrap().port(), port);
    rig.address = rig.endpoint.local_address().unwrap().to_string();
    let error = refused_by(&mut rig, &agent).await;
    assert!(error.to_string().contains("dr.example.org"), "{error}");
}

#[tokio::test]
async fn garbage_on_the_port_is_harmless() {
    let mut rig = Rig::new();
    let socket = std::net::UdpSocket::bind(loopback()).unwrap();
    let mut noise = noise(0x9e37_79b9_7f4a_7c15);
    for round in 0..5000 {
        let mut packet: Vec<u8> = noise.by_ref().take(1300).collect();
        if round % 2 == 0 {
            // Looks like the first packet of a QUIC version 1 handshake.
            packet[..6].copy_from_slice(&[0xc3, 0, 0, 0, 1, 8]);
        }
        let _ = socket.send_to(&packet[..1300 - round % 1290], &rig.address);
    }
    rig.still_serves().await;
    let endpoint = &rig.endpoint;
    poll(|| endpoint.open_connections() <= 1).await;
}

#[tokio::test]
async fn half_open_handshakes_are_bounded_and_good_agents_still_get_in() {
    let mut rig = Rig::new();
    let agent = rig.agent("host-a");
    // Strangers that never take the site's answer: their handshakes stay open until the site gives up on them.
    let tls = tls::stranger(rig.site.authority(), tls::spoken());
    let settings = TransportSettings { connect_timeout: Duration::from_millis(1), ..Default::default() };
    let flood: Vec<_> = (0..200)
        .map(|_| {
            let (address, tls, settings) = (rig.address.clone(), tls.clone(), settings.clone());
            tokio::spawn(async move { connect(&address, tls, &settings).await.is_ok() })
        })
        .collect();
    let dialled = within(dial(&rig.address, &agent, &TransportSettings::default())).await;
    dialled.unwrap();
    rig.admit().await;
    for one in flood {
        within(one).await.unwrap();
    }
    poll(|| rig.endpoint.open_connections() <= endpoint::HANDSHAKES_MAX + 1).await;
}

#[tokio::test]
async fn an_oversized_message_is_refused_before_its_body_is_waited_for() {
    let mut rig = Rig::new();
    let (dialled, admitted) = rig.pair().await;
    let (mut send, _recv) = dialled.open_control().await.unwrap();
    send.send_raw(b"\x07\x00\xff\xff\xff\xff").await;
    let (_, mut heard) = within(admitted.accept_control()).await.unwrap();
    // The body never comes: waiting for it, or making room for it, would show as a time-out.
    let error = within(heard.recv::<Note>()).await.unwrap_err();
    assert!(matches!(error, TransportError::Protocol(_)), "{error}");
}

#[tokio::test]
async fn a_frame_cut_short_or_made_up_is_refused() {
    let mut rig = Rig::new();
    let (dialled, admitted) = rig.pair().await;
    let frame = frame(0, 4096);
    let mut bytes = bytes::BytesMut::zeroed(32);
    frame.head.encode(&mut bytes);
    bytes.extend_from_slice(&frame.body);
    let mut vast_body = bytes.clone();
    vast_body[32 + 16..32 + 20].copy_from_slice(&u32::MAX.to_le_bytes());
    let cases = [
        (bytes[..20].to_vec(), "cut within the address"),
        (bytes[..32 + 60].to_vec(), "cut within the runs"),
        (bytes[..bytes.len() - 1].to_vec(), "cut within the body"),
        (vec![0xaa; 4096], "no frame at all"),
        (vast_body.to_vec(), "a body of 4 GiB announced"),
    ];
    for (bytes, what) in cases {
        let mut data = dialled.open_data().await.unwrap();
        data.send_raw(&bytes).await;
        data.finish();
        let mut arrived = within(admitted.accept_data()).await.unwrap();
        let error = within(arrived.recv()).await.expect_err(what);
        assert!(matches!(error, TransportError::Protocol(_) | TransportError::Frame(_)), "{what}: {error}");
    }
}

#[tokio::test]
async fn a_closed_or_vanished_site_is_lost_or_refused_and_nobody_there_is_unreachable() {
    let mut rig = Rig::new();
    let (dialled, _admitted) = rig.pair().await;
    rig.endpoint.close(RefusalCode::STOPPING, "maintenance").await;
    match within(dialled.closed()).await {
        TransportError::Refused { code, reason } => {
            assert_eq!((code, reason.as_str()), (RefusalCode::STOPPING, "maintenance"));
        }
        other => panic!("{other}"),
    }
    let agent = rig.agent("host-b");
    let quick = TransportSettings { connect_timeout: Duration::from_millis(300), ..Default::default() };
    let nobody = std::net::UdpSocket::bind(loopback()).unwrap();
    let address = nobody.local_addr().unwrap().to_string();
    let error = within(dial(&address, &agent, &quick)).await.unwrap_err();
    assert!(matches!(error, TransportError::Unreachable { .. }) && error.is_transient(), "{error}");
    let error = within(dial("nonsense", &agent, &quick)).await.unwrap_err();
    assert!(matches!(error, TransportError::Unreachable { .. }), "{error}");
}
