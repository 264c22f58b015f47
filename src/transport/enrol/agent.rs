//! The agent's half of an enrolment: makes a key, has it certified by the site that the token names, stores both.

use super::{
    exchange::{Answer, Request},
    token::EnrolmentToken,
};
use crate::transport::{
    control::{ControlRecv, ControlSend},
    dial::connect,
    error::{RefusalCode, TransportError, printable},
    pki::{AgentIdentity, AgentKey, AgentName, Fingerprint},
    settings::TransportSettings,
    tls,
};
use rustls::pki_types::CertificateDer;
use std::path::Path;

/// Enrols this host at the site at `address` (`host:port`) and stores its identity in `dir`; an identity that is there
/// already is replaced, once the new one is complete.
pub async fn enrol(
    address: &str,
    token: &EnrolmentToken,
    agent: &AgentName,
    dir: &Path,
    settings: &TransportSettings,
) -> Result<AgentIdentity, TransportError> {
    let key = AgentKey::generate(agent)?;
    let (connection, socket) = connect(address, tls::newcomer(token.authority)?, settings).await?;
    // The handshake has checked the chain against it; it is what the agent will trust from now on.
    let chain = tls::peer_chain(&connection).unwrap_or_default();
    let authority = chain.into_iter().find(|shown| Fingerprint::of(shown) == token.authority);
    let authority =
        authority.ok_or_else(|| TransportError::protocol("the site did not show its authority"))?;
    let request =
        Request { secret: token.secret, agent: agent.to_string(), certificate_request: key.request()? };
    let asked = tokio::time::timeout(settings.connect_timeout, ask(&connection, &request)).await;
    let own = asked.unwrap_or(Err(TransportError::Lost { why: "the site did not answer in time" }));
    connection.close(RefusalCode::DONE.varint(), b"");
    drop(socket);
    let own = CertificateDer::from(own?);
    tls::check_issued(&authority, &own)?;
    Ok(key.store(dir, authority, own)?)
}

async fn ask(connection: &quinn::Connection, request: &Request) -> Result<Vec<u8>, TransportError> {
    let (send, recv) = connection.open_bi().await?;
    let (mut send, mut recv) = (ControlSend::new(send), ControlRecv::new(recv));
    send.send(request).await?;
    send.finish();
    match recv.recv().await? {
        Some(Answer::Granted { certificate }) => Ok(certificate),
        Some(Answer::Refused { code, reason }) => {
            Err(TransportError::Refused { code, reason: printable(reason.as_bytes()) })
        }
        None => Err(TransportError::protocol("the site answered nothing")),
    }
}
