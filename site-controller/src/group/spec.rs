//! A protection group as an operator writes it: one shape for the file that `lifeboat apply` reads, for the API and for
//! what is stored. Promises: what [`GroupSpec::check`] has let pass can be acted on: every span and rule can be read, every
//! name is one, the order of the starts has no circle. Pure.

use super::address_spec::{CardSpec, SubnetSpec};
use crate::store::retain::Policy;
use lifeboat::{
    calendar::{Zone, minutes},
    units::{Span, UnixMs},
    wire::order::{ConsistencyWish, MemoryWish},
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    time::Duration,
};

/// A group, as written. Keys that are left out have the values that `Default` gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct GroupSpec {
    /// 1 to 63 of `a-z`, `A-Z`, `0-9`, `-`, `_` and `.`.
    pub name: String,
    /// Names or UUIDs.
    pub vms: Vec<String>,
    /// How old the newest durable point may be: `5s`. Points are cut twice as often.
    #[serde(default = "rpo")]
    pub rpo: String,
    /// Which points are kept; without it, as `site.toml` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<Vec<String>>,
    #[serde(default)]
    pub memory: MemoryWish,
    /// What a point without memory is to be.
    #[serde(default)]
    pub consistency: ConsistencyWish,
    #[serde(default)]
    pub runbook: RunbookSpec,
    #[serde(default)]
    pub drill: DrillSpec,
    /// It is failed over in an emergency by itself, with a witness.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub automatic: bool,
}

/// What a failover does besides restoring.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct RunbookSpec {
    /// By member.
    pub vm: BTreeMap<String, VmSteps>,
    /// From the source's network or bridge to `network:NAME`, `bridge:NAME` or `none` here.
    pub networks: BTreeMap<String, String>,
    /// Where the addresses of members that are in one subnet go.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub subnet: Vec<SubnetSpec>,
    /// The libvirt network that drills use; without it each makes an isolated one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub drill_network: Option<String>,
    /// Commands that run here before the first replica starts.
    pub before: Vec<Vec<String>>,
    /// Commands that run here after the last one runs.
    pub after: Vec<Vec<String>>,
    /// How long each of them may take.
    pub script_limit: String,
    /// For how long a failover can be rolled to another point.
    pub undo_window: String,
    /// A resume that goes wrong falls back to a boot from the same point's disks.
    pub cold_boot: bool,
}

/// What a failover does for one member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct VmSteps {
    /// Members that must be up before this one starts.
    pub after: Vec<String>,
    /// When it counts as up: `agent`, `tcp:PORT`, `tcp:HOST:PORT`, `console:TEXT`, `delay:5s`; all of them.
    pub wait_for: Vec<String>,
    pub wait_at_most: String,
    /// One that goes on with its memory and is not up in time is booted from the same point's disks instead.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub boot_if_not_up: bool,
    /// Hosts of the site that it may run on, by name or libvirt URI; none: any. Where there is one host it says nothing.
    pub hosts: Vec<String>,
    /// A command that is run in the guest once it goes on.
    pub guest_hook: Vec<String>,
    /// What its network cards have here instead.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub address: Vec<CardSpec>,
}

/// Failovers for trial.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DrillSpec {
    /// How often one runs by itself: `7d`, or `7d at 03:00` of this host's local time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<String>,
    /// Commands that say by their exit code whether the replicas are as they should be.
    pub checks: Vec<Vec<String>>,
    /// For how long evidence is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub keep_for: Option<String>,
}

/// When drills are due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Every {
    span: Duration,
    /// In the hour that begins at this minute of the day.
    at: Option<u16>,
}

impl DrillSpec {
    /// When they are due, or what would do in the place of what is written.
    pub fn every(&self) -> Result<Option<Every>, &'static str> {
        let Some(given) = &self.every else { return Ok(None) };
        let (span, at) = match given.split_once(" at ") {
            Some((span, at)) => (span, Some(minutes(at).ok_or("write `7d`, or `7d at 03:00`")?)),
            None => (given.as_str(), None),
        };
        let span = span.trim().parse::<Span>().map_err(|_| "write a span of time: `7d`, or `7d at 03:00`")?.0;
        match at {
            None if span < EVERY_MIN => Err("write 10s or more"),
            Some(_) if span < DAY => Err("with a time of the day, write one day or more: `1d at 03:00`"),
            at => Ok(Some(Every { span, at })),
        }
    }
}

impl Every {
    pub fn is_due(&self, last: UnixMs, now: UnixMs, zone: &Zone) -> bool {
        let since = Duration::from_millis(now.0.saturating_sub(last.0));
        match self.at {
            None => since >= self.span,
            // Begun some minutes later last time, it must not slip to the next day.
            Some(at) => {
                let minute = zone.minute_at(now);
                since + DAY / 2 >= self.span && (at..at.saturating_add(60)).contains(&minute)
            }
        }
    }
}

/// When a member counts as up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WaitFor {
    /// Its guest agent answers.
    Agent,
    /// Somebody listens; without a host, at an address that the guest agent tells.
    Tcp {
        host: Option<String>,
        port: u16,
    },
    /// Its console has said this since it was started here.
    Console(String),
    Delay(Duration),
}

/// As it is written in a runbook.
impl fmt::Display for WaitFor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent => f.write_str("agent"),
            Self::Tcp { host: Some(host), port } => write!(f, "tcp:{host}:{port}"),
            Self::Tcp { host: None, port } => write!(f, "tcp:{port}"),
            Self::Console(text) => write!(f, "console:{text}"),
            Self::Delay(span) if span.subsec_millis() == 0 => write!(f, "delay:{}s", span.as_secs()),
            Self::Delay(span) => write!(f, "delay:{}ms", span.as_millis()),
        }
    }
}

/// Where a network of the source leads here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkHere {
    Network(String),
    Bridge(String),
    /// No cable.
    Nowhere,
}

/// Which key of a group can't be used, and what would do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("group `{group}`: {key} = {given}: {why}")]
pub struct SpecError {
    pub group: String,
    pub key: String,
    pub given: String,
    pub why: String,
}

impl GroupSpec {
    /// A group of `vms` with everything else left out.
    pub fn new(name: &str, vms: &[&str]) -> Self {
        Self {
            name: name.into(),
            vms: vms.iter().map(|vm| (*vm).into()).collect(),
            rpo: rpo(),
            keep: None,
            memory: MemoryWish::default(),
            consistency: ConsistencyWish::default(),
            runbook: RunbookSpec::default(),
            drill: DrillSpec::default(),
            automatic: false,
        }
    }

    /// Refuses what can't be acted on.
    pub fn check(&self) -> Result<(), SpecError> {
        let wrong = |key: &str, given: &str, why: &str| SpecError {
            group: self.name.escape_debug().to_string(),
            key: key.into(),
            given: given.escape_debug().to_string(),
            why: why.into(),
        };
        if !is_name(&self.name) {
            return Err(wrong("name", &self.name, "write 1 to 63 letters, digits, `-`, `_` or `.`: `shop`"));
        }
        if self.vms.is_empty() || self.vms.len() > MEMBERS_MAX {
            return Err(wrong("vms", &self.vms.join(", "), "name 1 to 64 VMs"));
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = self.vms.iter().find(|vm| vm.is_empty() || !seen.insert(vm.as_str())) {
            return Err(wrong("vms", twice, "name each VM once"));
        }
        let rpo = self.span("rpo", &self.rpo)?;
        if !(RPO_MIN..=RPO_MAX).contains(&rpo) {
            return Err(wrong("rpo", &self.rpo, "write a span from 400ms to 24h: `5s`"));
        }
        if let Some(rules) = &self.keep {
            Policy::parse(rules).map_err(|error| wrong("keep", &rules.join(", "), &error.to_string()))?;
        }
        for (key, span) in [
            ("runbook.script_limit", &self.runbook.script_limit),
            ("runbook.undo_window", &self.runbook.undo_window),
        ] {
            self.span(key, span)?;
        }
        if let Some(keep_for) = &self.drill.keep_for {
            self.span("drill.keep_for", keep_for)?;
        }
        let given = self.drill.every.clone().unwrap_or_default();
        self.drill.every().map_err(|why| wrong("drill.every", &given, why))?;
        self.check_members()?;
        self.networks()?;
        self.check_addresses()
    }

    /// Without these members, and without what the runbook says of them.
    pub fn let_go(&mut self, vms: &[String]) {
        self.vms.retain(|vm| !vms.contains(vm));
        self.runbook.vm.retain(|vm, _| !vms.contains(vm));
        self.runbook.vm.values_mut().for_each(|steps| steps.after.retain(|before| !vms.contains(before)));
        self.runbook.subnet.retain_mut(|subnet| {
            let of_all = subnet.vms.is_empty();
            subnet.vms.retain(|vm| !vms.contains(vm));
            of_all || !subnet.vms.is_empty()
        });
    }

    /// From the start of one cut to that of the next: half the RPO, so that the newest durable point stays younger.
    pub fn interval(&self) -> Duration {
        self.rpo().div_f64(2.0).max(INTERVAL_MIN)
    }

    pub fn rpo(&self) -> Duration {
        self.rpo.parse::<Span>().map_or(RPO_MAX, |span| span.0)
    }

    /// For how long a failover of it can be taken to another point.
    pub fn undo_window(&self) -> Duration {
        self.runbook.undo_window.parse::<Span>().map_or(Duration::ZERO, |span| span.0)
    }

    pub fn keep(&self) -> Option<Policy> {
        self.keep.as_ref().and_then(|rules| Policy::parse(rules).ok())
    }

    /// Where the source's networks lead here.
    pub fn networks(&self) -> Result<BTreeMap<String, NetworkHere>, SpecError> {
        let read = |(from, to): (&String, &String)| {
            let here = match to.split_once(':') {
                Some(("network", name)) if !name.is_empty() => NetworkHere::Network(name.into()),
                Some(("bridge", name)) if !name.is_empty() => NetworkHere::Bridge(name.into()),
                None if to == "none" => NetworkHere::Nowhere,
                _ => {
                    let why = "write `network:NAME`, `bridge:NAME` or `none`";
                    return Err(self.wrong(&format!("runbook.networks.{from}"), to, why));
                }
            };
            Ok((from.clone(), here))
        };
        self.runbook.networks.iter().map(read).collect()
    }

    /// Members in the order in which they start: each row once all rows before it are up.
    pub fn starts(&self) -> Result<Vec<Vec<String>>, SpecError> {
        let mut left: Vec<&String> = self.vms.iter().collect();
        let mut rows: Vec<Vec<String>> = Vec::new();
        while !left.is_empty() {
            let up: BTreeSet<&String> = rows.iter().flatten().collect();
            let may_start = |vm: &&String| {
                let steps = self.runbook.vm.get(*vm);
                steps.is_none_or(|steps| steps.after.iter().all(|before| up.contains(before)))
            };
            let (row, rest): (Vec<_>, Vec<_>) = left.into_iter().partition(may_start);
            if row.is_empty() {
                let names: Vec<&str> = rest.iter().map(|vm| vm.as_str()).collect();
                let why = "each of these waits for another one of them: leave one `after` out";
                return Err(self.wrong("runbook.vm.after", &names.join(", "), why));
            }
            rows.push(row.into_iter().cloned().collect());
            left = rest;
        }
        Ok(rows)
    }

    /// What member `vm` has to wait for, and how long at most.
    pub fn waits(&self, vm: &str) -> Result<(Vec<WaitFor>, Duration), SpecError> {
        let none = VmSteps::default();
        let steps = self.runbook.vm.get(vm).unwrap_or(&none);
        let at_most = self.span(&format!("runbook.vm.{vm}.wait_at_most"), &steps.wait_at_most)?;
        let waits = steps.wait_for.iter().map(|wait| {
            let why = "write `agent`, `tcp:PORT`, `tcp:HOST:PORT`, `console:TEXT` or `delay:5s`";
            parse_wait(wait).ok_or_else(|| self.wrong(&format!("runbook.vm.{vm}.wait_for"), wait, why))
        });
        Ok((waits.collect::<Result<_, _>>()?, at_most))
    }

    fn check_members(&self) -> Result<(), SpecError> {
        for (vm, steps) in &self.runbook.vm {
            for named in steps.after.iter().chain([vm]) {
                if !self.vms.contains(named) {
                    let why = "name it as it stands in `vms`";
                    return Err(self.wrong(&format!("runbook.vm.{vm}"), named, why));
                }
            }
            let (waits, _) = self.waits(vm)?;
            let never = match waits.iter().any(|wait| !matches!(wait, WaitFor::Delay(_))) {
                false => Some("write into `wait_for` what tells that it is up: `agent`"),
                true if !self.runbook.cold_boot => Some("`cold_boot` is false: leave one of them out"),
                true => None,
            };
            if let Some(why) = never.filter(|_| steps.boot_if_not_up) {
                return Err(self.wrong(&format!("runbook.vm.{vm}.boot_if_not_up"), "true", why));
            }
        }
        self.starts().map(drop)
    }

    fn span(&self, key: &str, given: &str) -> Result<Duration, SpecError> {
        given.parse::<Span>().map(|span| span.0).map_err(|error| self.wrong(key, given, &format!("{error}")))
    }

    pub(super) fn wrong(&self, key: &str, given: &str, why: &str) -> SpecError {
        let given = given.escape_debug().to_string();
        SpecError { group: self.name.clone(), key: key.into(), given, why: why.into() }
    }
}

fn parse_wait(text: &str) -> Option<WaitFor> {
    match text.split_once(':') {
        None => (text == "agent").then_some(WaitFor::Agent),
        Some(("tcp", rest)) => {
            let (host, port) = match rest.rsplit_once(':') {
                Some((host, port)) if !host.is_empty() => (Some(host.to_owned()), port),
                Some(_) => return None,
                None => (None, rest),
            };
            Some(WaitFor::Tcp { host, port: port.parse().ok().filter(|port| *port > 0)? })
        }
        Some(("console", text)) if !text.is_empty() => Some(WaitFor::Console(text.into())),
        Some(("delay", span)) => span.parse::<Span>().ok().map(|span| WaitFor::Delay(span.0)),
        Some(_) => None,
    }
}

/// Whether a group may be called so: it becomes part of paths and of commands.
pub fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (1..=63).contains(&name.len()) && name.chars().all(plain) && !name.starts_with(['-', '.'])
}

fn rpo() -> String {
    "5s".into()
}

impl Default for RunbookSpec {
    fn default() -> Self {
        Self {
            vm: BTreeMap::new(),
            networks: BTreeMap::new(),
            subnet: Vec::new(),
            drill_network: None,
            before: Vec::new(),
            after: Vec::new(),
            script_limit: "60s".into(),
            undo_window: "1h".into(),
            cold_boot: true,
        }
    }
}

impl Default for VmSteps {
    fn default() -> Self {
        let (after, wait_for, boot_if_not_up, hosts, guest_hook, address) = Default::default();
        Self { after, wait_for, wait_at_most: "120s".into(), boot_if_not_up, hosts, guest_hook, address }
    }
}

/// Members of one group: all of them stand until the last one does.
pub const MEMBERS_MAX: usize = 64;
const INTERVAL_MIN: Duration = Duration::from_millis(200);
const RPO_MIN: Duration = Duration::from_millis(400);
const EVERY_MIN: Duration = Duration::from_secs(10);
const DAY: Duration = Duration::from_secs(86_400);
const RPO_MAX: Duration = Duration::from_secs(86_400);

#[cfg(test)]
mod tests;
