//! `lifeboat token`: who may ask this site over the network.

use crate::ask::{Ended, Site, path_segment};
use clap::{Args, Subcommand};
use lifeboat::units::{Span, UnitError};
use lifeboat_site_controller::{
    api::{
        role::Role,
        types::{TokenCreated, TokenRequest, TokenRow},
    },
    console::tokens,
};
use std::str::FromStr;

/// Let somebody ask this site over the network, or no longer.
#[derive(Args)]
pub struct Token {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a token, and print it: it is shown this once.
    Create {
        /// Whose it is, as the audit log will say.
        name: String,
        /// `viewer` looks, `operator` acts on VMs and groups, `admin` may do everything, make tokens too.
        #[arg(long)]
        role: Role,
        /// How long it holds; or `never`: until it is revoked.
        #[arg(long, default_value = "90d")]
        expires: Validity,
    },
    /// List the tokens there are.
    List,
    /// Take a token away: it opens nothing from now on.
    Revoke {
        /// Its name, or its id.
        name: String,
    },
}

#[derive(Clone, Debug)]
struct Validity(Option<u64>);

impl FromStr for Validity {
    type Err = UnitError;
    fn from_str(given: &str) -> Result<Self, UnitError> {
        if given == "never" {
            return Ok(Self(None));
        }
        let span: Span = given.parse()?;
        Ok(Self(Some(u64::try_from(span.0.as_millis()).unwrap_or(u64::MAX))))
    }
}

impl Token {
    pub async fn run(self, site: &Site) -> Ended {
        match self.command {
            Command::Create { name, role, expires } => {
                let request = TokenRequest { name, role, valid_ms: expires.0 };
                let created: TokenCreated = site.client.post("/v1/tokens", &request).await?;
                eprintln!("{}", tokens::created(&created.row));
                site.print(&created, |created| format!("{}\n", created.token))
            }
            Command::List => {
                let rows: Vec<TokenRow> = site.client.get("/v1/tokens").await?;
                site.print(&rows, |rows| tokens::list(rows))
            }
            Command::Revoke { name } => {
                let path = format!("/v1/tokens/{}/revoke", path_segment(&name));
                let row: TokenRow = site.client.post(&path, &()).await?;
                site.print(&row, tokens::revoked)
            }
        }
    }
}
