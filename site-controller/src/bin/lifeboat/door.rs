//! Where the site controller is: its socket on this machine, or a port over TLS, with a token.

use anyhow::Context;
use clap::Args;
use lifeboat::{
    local_api::{Access, Client},
    transport::{https::Trust, pki::Fingerprint},
};
use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

#[derive(Args)]
pub struct Door {
    /// The site controller's socket, where it runs on this machine.
    #[arg(long, global = true, env = "LIFEBOAT_SOCKET", default_value = "/run/lifeboat-site/api.sock")]
    socket: PathBuf,
    /// Ask over the network instead: `https://HOST:7444`. Needs a token.
    #[arg(long, global = true, env = "LIFEBOAT_API", value_name = "URL")]
    api: Option<String>,
    /// The file that holds the token. Without it LIFEBOAT_TOKEN is the token.
    #[arg(long, global = true, env = "LIFEBOAT_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// The authority (PEM) that vouches for the site: its `identity/ca.pem`, say. Without it those that this machine trusts.
    #[arg(long, global = true, env = "LIFEBOAT_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The fingerprint of the site's authority, as `lifeboat-site-controller init` prints it, or of its certificate.
    #[arg(long, global = true, env = "LIFEBOAT_FINGERPRINT", value_name = "SHA256", conflicts_with = "ca")]
    fingerprint: Option<Fingerprint>,
}

impl Door {
    pub fn client(self) -> anyhow::Result<Client> {
        let Some(url) = self.api else { return Ok(Client::new(&self.socket, DAEMON)) };
        let token = match &self.token_file {
            Some(file) => token_in(file)?,
            None => std::env::var("LIFEBOAT_TOKEN")
                .context("give --token-file FILE: over the network nobody is asked without a token")?,
        };
        let trust = trust(self.ca, self.fingerprint);
        Ok(Client::remote(&Access { url, token, trust }, DAEMON)?)
    }
}

/// Whom to take for a site. Not both are given.
pub fn trust(ca: Option<PathBuf>, fingerprint: Option<Fingerprint>) -> Trust {
    match (ca, fingerprint) {
        (Some(file), _) => Trust::Authorities(file),
        (None, Some(fingerprint)) => Trust::Fingerprint(fingerprint),
        (None, None) => Trust::System,
    }
}

/// The token that a file holds.
pub fn token_in(file: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = File::open(file).and_then(|open| open.take(TOKEN_FILE_MAX).read_to_string(&mut text));
    read.with_context(|| format!("reading the token from {}", file.display()))?;
    Ok(text)
}

pub const DAEMON: &str = "lifeboat-site-controller";
const TOKEN_FILE_MAX: u64 = 4096;
