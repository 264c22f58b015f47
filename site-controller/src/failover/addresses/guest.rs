//! Doing in a guest what a plan says, through its agent: by Linux's `ip`, and `resolvectl` for name servers.
//! Promises: it may be done again, by a controller that knows nothing of the first time but the plan; what is called done is
//! what the guest tells afterwards; each program has a limit of time, and all of it has one; no shell reads any of it.
//! Blocking.

use super::plan::{OfInterface, Plan};
use crate::failover::outcome::Afterwards;
use lifeboat::{
    address::Address,
    fault,
    hypervisor::guest_agent::{AgentChannel, AgentError, GuestAgent, Interface, ProgramEnd},
};
use std::{
    net::IpAddr,
    time::{Duration, Instant},
};

/// Carries a plan out, until then at the latest.
pub fn carry_out<C: AgentChannel>(agent: &GuestAgent<C>, plan: &Plan, until: Instant) -> Vec<Afterwards> {
    let mut guest = Guest { agent, until, ip: None };
    let one = |of: &OfInterface| {
        let (done, why) = match guest.settle(of) {
            Ok(()) => (true, None),
            Err(why) => (false, Some(why)),
        };
        Afterwards { what: words(of), done, why }
    };
    plan.interfaces.iter().map(one).collect()
}

/// What is to become of an interface.
pub fn words(of: &OfInterface) -> String {
    let list = |all: &[Address]| all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let mac = of.mac.map(|mac| format!("MAC address {mac}"));
    let add = (!of.add.is_empty()).then(|| list(&of.add));
    let remove = (!of.remove.is_empty()).then(|| format!("instead of {}", list(&of.remove)));
    let addresses: Vec<String> = add.into_iter().chain(remove).collect();
    let addresses = Some(addresses.join(" ")).filter(|text| !text.is_empty());
    let gateways = of.gateways.iter().map(|gateway| format!("gateway {gateway}"));
    let dns = of.dns.iter().map(|dns| format!("DNS {dns}"));
    let all: Vec<String> = mac.into_iter().chain(addresses).chain(gateways).chain(dns).collect();
    format!("{} in the guest: {}", of.name, all.join(", "))
}

struct Guest<'a, C> {
    agent: &'a GuestAgent<C>,
    until: Instant,
    /// Where its `ip` is, once that is known.
    ip: Option<&'static str>,
}

impl<C: AgentChannel> Guest<'_, C> {
    fn settle(&mut self, of: &OfInterface) -> Result<(), String> {
        let mut wrong = None;
        for _ in 0..ROUNDS {
            let todo = self.todo(of)?;
            if todo.is_empty() {
                break;
            }
            if of.up {
                self.ip(&["link", "set", "dev", &of.name, "up"])?;
            }
            // One that fails may work once the next one is done: an address that is there with another length, say.
            for words in todo {
                if let Err(why) = self.ip(&words.iter().map(String::as_str).collect::<Vec<_>>()) {
                    wrong.get_or_insert(why);
                }
            }
        }
        if let Some(left) = self.todo(of)?.first() {
            let why = wrong.unwrap_or_else(|| "it was done, and undone by the guest".into());
            return Err(format!("`ip {}` is still to be done: {why}", left.join(" ")));
        }
        of.gateways.iter().try_for_each(|gateway| self.lead_out(&of.name, *gateway))?;
        self.names(of)
    }

    /// What `ip` is to be told, going by what the guest tells now.
    fn todo(&self, of: &OfInterface) -> Result<Vec<Vec<String>>, String> {
        let all = self.agent.interfaces().map_err(|error| error.to_string())?;
        let now = all.into_iter().find(|now| now.name == of.name);
        let now: Interface = now.ok_or_else(|| format!("the guest has no interface {} any more", of.name))?;
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let mut todo = Vec::new();
        if let Some(mac) = of.mac.filter(|mac| now.mac != Some(*mac)) {
            todo.push(owned(&["link", "set", "dev", &of.name, "address", &mac.to_string()]));
        }
        for new in of.add.iter().filter(|new| !now.addresses.contains(new)) {
            todo.push(owned(&["address", "add", &new.to_string(), "dev", &of.name]));
        }
        for old in of.remove.iter().filter(|old| now.addresses.contains(old)) {
            todo.push(owned(&["address", "del", &old.to_string(), "dev", &of.name]));
        }
        Ok(todo)
    }

    /// The default route of this kind goes by this gateway, and by no other on the interface.
    fn lead_out(&mut self, interface: &str, gateway: IpAddr) -> Result<(), String> {
        let kind = if gateway.is_ipv4() { "-4" } else { "-6" };
        for _ in 0..ROUTES_MAX {
            // The last one fails: there is none left.
            if self.ip(&[kind, "route", "del", "default", "dev", interface]).is_err() {
                break;
            }
        }
        let gateway = gateway.to_string();
        self.ip(&[kind, "route", "replace", "default", "via", &gateway, "dev", interface])
    }

    fn names(&self, of: &OfInterface) -> Result<(), String> {
        if of.dns.is_empty() {
            return Ok(());
        }
        let servers = of.dns.iter().map(ToString::to_string);
        let arguments: Vec<String> = ["dns".to_owned(), of.name.clone()].into_iter().chain(servers).collect();
        self.run("resolvectl", &arguments).map_err(|error| match error {
            RunError::NotStarted(why) => {
                format!(
                    "its name servers are as they were, for it has no `resolvectl`, or may not run it: {why}"
                )
            }
            RunError::Failed(why) => format!("its name servers are as they were: {why}"),
        })
    }

    fn ip(&mut self, words: &[&str]) -> Result<(), String> {
        let arguments: Vec<String> = words.iter().map(|word| (*word).to_owned()).collect();
        let places = self.ip.map_or(PLACES.to_vec(), |known| vec![known]);
        let mut missing = String::new();
        for program in places {
            match self.run(program, &arguments) {
                Err(RunError::NotStarted(why)) => missing = why,
                ended => {
                    self.ip = Some(program);
                    return ended.map_err(|error| error.to_string());
                }
            }
        }
        Err(format!("its agent may not run programs (`guest-exec`), or it has no `ip`: {missing}"))
    }

    fn run(&self, program: &str, arguments: &[String]) -> Result<(), RunError> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(RunError::Failed("the time for it is over".into()));
        }
        let ended = self.agent.run(program, arguments, left.min(ONE_WITHIN));
        fault::point("failover.address");
        let said = || format!("`{program} {}`", arguments.join(" "));
        match ended {
            Ok(ProgramEnd::Exited(0)) => Ok(()),
            Ok(ProgramEnd::Exited(code)) => Err(RunError::Failed(format!("{} ended with {code}", said()))),
            Ok(ProgramEnd::Killed(signal)) => {
                Err(RunError::Failed(format!("{} was ended by signal {signal}", said())))
            }
            Err(error @ AgentError::Refused { command: "guest-exec", .. }) => {
                Err(RunError::NotStarted(error.to_string()))
            }
            Err(error) => Err(RunError::Failed(error.to_string())),
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum RunError {
    /// The program is not there, or the agent runs none.
    #[error("{0}")]
    NotStarted(String),
    #[error("{0}")]
    Failed(String),
}

/// Where Linux has it, whatever the agent's own PATH is.
const PLACES: &[&str] = &["ip", "/sbin/ip", "/usr/sbin/ip", "/usr/bin/ip"];
/// An address that takes others with it when it goes is followed by one more.
const ROUNDS: usize = 3;
const ROUTES_MAX: usize = 4;
const ONE_WITHIN: Duration = Duration::from_secs(10);
