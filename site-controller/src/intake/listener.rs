//! The door: who is let in, and what becomes of them. Started by `daemon`.

use super::session::Intake;
use lifeboat::{
    clock::Clock,
    transport::{
        Incoming, RefusalCode, SiteEndpoint,
        enrol::{self, EnrolmentTokens},
        pki::{AGENT_VALIDITY, SiteIdentity},
    },
};
use std::sync::Arc;
use tokio::{sync::watch, task::JoinSet};

/// What enrolment needs.
pub struct Enrolment {
    pub identity: SiteIdentity,
    pub tokens: EnrolmentTokens,
    pub clock: Arc<dyn Clock>,
}

/// Takes connections until told to stop; then says goodbye to all of them.
pub async fn listen(
    mut endpoint: SiteEndpoint,
    intake: Arc<Intake>,
    enrolment: Arc<Enrolment>,
    mut stop: watch::Receiver<bool>,
) {
    let mut sessions = JoinSet::new();
    loop {
        let incoming = tokio::select! {
            incoming = endpoint.accept() => incoming,
            _ = stop.wait_for(|stop| *stop) => None,
            Some(ended) = sessions.join_next() => {
                if let Err(panic) = ended {
                    tracing::error!(%panic, "a session died");
                }
                continue;
            }
        };
        match incoming {
            Some(Incoming::Agent { peer, connection }) => {
                sessions.spawn(intake.clone().serve(peer, connection));
            }
            Some(Incoming::Enrolment(connection)) => {
                let enrolment = enrolment.clone();
                sessions.spawn(async move { serve_enrolment(&enrolment, connection).await });
            }
            None => break,
        }
    }
    endpoint.close(RefusalCode::DONE, "the site controller is stopping").await;
    sessions.shutdown().await;
}

async fn serve_enrolment(enrolment: &Enrolment, connection: lifeboat::transport::endpoint::EnrolConnection) {
    let from = connection.remote_address();
    let clock = enrolment.clock.as_ref();
    match enrol::serve(connection, &enrolment.identity, &enrolment.tokens, AGENT_VALIDITY, clock).await {
        Ok(enrolled) => {
            tracing::info!(agent = %enrolled.agent, %from, token = %enrolled.token_id, "agent enrolled");
        }
        Err(error) => tracing::warn!(%from, %error, "an enrolment was refused"),
    }
}
