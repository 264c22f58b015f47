//! `init` and `token`: what an operator does once at a new site, and once per agent.

use crate::config::SiteConfig;
use lifeboat::{
    clock::{Clock, SystemClock},
    transport::{
        enrol::{EnrolmentToken, EnrolmentTokens},
        pki::{AgentName, PkiError, SiteIdentity},
    },
};
use std::{sync::Arc, time::Duration};

/// A certificate that expires within 90 days is renewed by `init`.
const RENEW_BEFORE_MS: u64 = 90 * 86_400_000;

/// Makes the site's authority and certificate, or says that they are there. `addresses` are the names and IP
/// addresses under which agents reach this site, without ports.
pub fn init(config: &SiteConfig, addresses: &[String]) -> Result<(SiteIdentity, bool), PkiError> {
    let dir = config.identity_dir();
    match SiteIdentity::create(&dir, &config.name, addresses, &SystemClock) {
        Ok(identity) => Ok((identity, true)),
        Err(PkiError::Exists { .. }) => {
            let identity = SiteIdentity::load(&dir)?;
            // Run again with other addresses, or when the certificate is old: the authority stays, so that agents stay
            // enrolled.
            let known = addresses.iter().all(|address| identity.addresses().contains(address));
            let fresh = identity.expires().0 > SystemClock.now().0 + RENEW_BEFORE_MS;
            let identity =
                if known && fresh { identity } else { identity.reissue(addresses, &SystemClock)? };
            Ok((identity, false))
        }
        Err(error) => Err(error),
    }
}

/// A one-time token with which one agent can enrol.
pub fn token(
    config: &SiteConfig,
    identity: &SiteIdentity,
    validity: Duration,
    agent: Option<AgentName>,
) -> anyhow::Result<EnrolmentToken> {
    let tokens = EnrolmentTokens::open(&config.identity_dir(), identity.fingerprint(), Arc::new(SystemClock));
    Ok(tokens.issue(validity, agent)?.token)
}
