//! `site.toml`: what the operator wrote, then what the daemon may rely on. [`SiteConfig::load`] is the only check.

use crate::store::retain::Policy;
use lifeboat::{
    config::{self, ConfigError, UnknownKey},
    id::VmId,
    transport::{Congestion, TransportSettings},
    units::{ByteSize, Span},
    witness::config::{RawWitness, WitnessConfig},
};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

pub const DEFAULT_FILE: &str = "/etc/lifeboat/site.toml";

#[derive(Debug, Deserialize)]
struct RawSite {
    name: Option<String>,
    listen: Option<String>,
    data_dir: Option<PathBuf>,
    replica_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    libvirt: Option<String>,
    reserve: Option<ByteSize>,
    congestion: Option<Congestion>,
    keep: Option<Vec<String>>,
    fence_command: Option<Vec<String>>,
    fence_timeout: Option<Span>,
    #[serde(default)]
    guest_hook: Vec<String>,
    #[serde(default)]
    vm: Vec<RawVm>,
    api: Option<RawApi>,
    witness: Option<RawWitness>,
}

#[derive(Debug, Deserialize)]
struct RawApi {
    listen: String,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
}

/// Where operators are listened to over the network, and what they are shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiConfig {
    pub listen: SocketAddr,
    /// Certificate and key, instead of the site's own.
    pub files: Option<(PathBuf, PathBuf)>,
}

#[derive(Debug, Deserialize)]
struct RawVm {
    name: Option<String>,
    id: Option<VmId>,
    keep: Vec<String>,
}

/// Which points are kept, of which VM.
#[derive(Clone, Debug, Default)]
pub struct Keep {
    default: Policy,
    by_id: BTreeMap<VmId, Policy>,
    by_name: BTreeMap<String, Policy>,
}

/// The site as configured.
#[derive(Clone, Debug)]
pub struct SiteConfig {
    /// How the site calls itself to agents and in reports.
    pub name: String,
    pub listen: SocketAddr,
    /// Recovery points, the index, identity and journals.
    pub data_dir: PathBuf,
    /// Disks of replicas.
    pub replica_dir: PathBuf,
    /// The local API's socket.
    pub run_dir: PathBuf,
    pub libvirt: String,
    /// Free space below which the store takes no more points.
    pub reserve: ByteSize,
    pub transport: TransportSettings,
    pub keep: Keep,
    /// Ends a source before its replica starts: a program and its words, or nothing.
    pub fence_command: Vec<String>,
    /// How long that may take.
    pub fence_timeout: Duration,
    /// Without it operators are listened to on the socket alone.
    pub api: Option<ApiConfig>,
    /// A third party without which nothing is failed over by itself.
    pub witness: Option<WitnessConfig>,
    /// A program of the guest, with its arguments, that is run in each resumed guest which has an agent; or nothing.
    pub guest_hook: Vec<String>,
}

impl Keep {
    /// The same for all VMs.
    pub fn all(default: Policy) -> Self {
        Self { default, ..Self::default() }
    }

    /// What holds for a VM: its id counts more than its name.
    pub fn of(&self, vm: VmId, name: &str) -> &Policy {
        self.by_id.get(&vm).or_else(|| self.by_name.get(name)).unwrap_or(&self.default)
    }

    fn read(file: &Path, keep: Option<Vec<String>>, vms: Vec<RawVm>) -> Result<Self, ConfigError> {
        let policy = |key: &str, rules: &[String]| {
            Policy::parse(rules)
                .map_err(|error| config::invalid(file, key, format!("{rules:?}"), error.to_string()))
        };
        let mut read = Self::default();
        if let Some(rules) = keep {
            read.default = policy("keep", &rules)?;
        }
        for vm in vms {
            let policy = policy("vm.keep", &vm.keep)?;
            let (who, before) = match (vm.id, vm.name) {
                (Some(id), None) => (id.to_string(), read.by_id.insert(id, policy)),
                (None, Some(name)) => (name.clone(), read.by_name.insert(name, policy)),
                (Some(_), Some(_)) | (None, None) => {
                    let why = "name each `[[vm]]` by its `name` or by its `id`, not both";
                    return Err(config::invalid(file, "vm", "", why));
                }
            };
            if before.is_some() {
                return Err(config::invalid(file, "vm", who, "two `[[vm]]` are for this VM; write one"));
            }
        }
        Ok(read)
    }
}

impl SiteConfig {
    pub fn load(file: &Path) -> Result<(Self, Vec<UnknownKey>), ConfigError> {
        let loaded = config::load_or_default::<RawSite>(file, DEFAULT_FILE)?;
        let raw = loaded.value;
        let listen = raw.listen.unwrap_or_else(|| "[::]:7443".into());
        let listen = listen.parse().map_err(|_| {
            config::invalid(file, "listen", &listen, "write an address and a port: `0.0.0.0:7443`")
        })?;
        let name = raw.name.unwrap_or_else(|| "dr".into());
        if name.is_empty() || name.len() > 63 || name.chars().any(char::is_control) {
            return Err(config::invalid(file, "name", &name, "write 1 to 63 characters: `dr`"));
        }
        let mut transport = TransportSettings::default();
        transport.congestion = raw.congestion.unwrap_or(transport.congestion);
        let site = Self {
            name,
            listen,
            data_dir: raw.data_dir.unwrap_or_else(|| "/var/lib/lifeboat/site".into()),
            replica_dir: raw.replica_dir.unwrap_or_else(|| "/var/lib/lifeboat/replicas".into()),
            run_dir: raw.run_dir.unwrap_or_else(|| "/run/lifeboat-site".into()),
            libvirt: raw.libvirt.unwrap_or_else(|| "qemu:///system".into()),
            reserve: raw.reserve.unwrap_or(ByteSize(1 << 30)),
            transport,
            keep: Keep::read(file, raw.keep, raw.vm)?,
            fence_command: fence_command(file, raw.fence_command)?,
            fence_timeout: raw.fence_timeout.map_or(FENCE_TIMEOUT, |span| span.0),
            api: raw.api.map(|raw| api(file, raw)).transpose()?,
            witness: raw.witness.map(|raw| raw.check(file)).transpose()?,
            guest_hook: raw.guest_hook,
        };
        if site.guest_hook.first().is_some_and(String::is_empty) {
            let why = "write a program of the guest and its arguments: `[\"/usr/local/sbin/resumed\"]`";
            return Err(config::invalid(file, "guest_hook", "", why));
        }
        for (key, dir) in
            [("data_dir", &site.data_dir), ("replica_dir", &site.replica_dir), ("run_dir", &site.run_dir)]
        {
            if !dir.is_absolute() {
                let why =
                    "write an absolute path, so that it does not depend on where the daemon was started";
                return Err(config::invalid(file, key, dir.display(), why));
            }
        }
        Ok((site, loaded.unknown))
    }

    pub fn identity_dir(&self) -> PathBuf {
        self.data_dir.join("identity")
    }
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("api.sock")
    }
}

fn fence_command(file: &Path, command: Option<Vec<String>>) -> Result<Vec<String>, ConfigError> {
    match command {
        None => Ok(Vec::new()),
        Some(command) if command.first().is_some_and(|program| program.starts_with('/')) => Ok(command),
        Some(command) => {
            let why = "write the program's absolute path, then its words: [\"/usr/local/sbin/stonith\", \"{vm}\", \"{agent}\"]";
            Err(config::invalid(file, "fence_command", format!("{command:?}"), why))
        }
    }
}

fn api(file: &Path, raw: RawApi) -> Result<ApiConfig, ConfigError> {
    let listen = raw.listen.parse().map_err(|_| {
        config::invalid(file, "api.listen", &raw.listen, "write an address and a port: `10.0.0.2:7444`")
    })?;
    let files = match (raw.certificate, raw.key) {
        (None, None) => None,
        (Some(certificate), Some(key)) if certificate.is_absolute() && key.is_absolute() => {
            Some((certificate, key))
        }
        (certificate, key) => {
            let why = "write both, with absolute paths, or neither: then the site shows its own certificate";
            let given = [certificate, key].into_iter().flatten().next().unwrap_or_default();
            return Err(config::invalid(file, "api.certificate, api.key", given.display(), why));
        }
    };
    Ok(ApiConfig { listen, files })
}

const FENCE_TIMEOUT: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<(SiteConfig, Vec<UnknownKey>), ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("site.toml");
        std::fs::write(&file, text).unwrap();
        SiteConfig::load(&file)
    }

    #[test]
    fn an_empty_file_is_a_whole_configuration_and_bad_values_name_their_key() {
        let (site, unknown) = load("").unwrap();
        assert!(unknown.is_empty() && site.listen.port() == 7443 && site.reserve == ByteSize(1 << 30));
        for (text, key) in [
            ("listen = \"here\"", "listen"),
            ("data_dir = \"relative\"", "data_dir"),
            ("reserve = \"lots\"", "reserve"),
            ("name = \"\"", "name"),
            ("fence_command = [\"stonith\"]", "fence_command"),
            ("fence_command = []", "{agent}"),
            ("[api]\nlisten = \"7444\"", "api.listen"),
            ("[api]\nlisten = \"[::]:7444\"\nkey = \"/k.pem\"", "api.certificate"),
            ("[api]\nlisten = \"[::]:7444\"\nkey = \"k.pem\"\ncertificate = \"/c.pem\"", "absolute"),
            ("keep = []", "keep"),
            ("guest_hook = [\"\"]", "guest_hook"),
            ("[witness]\nendpoints = [\"http://w:1\"]\nsilent = \"1s\"", "witness.silent"),
            ("keep = [\"some\"]", "hourly for 24h"),
            ("[[vm]]\nname = \"web\"\nkeep = [\"daily for 1h\"]", "vm.keep"),
            ("[[vm]]\nkeep = [\"all\"]", "`id`"),
            ("[[vm]]\nname = \"web\"\nkeep = [\"all\"]\n[[vm]]\nname = \"web\"\nkeep = [\"all\"]", "two"),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("site.toml"), "{error}");
        }
        let id = "00000000-0000-0000-0000-000000000001";
        let text = format!(
            "keep = [\"all\"]\n[[vm]]\nid = \"{id}\"\nkeep = [\"daily for 7d\"]\n[[vm]]\nname = \"db\"\nkeep = [\"hourly\"]"
        );
        let keep = load(&text).unwrap().0.keep;
        let [all, daily, hourly] =
            ["all", "daily for 7d", "hourly"].map(|rule| Policy::parse(&[rule]).unwrap());
        let (one, other) = (id.parse().unwrap(), VmId::from_bytes([9; 16]));
        assert_eq!(
            [keep.of(other, "web"), keep.of(one, "db"), keep.of(other, "db")],
            [&all, &daily, &hourly]
        );
        assert_eq!(load("resreve = \"1GiB\"").unwrap().1[0].key, "resreve");
    }
}
