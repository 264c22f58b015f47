//! The site's half of an enrolment: takes the token, signs the agent's request.

use super::{
    exchange::{Answer, Request},
    tokens::EnrolmentTokens,
};
use crate::{
    clock::Clock,
    transport::{
        control::{ControlRecv, ControlSend},
        endpoint::EnrolConnection,
        error::{RefusalCode, TransportError},
        pki::{AgentName, Facts, Fingerprint, SiteIdentity},
    },
    units::UnixMs,
};
use std::{net::SocketAddr, time::Duration};

/// An agent that was given a certificate.
#[derive(Clone, Debug)]
pub struct Enrolled {
    pub agent: AgentName,
    /// Of its certificate.
    pub fingerprint: Fingerprint,
    pub expires: UnixMs,
    pub token_id: String,
    pub from: SocketAddr,
}

/// Serves one enrolment from beginning to end, in bounded time. An error has been told to the agent already.
pub async fn serve(
    connection: EnrolConnection,
    site: &SiteIdentity,
    tokens: &EnrolmentTokens,
    validity: Duration,
    clock: &dyn Clock,
) -> Result<Enrolled, TransportError> {
    let served = tokio::time::timeout(TIME_MAX, converse(&connection, site, tokens, validity, clock)).await;
    let served =
        served.unwrap_or(Err(TransportError::Lost { why: "the agent did not finish its enrolment" }));
    let code = if served.is_ok() { RefusalCode::DONE } else { RefusalCode::PROTOCOL };
    connection.inner.close(code.varint(), b"enrolment is over");
    served
}

async fn converse(
    connection: &EnrolConnection,
    site: &SiteIdentity,
    tokens: &EnrolmentTokens,
    validity: Duration,
    clock: &dyn Clock,
) -> Result<Enrolled, TransportError> {
    let (send, recv) = connection.inner.accept_bi().await?;
    let (mut send, mut recv) = (ControlSend::new(send), ControlRecv::new(recv));
    let request: Request =
        recv.recv().await?.ok_or(TransportError::Lost { why: "the agent asked for nothing" })?;
    let from = connection.remote_address();
    let granted = grant(&request, from, site, tokens, validity, clock);
    let answer = match &granted {
        Ok((_, certificate)) => Answer::Granted { certificate: certificate.clone() },
        Err(TransportError::Refused { code, reason }) => {
            Answer::Refused { code: *code, reason: reason.clone() }
        }
        // What went wrong within the site is for its operator, not for whoever knocks.
        Err(_) => Answer::Refused { code: RefusalCode::INTERNAL, reason: "see the site's log".into() },
    };
    send.send(&answer).await?;
    send.finish();
    send.delivered().await;
    granted.map(|(enrolled, _)| enrolled)
}

/// Everything is checked that can be before the token is spent.
fn grant(
    request: &Request,
    from: SocketAddr,
    site: &SiteIdentity,
    tokens: &EnrolmentTokens,
    validity: Duration,
    clock: &dyn Clock,
) -> Result<(Enrolled, Vec<u8>), TransportError> {
    let invalid = |error: crate::transport::pki::PkiError| TransportError::Refused {
        code: RefusalCode::PROTOCOL,
        reason: error.to_string(),
    };
    let agent: AgentName = request.agent.parse().map_err(invalid)?;
    let certificate =
        site.issue_agent(&agent, &request.certificate_request, validity, clock).map_err(invalid)?;
    let facts =
        Facts::read(&certificate).ok_or_else(|| TransportError::protocol("unreadable certificate"))?;
    let token = tokens
        .redeem(&request.secret, &agent, from.ip())
        .map_err(|refusal| TransportError::Refused { code: refusal.code(), reason: refusal.to_string() })?;
    let enrolled = Enrolled {
        agent,
        fingerprint: Fingerprint::of(&certificate),
        expires: facts.expires,
        token_id: token.id,
        from,
    };
    Ok((enrolled, certificate.to_vec()))
}

/// An agent that takes longer is not trying.
const TIME_MAX: Duration = Duration::from_secs(15);
