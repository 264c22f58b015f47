//! The other site, for commands that need both: how it is asked, which VMs are meant, and how they stand there.

use crate::{
    ask::Site,
    door::{DAEMON, token_in, trust},
};
use anyhow::{Context, bail, ensure};
use clap::Args;
use lifeboat::{
    id::VmId,
    local_api::{Access, Client},
};
use lifeboat_site_controller::{
    api::types::{GroupRow, SiteStatus, VmRow},
    group::{GroupSpec, MemberVm},
};
use serde::Deserialize;
use std::{collections::BTreeMap, path::PathBuf};

/// Where the other site is.
#[derive(Args)]
pub struct Other {
    /// The other site: its name in the file of peers, or the path of its controller's socket.
    #[arg(long, value_name = "SITE", env = "LIFEBOAT_PEER")]
    to: String,
    /// The file of peers: TOML with one `[[peer]]` each: `name`, `url`, `token_file`, and `ca` or `fingerprint`.
    #[arg(long, value_name = "FILE", env = "LIFEBOAT_PEERS", default_value = "/etc/lifeboat/peers.toml")]
    peers: PathBuf,
}

#[derive(Deserialize)]
struct Peers {
    #[serde(default)]
    peer: Vec<Peer>,
}

/// A site that is asked over the network, as its operator would with `--api`.
#[derive(Deserialize)]
struct Peer {
    name: String,
    url: String,
    token_file: PathBuf,
    ca: Option<PathBuf>,
    fingerprint: Option<String>,
}

impl Other {
    pub fn client(&self) -> anyhow::Result<Client> {
        if self.to.contains('/') {
            return Ok(Client::new(&self.to, DAEMON));
        }
        let loaded = lifeboat::config::load::<Peers>(&self.peers).context("reading the file of peers")?;
        lifeboat::config::refuse(&self.peers, &loaded.unknown)?;
        let named = loaded.value.peer.into_iter().find(|peer| peer.name == self.to);
        let peer = named.with_context(|| format!("{} names no site `{}`", self.peers.display(), self.to))?;
        ensure!(
            peer.ca.is_none() || peer.fingerprint.is_none(),
            "peer `{}`: write `ca` or `fingerprint`, not both",
            self.to
        );
        let fingerprint = peer.fingerprint.map(|text| text.parse()).transpose()?;
        let trust = trust(peer.ca, fingerprint);
        let token = token_in(&peer.token_file)?;
        Ok(Client::remote(&Access { url: peer.url, token, trust }, DAEMON)?)
    }
}

/// The VMs that a command is about.
pub struct Meant {
    pub name: String,
    /// What the group says, if it is one.
    pub group: Option<GroupSpec>,
    pub members: Vec<MemberVm>,
}

impl Meant {
    /// By the name or id of a group, else of a VM that is in none.
    pub async fn find(site: &Site, given: &str, command: &str) -> anyhow::Result<Self> {
        let groups: Vec<GroupRow> = site.client.get("/v1/groups").await?;
        let named = groups.iter().find(|row| row.group.spec.name == given);
        let found = named.or_else(|| groups.iter().find(|row| row.group.id.to_string() == given));
        if let Some(row) = found {
            let (spec, members) = (row.group.spec.clone(), row.group.members.clone());
            return Ok(Self { name: spec.name.clone(), group: Some(spec), members });
        }
        let status: SiteStatus = site.client.get("/v1/status").await?;
        let mut vms = status.vms.into_iter().filter(|row| row.name == given || row.vm.to_string() == given);
        let row = vms.next().with_context(|| format!("there is no group and no VM `{given}` here"))?;
        ensure!(vms.next().is_none(), "several VMs are called `{given}`; name it by its UUID");
        if let Some(of) = groups.iter().find(|of| of.group.has(row.vm)) {
            let group = &of.group.spec.name;
            bail!("{given} is in group `{group}`; `lifeboat {command} {group}` takes all of it");
        }
        let member = MemberVm { vm: row.vm, name: row.name.clone() };
        Ok(Self { name: row.name, group: None, members: vec![member] })
    }

    /// What a controller knows of them.
    pub async fn rows(&self, client: &Client) -> anyhow::Result<BTreeMap<VmId, VmRow>> {
        let status: SiteStatus = client.get("/v1/status").await?;
        let ours = |row: &VmRow| self.members.iter().any(|member| member.vm == row.vm);
        Ok(status.vms.into_iter().filter(ours).map(|row| (row.vm, row)).collect())
    }
}
