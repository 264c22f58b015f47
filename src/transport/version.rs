//! Protocol names, as peers offer them in the TLS handshake (ALPN), and the ones this release speaks.
//! Promises: both sides settle on the newest version that both speak, or on none at all.

use std::fmt;

/// A version of the replication protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ProtocolVersion(pub u16);

impl ProtocolVersion {
    /// What this release speaks, newest first. Version 2 added frames of changed words and of references, version 3 points
    /// over one that is not durable yet, version 4 where a guest is, so that it can change hosts, version 5 what a
    /// site orders (whom to protect, and cuts of several VMs) and what a point promises, version 6 that file systems are
    /// frozen for a cut of several VMs, version 7 that a site promises not to fail a VM over by itself.
    pub const SPOKEN: &'static [Self] = &[Self(7), Self(6), Self(5), Self(4), Self(3), Self(2), Self(1)];

    /// Whether the peer knows `Alive`, and answers it.
    pub fn knows_promises(self) -> bool {
        self >= Self(7)
    }

    /// Whether the peer knows [`CutOrder::Freeze`](crate::wire::order::CutOrder::Freeze).
    pub fn knows_freezes(self) -> bool {
        self >= Self(6)
    }

    /// Whether a site is told how consistent a point is, and which cut of a group it is one part of.
    pub fn tells_consistency(self) -> bool {
        self >= Self(5)
    }

    /// Whether the peer knows [`order`](crate::wire::order): inventories, assignments, cuts of several VMs.
    pub fn knows_orders(self) -> bool {
        self >= Self(5)
    }

    /// Whether the peer knows [`Place`](crate::wire::message::AgentMessage::Place), and what may follow from it.
    pub fn knows_places(self) -> bool {
        self >= Self(4)
    }

    /// Whether a site that speaks it takes a point over one that is not durable yet.
    pub fn overlaps(self) -> bool {
        self >= Self(3)
    }

    /// Whether a site that speaks it reads frames of changed words and of references.
    pub fn reads_deltas(self) -> bool {
        self >= Self(2)
    }

    pub(super) fn alpn(self) -> Vec<u8> {
        self.to_string().into_bytes()
    }
    pub(super) fn from_alpn(name: &[u8]) -> Option<Self> {
        let number = std::str::from_utf8(name).ok()?.strip_prefix(PREFIX)?;
        number.parse().ok().map(Self)
    }
    /// The versions this release speaks, for people.
    pub fn spoken() -> String {
        Self::SPOKEN.iter().map(Self::to_string).collect::<Vec<_>>().join(", ")
    }
}

impl fmt::Display for ProtocolVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", self.0)
    }
}

const PREFIX: &str = "lifeboat/";
/// Enrolment: the only protocol that a peer without a certificate may speak.
pub(super) const ENROL_ALPN: &[u8] = b"lifeboat-enrol/1";
