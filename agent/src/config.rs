//! `agent.toml`: what the operator wrote, then what the daemon may rely on. [`AgentConfig::load`] is the only check.

use crate::capture::{
    guest::GuestSettings,
    memory::choose::{Kind, MemoryMode},
};
use lifeboat::{
    calendar::Window,
    config::{self, ConfigError, UnknownKey},
    transport::{Congestion, TransportSettings},
    units::{BitRate, ByteSize, Compression, Span},
    wire::order::ConsistencyWish,
    witness::config::{RawWitness, WitnessConfig},
};
use serde::Deserialize;
use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

pub const DEFAULT_FILE: &str = "/etc/lifeboat/agent.toml";

#[derive(Debug, Deserialize)]
struct RawAgent {
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
    libvirt: Option<String>,
    staging_total: Option<ByteSize>,
    memory_budget: Option<ByteSize>,
    #[serde(default)]
    offer: Offer,
    site: Option<RawLink>,
    witness: Option<RawWitness>,
    #[serde(default)]
    defaults: RawProtection,
    #[serde(default)]
    vm: Vec<RawVm>,
}

#[derive(Debug, Deserialize)]
struct RawLink {
    address: String,
    limit: Option<BitRate>,
    congestion: Option<Congestion>,
    compression: Option<Compression>,
    buffers: Option<ByteSize>,
    #[serde(default)]
    window: Vec<RawWindow>,
}

#[derive(Debug, Deserialize)]
struct RawWindow {
    from: String,
    to: String,
    #[serde(default = "daily")]
    days: String,
    limit: String,
}

/// Which VMs of this host the site's groups may have protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Offer {
    #[default]
    All,
    /// Those that have a `[[vm]]`.
    Listed,
}

fn daily() -> String {
    "daily".into()
}

#[derive(Clone, Debug, Default, Deserialize)]
struct RawProtection {
    interval: Option<Span>,
    max_pause: Option<Span>,
    memory: Option<RawMemory>,
    memory_engine: Option<String>,
    consistency: Option<ConsistencyWish>,
    freeze_limit: Option<Span>,
    staging: Option<ByteSize>,
    on_fenced: Option<RawKeep>,
    on_isolation: Option<RawKeep>,
    isolation_after: Option<Span>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawKeep {
    Keep,
    Pause,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RawMemory {
    Auto,
    On,
    Off,
}

#[derive(Debug, Default, Deserialize)]
struct RawVm {
    name: String,
    // The same keys as in `RawProtection`, and not flattened from it: errors and unknown keys keep their places.
    interval: Option<Span>,
    max_pause: Option<Span>,
    memory: Option<RawMemory>,
    memory_engine: Option<String>,
    consistency: Option<ConsistencyWish>,
    freeze_limit: Option<Span>,
    staging: Option<ByteSize>,
    on_fenced: Option<RawKeep>,
    on_isolation: Option<RawKeep>,
    isolation_after: Option<Span>,
    limit: Option<BitRate>,
}

/// The agent as configured.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Identity, generations, scratch and spool files.
    pub state_dir: PathBuf,
    /// Pause markers and the local API's socket; must not survive a reboot.
    pub run_dir: PathBuf,
    pub libvirt: String,
    /// `host:port` of the site; `None` until the operator has written one.
    pub site: Option<String>,
    /// Of the link, outside of all windows.
    pub limit: Option<BitRate>,
    /// Times in which another limit holds.
    pub windows: Vec<Window>,
    pub compression: Compression,
    /// Frames of all VMs that are on their way, untaken.
    pub buffers: ByteSize,
    /// Changed memory of all VMs that is held before it is spooled to disk.
    pub staging_total: ByteSize,
    pub transport: TransportSettings,
    /// Pages kept of all VMs together, so that only changed words of them need travel; 0 keeps none.
    pub memory_budget: ByteSize,
    pub offer: Offer,
    /// A third party that VMs are kept under.
    pub witness: Option<WitnessConfig>,
    pub vms: Vec<VmConfig>,
    /// What a VM has that a group assigns and no `[[vm]]` names.
    unlisted: VmConfig,
}

/// One VM to protect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmConfig {
    /// Name or UUID, as libvirt knows it.
    pub name: String,
    pub interval: Duration,
    pub max_pause: Duration,
    pub memory: MemoryMode,
    /// The memory engine to use; `None` for the best that fits.
    pub engine: Option<Kind>,
    /// What points without memory are to be, where no group says.
    pub consistency: ConsistencyWish,
    /// File systems are frozen no longer.
    pub freeze_limit: Duration,
    /// Changed memory held before it is spooled to disk.
    pub staging: ByteSize,
    /// The most that it takes of the link.
    pub limit: Option<BitRate>,
    /// A copy that was failed over is paused and put away.
    pub pause_fenced: bool,
    /// It is paused when the site has not answered for so long.
    pub isolation: Option<Duration>,
}

const INTERVALS: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(200)..=Duration::from_secs(86_400);
const PAUSES: std::ops::RangeInclusive<Duration> = Duration::from_millis(10)..=Duration::from_secs(60);

const FREEZES: std::ops::RangeInclusive<Duration> = Duration::from_secs(2)..=Duration::from_secs(60);
const ISOLATION: std::ops::RangeInclusive<Duration> = Duration::from_secs(5)..=Duration::from_secs(86_400);

const BUFFERS: ByteSize = ByteSize(128 << 20);
const BUFFERS_LEAST: ByteSize = ByteSize(1 << 20);
const STAGING_TOTAL: ByteSize = ByteSize(1 << 30);

impl AgentConfig {
    pub fn load(file: &Path) -> Result<(Self, Vec<UnknownKey>), ConfigError> {
        let loaded = config::load_or_default::<RawAgent>(file, DEFAULT_FILE)?;
        let raw = loaded.value;
        let mut transport = TransportSettings::default();
        let link = raw.site.as_ref();
        transport.congestion = link.and_then(|link| link.congestion).unwrap_or(transport.congestion);
        let site = link.map(|link| site_address(file, &link.address)).transpose()?;
        let windows = link.map_or(&[][..], |link| &link.window).iter().map(|window| {
            Window::parse(&window.from, &window.to, &window.days, &window.limit).map_err(|error| {
                config::invalid(file, &format!("site.window.{}", error.key), error.given, error.why)
            })
        });
        let windows = windows.collect::<Result<_, _>>()?;
        let buffers = link.and_then(|link| link.buffers).unwrap_or(BUFFERS);
        if buffers < BUFFERS_LEAST {
            let why = "write 1MiB or more: `128MiB`";
            return Err(config::invalid(file, "site.buffers", buffers, why));
        }
        let mut seen = BTreeSet::new();
        let mut vms = Vec::new();
        for vm in raw.vm {
            if vm.name.is_empty() || !seen.insert(vm.name.clone()) {
                return Err(config::invalid(
                    file,
                    "vm.name",
                    &vm.name,
                    "each [[vm]] needs a name of its own",
                ));
            }
            vms.push(vm_config(file, vm, &raw.defaults)?);
        }
        let unlisted = vm_config(file, RawVm::default(), &raw.defaults)?;
        let agent = Self {
            state_dir: raw.state_dir.unwrap_or_else(|| "/var/lib/lifeboat/agent".into()),
            run_dir: raw.run_dir.unwrap_or_else(|| "/run/lifeboat-agent".into()),
            libvirt: raw.libvirt.unwrap_or_else(|| "qemu:///system".into()),
            site,
            limit: link.and_then(|link| link.limit),
            windows,
            compression: link.and_then(|link| link.compression).unwrap_or(Compression::AUTO),
            buffers,
            staging_total: raw.staging_total.unwrap_or(STAGING_TOTAL),
            transport,
            memory_budget: raw.memory_budget.unwrap_or(ByteSize(256 << 20)),
            offer: raw.offer,
            witness: raw.witness.map(|raw| raw.check(file)).transpose()?,
            vms,
            unlisted,
        };
        for (key, dir) in [("state_dir", &agent.state_dir), ("run_dir", &agent.run_dir)] {
            if !dir.is_absolute() {
                let why =
                    "write an absolute path, so that it does not depend on where the daemon was started";
                return Err(config::invalid(file, key, dir.display(), why));
            }
        }
        Ok((agent, loaded.unknown))
    }

    pub fn identity_dir(&self) -> PathBuf {
        self.state_dir.join("identity")
    }
    pub fn marker_dir(&self) -> PathBuf {
        self.run_dir.join("paused")
    }
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("api.sock")
    }

    /// The VMs that the site's groups may have, by name or UUID; `None`: all.
    pub fn offered(&self) -> Option<Arc<BTreeSet<String>>> {
        let listed = || Arc::new(self.vms.iter().map(|vm| vm.name.clone()).collect());
        (self.offer == Offer::Listed).then(listed)
    }

    /// How a VM is protected that a group assigns, but for what the group says.
    pub fn for_assigned(&self, vm: &str) -> VmConfig {
        VmConfig { name: vm.to_owned(), ..self.unlisted.clone() }
    }

    /// What one VM may stage: what it was given, and no more than an even part of what there is for all.
    /// `assigned`: VMs that groups have beside those that are listed.
    pub fn staging_of(&self, vm: &VmConfig, assigned: usize) -> ByteSize {
        vm.staging.min(ByteSize(self.staging_total.0 / (self.vms.len() + assigned).max(1) as u64))
    }
}

fn site_address(file: &Path, address: &str) -> Result<String, ConfigError> {
    let port =
        address.rsplit_once(':').and_then(|(host, port)| (!host.is_empty()).then(|| port.parse::<u16>()));
    match port {
        Some(Ok(_)) => Ok(address.to_owned()),
        _ => Err(config::invalid(file, "site.address", address, "write HOST:PORT: `dr.example.com:7443`")),
    }
}

fn vm_config(file: &Path, vm: RawVm, defaults: &RawProtection) -> Result<VmConfig, ConfigError> {
    let span = |own: Option<Span>, default: Option<Span>, otherwise| {
        own.or(default).map_or(otherwise, |span| span.0)
    };
    let interval = span(vm.interval, defaults.interval, Duration::from_secs(5));
    if !INTERVALS.contains(&interval) {
        let given = format!("{interval:?}");
        return Err(config::invalid(file, "interval", given, "write a time between 200ms and 24h: `5s`"));
    }
    let max_pause = span(vm.max_pause, defaults.max_pause, Duration::from_secs(1));
    if !PAUSES.contains(&max_pause) {
        let given = format!("{max_pause:?}");
        return Err(config::invalid(file, "max_pause", given, "write a time between 10ms and 60s: `1s`"));
    }
    let memory = match vm.memory.or(defaults.memory).unwrap_or(RawMemory::Auto) {
        RawMemory::Auto => MemoryMode::Auto,
        RawMemory::On => MemoryMode::On,
        RawMemory::Off => MemoryMode::Off,
    };
    let freeze_limit = span(vm.freeze_limit, defaults.freeze_limit, GuestSettings::FREEZE_LIMIT);
    if !FREEZES.contains(&freeze_limit) {
        let given = format!("{freeze_limit:?}");
        return Err(config::invalid(file, "freeze_limit", given, "write a time between 2s and 60s: `5s`"));
    }
    let consistency = vm.consistency.or(defaults.consistency).unwrap_or_default();
    let engine = vm.memory_engine.as_ref().or(defaults.memory_engine.as_ref());
    let engine = engine.map_or(Ok(None), |name| memory_engine(file, name))?;
    let staging = vm.staging.or(defaults.staging).unwrap_or(ByteSize(256 << 20));
    let pause_fenced = vm.on_fenced.or(defaults.on_fenced) != Some(RawKeep::Keep);
    let after = span(vm.isolation_after, defaults.isolation_after, Duration::from_secs(30));
    if !ISOLATION.contains(&after) {
        let given = format!("{after:?}");
        return Err(config::invalid(
            file,
            "isolation_after",
            given,
            "write a time between 5s and 24h: `30s`",
        ));
    }
    let pauses = vm.on_isolation.or(defaults.on_isolation) == Some(RawKeep::Pause);
    let (isolation, limit, name) = (pauses.then_some(after), vm.limit, vm.name);
    Ok(VmConfig {
        name,
        interval,
        max_pause,
        memory,
        engine,
        consistency,
        freeze_limit,
        staging,
        limit,
        pause_fenced,
        isolation,
    })
}

fn memory_engine(file: &Path, name: &str) -> Result<Option<Kind>, ConfigError> {
    if name == "auto" {
        return Ok(None);
    }
    let names: Vec<_> = Kind::ORDER.map(|kind| format!("`{}`", kind.name())).into();
    let why = format!("write `auto` or {}", names.join(" or "));
    Kind::named(name).map(Some).ok_or_else(|| config::invalid(file, "memory_engine", name, &why))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<(AgentConfig, Vec<UnknownKey>), ConfigError> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.toml");
        std::fs::write(&file, text).unwrap();
        AgentConfig::load(&file)
    }

    #[test]
    fn a_vm_takes_what_it_does_not_say_from_the_defaults() {
        let text = "[site]\naddress = \"dr:7443\"\nlimit = \"50Mbit\"\n[defaults]\ninterval = \"2s\"\n\
                    [[vm]]\nname = \"web\"\n[[vm]]\nname = \"db\"\ninterval = \"1s\"\nmemory = \"off\"";
        let (agent, unknown) = load(text).unwrap();
        assert!(unknown.is_empty(), "{unknown:?}");
        assert_eq!(agent.limit, Some(BitRate(50_000_000)));
        assert_eq!(agent.vms[0].interval, Duration::from_secs(2));
        assert_eq!((agent.vms[1].interval, agent.vms[1].memory), (Duration::from_secs(1), MemoryMode::Off));
    }

    #[test]
    fn a_refusal_names_file_key_value_and_one_that_would_do() {
        for (text, words) in [
            ("[site]\naddress = \"dr\"", ["site.address", "dr.example.com:7443"]),
            ("[[vm]]\nname = \"a\"\ninterval = \"1ms\"", ["interval", "5s"]),
            ("[[vm]]\nname = \"a\"\nmax_pause = \"2h\"", ["max_pause", "1s"]),
            ("[[vm]]\nname = \"a\"\n[[vm]]\nname = \"a\"", ["vm.name", "of its own"]),
            ("state_dir = \"here\"", ["state_dir", "absolute"]),
            ("[[vm]]\nname = \"a\"\nisolation_after = \"1s\"", ["isolation_after", "30s"]),
            ("[[vm]]\nname = \"a\"\non_fenced = \"stop\"", ["vm.on_fenced", "keep"]),
            ("[[vm]]\nname = \"a\"\nmemory = \"maybe\"", ["memory", "off"]),
            ("[[vm]]\nname = \"a\"\nmemory_engine = \"magic\"", ["memory_engine", "stop-and-read"]),
            ("[[vm]]\nname = \"a\"\nlimit = \"fast\"", ["vm.limit", "50Mbit"]),
            ("[site]\naddress = \"dr:1\"\ncompression = \"20\"", ["compression", "1-5"]),
            ("[witness]\nendpoints = []", ["witness.endpoints", "https://"]),
            ("[witness]\nendpoints = [\"w:2379\"]", ["witness.endpoints", "https://HOST:PORT"]),
            ("[witness]\nendpoints = [\"http://w:1\"]\nlease = \"2s\"", ["witness.lease", "15s"]),
            ("[witness]\nendpoints = [\"http://w:1\"]\nuser = \"a\"", ["witness.user", "password_file"]),
            (
                "[witness]\nendpoints = [\"https://w:1\"]\ncertificate = \"/c\"",
                ["witness.certificate", "`key`"],
            ),
            ("[witness]\nendpoints = [\"https://w:1\"]\nkey = \"/k\"", ["witness.key", "`certificate`"]),
            ("[site]\naddress = \"dr:1\"\nbuffers = \"1KiB\"", ["site.buffers", "128MiB"]),
            (
                "[site]\naddress = \"dr:1\"\n[[site.window]]\nfrom = \"8\"\nto = \"18:00\"\nlimit = \"1Mbit\"",
                ["site.window.from", "08:00"],
            ),
            (
                "[site]\naddress = \"dr:1\"\n[[site.window]]\nfrom = \"08:00\"\nto = \"18:00\"\ndays = \"work\"\n\
                 limit = \"1Mbit\"",
                ["site.window.days", "mon-fri"],
            ),
        ] {
            let error = load(text).unwrap_err().to_string();
            assert!(error.contains("agent.toml") && words.iter().all(|word| error.contains(word)), "{error}");
        }
    }

    #[test]
    fn limits_windows_and_budgets_are_read_and_many_vms_share_what_is_there_for_all() {
        let vms: String =
            (0..20).map(|no| format!("[[vm]]\nname = \"v{no}\"\nlimit = \"5Mbit\"\n")).collect();
        let text = format!(
            "staging_total = \"1GiB\"\n[site]\naddress = \"dr:7443\"\ncompression = \"1-5\"\nbuffers = \"64MiB\"\n\
             [[site.window]]\nfrom = \"08:00\"\nto = \"18:00\"\ndays = \"mon-fri\"\nlimit = \"20Mbit\"\n\
             [[site.window]]\nfrom = \"22:00\"\nto = \"06:00\"\nlimit = \"none\"\n{vms}"
        );
        let (agent, unknown) = load(&text).unwrap();
        assert!(unknown.is_empty(), "{unknown:?}");
        assert_eq!(agent.windows[0], Window::parse("08:00", "18:00", "mon-fri", "20Mbit").unwrap());
        assert_eq!(agent.windows[1], Window::parse("22:00", "06:00", "daily", "none").unwrap());
        assert_eq!(
            (agent.compression, agent.buffers),
            (Compression { least: 1, most: 5 }, ByteSize(64 << 20))
        );
        assert_eq!(agent.vms[3].limit, Some(BitRate(5_000_000)));
        assert_eq!(agent.staging_of(&agent.vms[3], 0), ByteSize((1 << 30) / 20));
        let (alone, _) = load("[[vm]]\nname = \"a\"").unwrap();
        assert_eq!(alone.staging_of(&alone.vms[0], 0), ByteSize(256 << 20));
    }

    #[test]
    fn a_fenced_copy_is_paused_and_an_isolated_one_is_not_unless_told_otherwise() {
        let text = "[defaults]\non_isolation = \"pause\"\n[[vm]]\nname = \"a\"\n[[vm]]\nname = \"b\"\n\
                    on_fenced = \"keep\"\non_isolation = \"keep\"\n[[vm]]\nname = \"c\"\nisolation_after = \"1m\"";
        let (agent, unknown) = load(text).unwrap();
        assert!(unknown.is_empty(), "{unknown:?}");
        let found = agent.vms.iter().map(|vm| (vm.pause_fenced, vm.isolation.map(|after| after.as_secs())));
        assert_eq!(found.collect::<Vec<_>>(), [(true, Some(30)), (false, None), (true, Some(60))]);
        assert_eq!(load("[[vm]]\nname = \"a\"").unwrap().0.vms[0].isolation, None);
    }

    #[test]
    fn a_misspelt_key_is_reported_wherever_it_stands() {
        let (_, unknown) = load("intervall = \"5s\"\n[[vm]]\nname = \"a\"\nintervall = \"5s\"").unwrap();
        assert_eq!(unknown.len(), 2, "{unknown:?}");
    }
}
