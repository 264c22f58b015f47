//! `[witness]` of either configuration: where it is, and who answers there. Promises: what [`RawWitness::check`] lets pass
//! can be dialled. Called by both daemons' configurations.

use crate::{
    config::{ConfigError, invalid},
    transport::https::CallerFiles,
    units::Span,
};
use serde::Deserialize;
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// As written; `lease` is read by the agent, `silent` by the site.
#[derive(Clone, Debug, Deserialize)]
pub struct RawWitness {
    pub endpoints: Vec<String>,
    pub ca: Option<PathBuf>,
    pub user: Option<String>,
    pub password_file: Option<PathBuf>,
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub lease: Option<Span>,
    pub silent: Option<Span>,
    pub keep: Option<bool>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WitnessConfig {
    /// `http://HOST:PORT` or `https://HOST:PORT`; any of them will do.
    pub endpoints: Vec<String>,
    /// Who vouches for them; without it, the authorities of this machine.
    pub ca: Option<PathBuf>,
    /// User, and the file that holds the password.
    pub login: Option<(String, PathBuf)>,
    /// What is shown to an etcd that wants a certificate of its callers.
    pub own: Option<CallerFiles>,
    /// Of the agent: how long a lease lasts that is not renewed.
    pub lease: Duration,
    /// Of the agent: VMs are kept. Otherwise those that are bound are freed.
    pub keep: bool,
    /// Of the site: how long an agent must be silent.
    pub silent: Duration,
}

impl RawWitness {
    pub fn check(self, file: &Path) -> Result<WitnessConfig, ConfigError> {
        let wrong =
            |key: &str, given: String, why: &str| invalid(file, &format!("witness.{key}"), given, why);
        let is_address = |address: &String| {
            let rest = address.strip_prefix("http://").or_else(|| address.strip_prefix("https://"));
            let port = rest.and_then(|rest| rest.rsplit_once(':')).map(|(_, port)| port.parse::<u16>());
            matches!(port, Some(Ok(_)))
        };
        if let Some(bad) = self.endpoints.iter().find(|address| !is_address(address)) {
            return Err(wrong("endpoints", bad.clone(), "write https://HOST:PORT"));
        }
        if self.endpoints.is_empty() || self.endpoints.len() > ENDPOINTS_MAX {
            let why = "name 1 to 9: [\"https://witness.example.com:2379\"]";
            return Err(wrong("endpoints", self.endpoints.len().to_string(), why));
        }
        let login = match (self.user, self.password_file) {
            (None, None) => None,
            (Some(user), Some(file)) => Some((user, file)),
            (user, _) => {
                return Err(wrong(
                    "user",
                    user.unwrap_or_default(),
                    "write `password_file` as well, or neither",
                ));
            }
        };
        let own = match (self.certificate, self.key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some(CallerFiles { certificate, key }),
            (certificate, key) => {
                let (written, other) =
                    if key.is_none() { ("certificate", "key") } else { ("key", "certificate") };
                let given = certificate.or(key).unwrap_or_default().display().to_string();
                return Err(wrong(written, given, &format!("write `{other}` as well, or neither")));
            }
        };
        let span = |key, given: Option<Span>, otherwise, least, example| {
            let given = given.map_or(otherwise, |span| span.0);
            match (least..=LONGEST).contains(&given) {
                true => Ok(given),
                false => Err(wrong(key, format!("{given:?}"), example)),
            }
        };
        let lease = span("lease", self.lease, LEASE, LEASE_LEAST, "write a time from 6s to 10min: `15s`")?;
        let silent =
            span("silent", self.silent, SILENT, SILENT_LEAST, "write a time from 20s to 10min: `30s`")?;
        Ok(WitnessConfig {
            endpoints: self.endpoints,
            ca: self.ca,
            login,
            own,
            lease,
            keep: self.keep != Some(false),
            silent,
        })
    }
}

const ENDPOINTS_MAX: usize = 9;
const LEASE: Duration = Duration::from_secs(15);
const LEASE_LEAST: Duration = Duration::from_secs(6);
const SILENT: Duration = Duration::from_secs(30);
/// Longer than the site's promise lasts (see `crate::wire::message::SiteMessage::Alive`).
const SILENT_LEAST: Duration = Duration::from_secs(20);
const LONGEST: Duration = Duration::from_secs(600);
