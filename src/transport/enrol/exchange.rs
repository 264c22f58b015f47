//! The two messages of an enrolment, on the only stream that its connection has. They belong to `lifeboat-enrol/1`.

use crate::transport::{control::Message, error::RefusalCode};
use serde::{Deserialize, Serialize};

/// Agent → site, since v1. Answer: `Answer`.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Proof that an operator sent us.
    pub secret: [u8; 16],
    pub agent: String,
    /// A certificate request (PKCS#10, DER), for its key.
    pub certificate_request: Vec<u8>,
}

/// Site → agent, since v1.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The certificate, DER.
    Granted {
        certificate: Vec<u8>,
    },
    Refused {
        code: RefusalCode,
        reason: String,
    },
}

impl Message for Request {
    const TAG: u16 = 0x0101;
    const BODY_MAX: u32 = 8 << 10;
}

impl Message for Answer {
    const TAG: u16 = 0x0102;
    const BODY_MAX: u32 = 8 << 10;
}
