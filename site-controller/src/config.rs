//! `site.toml`: what the operator wrote, then what the daemon may rely on. [`SiteConfig::load`] is the only check.

use crate::store::retain::Policy;
use lifeboat::{
    config::{self, ConfigError, UnknownKey},
    hypervisor::libvirt::host_of,
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
    #[serde(default)]
    host: Vec<RawHost>,
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
struct RawHost {
    name: Option<String>,
    uri: String,
    memory_reserve: Option<ByteSize>,
}

/// A KVM host on which replicas may run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    pub name: String,
    pub uri: String,
    /// Memory that no replica is given where there are several hosts.
    pub memory_reserve: ByteSize,
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
    /// In the order in which they are taken; one at least.
    pub hosts: Vec<HostConfig>,
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
            hosts: hosts(file, raw.libvirt, raw.host)?,
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

fn hosts(file: &Path, alone: Option<String>, several: Vec<RawHost>) -> Result<Vec<HostConfig>, ConfigError> {
    if several.is_empty() {
        let uri = alone.unwrap_or_else(|| "qemu:///system".into());
        return Ok(vec![HostConfig { name: uri.clone(), uri, memory_reserve: MEMORY_RESERVE }]);
    }
    if let Some(alone) = alone {
        let why = "write `libvirt`, or one `[[host]]` for each host, not both";
        return Err(config::invalid(file, "libvirt", alone, why));
    }
    let mut read: Vec<HostConfig> = Vec::new();
    for raw in several {
        if !raw.uri.contains("://") {
            let why = "write how libvirt reaches it: `qemu:///system`, `qemu+ssh://root@kvm2/system`";
            return Err(config::invalid(file, "host.uri", raw.uri, why));
        }
        let name = raw.name.unwrap_or_else(|| host_of(&raw.uri).unwrap_or("local").to_owned());
        let fits = |c: char| !c.is_control() && !c.is_whitespace();
        if name.is_empty() || name.len() > 63 || !name.chars().all(fits) {
            return Err(config::invalid(file, "host.name", name, "write 1 to 63 characters: `kvm2`"));
        }
        if read.iter().any(|host| host.name == name) {
            let why = "two hosts are called so; give each a `name` of its own";
            return Err(config::invalid(file, "host.name", name, why));
        }
        if read.iter().any(|host| host.uri == raw.uri) {
            return Err(config::invalid(file, "host.uri", raw.uri, "two `[[host]]` are this one; write one"));
        }
        let memory_reserve = raw.memory_reserve.unwrap_or(MEMORY_RESERVE);
        read.push(HostConfig { name, uri: raw.uri, memory_reserve });
    }
    Ok(read)
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

const MEMORY_RESERVE: ByteSize = ByteSize(1 << 30);
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
            ("[[host]]\nuri = \"kvm2\"", "host.uri"),
            ("[[host]]\nuri = \"qemu:///system\"\nname = \"a b\"", "host.name"),
            ("libvirt = \"qemu:///system\"\n[[host]]\nuri = \"qemu://kvm2/system\"", "not both"),
            ("[[host]]\nuri = \"qemu://a/system\"\n[[host]]\nuri = \"qemu+ssh://a/system\"", "called so"),
            (
                "[[host]]\nname = \"a\"\nuri = \"qemu://a/system\"\n[[host]]\nname = \"b\"\nuri = \"qemu://a/system\"",
                "this one",
            ),
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
        let hosts = |text: &str| {
            let hosts = load(text).unwrap().0.hosts.into_iter();
            hosts.map(|host| (host.name, host.uri, host.memory_reserve.0 >> 20)).collect::<Vec<_>>()
        };
        let of = |name: &str, uri: &str, mib| (name.to_owned(), uri.to_owned(), mib);
        assert_eq!(hosts(""), [of("qemu:///system", "qemu:///system", 1024)]);
        assert_eq!(hosts("libvirt = \"qemu:///x\""), [of("qemu:///x", "qemu:///x", 1024)]);
        let text = "[[host]]\nuri = \"qemu:///system\"\nmemory_reserve = \"2GiB\"\n[[host]]\nuri = \"qemu+ssh://root@kvm2/system\"";
        let two = [of("local", "qemu:///system", 2048), of("kvm2", "qemu+ssh://root@kvm2/system", 1024)];
        assert_eq!(hosts(text), two);
        assert_eq!(load("resreve = \"1GiB\"").unwrap().1[0].key, "resreve");
    }
}
