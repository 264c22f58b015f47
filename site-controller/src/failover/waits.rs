//! Whether a replica is up, as its runbook wants to know: its agent answers, somebody listens, its console has said something.
//! Promises: one look takes no longer than a few seconds; what cannot be looked at is an error, and not a wait for ever; of a
//! console only what was said since the replica was started here counts. Called by `replicas`, and through it by `drill`.

use super::{attempt::blocking, error::FailoverError, journal::Placed, replica_xml, runbook::Runbook};
use crate::group::spec::WaitFor;
use futures_util::future::join_all;
use lifeboat::{
    address::is_link_local,
    hypervisor::{
        guest_agent::{AgentError, CHANNEL, Interface},
        libvirt::{Domain, Hypervisor, XmlView},
    },
    id::VmId,
};
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    net::IpAddr,
    path::Path,
    time::Duration,
};
use tokio::{net::TcpStream, time::timeout};

/// `at`: of a trial, its host; otherwise that of the VM's failover.
pub(super) async fn is_up(
    runbook: &Runbook,
    vm: VmId,
    at: Option<&Placed>,
    wait: &WaitFor,
) -> Result<bool, FailoverError> {
    // A trial has no journal.
    let own = if at.is_none() { runbook.journal.load(vm)? } else { None };
    let at = at.or(own.as_ref().and_then(|record| record.host.as_ref()));
    match wait {
        WaitFor::Delay(_) => Ok(true),
        WaitFor::Tcp { host: Some(host), port } => Ok(listens(host.trim_matches(['[', ']']), *port).await),
        WaitFor::Tcp { host: None, port } => {
            let told = addresses(runbook, vm, at).await?;
            let tried = told.iter().map(|address| async move { listens(&address.to_string(), *port).await });
            Ok(join_all(tried).await.contains(&true))
        }
        WaitFor::Agent => {
            let answer = by_agent(runbook, vm, at, |domain| domain.guest_agent().ping(ANSWER_WITHIN));
            Ok(answer.await?.is_some())
        }
        WaitFor::Console(text) => {
            let from = own.as_ref().and_then(|record| record.console_from).unwrap_or(0);
            console_says(runbook, vm, at, from, text.clone()).await
        }
    }
}

async fn listens(host: &str, port: u16) -> bool {
    let connect = timeout(CONNECT_WITHIN, TcpStream::connect((host, port)));
    connect.await.is_ok_and(|made| made.is_ok())
}

/// What its agent answers; `None`: it is silent.
async fn by_agent<T: Send + 'static>(
    runbook: &Runbook,
    vm: VmId,
    at: Option<&Placed>,
    ask: impl FnOnce(&Domain) -> Result<T, AgentError> + Send + 'static,
) -> Result<Option<T>, FailoverError> {
    let asked = move |hypervisor: &Hypervisor| {
        let domain = hypervisor.domain_by_uuid(vm)?;
        let has_channel = domain.xml(XmlView::Active)?.contains(CHANNEL);
        Ok(has_channel.then(|| ask(&domain).ok()))
    };
    let answer = runbook.hosts.at(at)?.ask(asked).await?;
    answer.ok_or_else(|| FailoverError::Wait("it has no channel for a guest agent".into()))
}

/// Where its agent says that it can be reached; none as long as the agent is silent.
async fn addresses(runbook: &Runbook, vm: VmId, at: Option<&Placed>) -> Result<Vec<IpAddr>, FailoverError> {
    let told = by_agent(runbook, vm, at, |domain| domain.guest_agent().interfaces()).await?;
    Ok(outward(&told.unwrap_or_default()))
}

fn outward(interfaces: &[Interface]) -> Vec<IpAddr> {
    let all = interfaces.iter().flat_map(|interface| &interface.addresses).map(|address| address.ip);
    all.filter(|ip| !ip.is_loopback() && !ip.is_unspecified() && !is_link_local(*ip))
        .take(ADDRESSES_MAX)
        .collect()
}

/// Whether it has said this since its file was this long.
pub(super) async fn console_says(
    runbook: &Runbook,
    vm: VmId,
    at: Option<&Placed>,
    from: u64,
    text: String,
) -> Result<bool, FailoverError> {
    let host = runbook.hosts.at(at)?;
    let xml = host.ask(move |hypervisor| hypervisor.domain_by_uuid(vm)?.xml(XmlView::Active)).await?;
    let wrong = |why: &str| FailoverError::Wait(why.into());
    let console = replica_xml::console(&xml).ok_or_else(|| wrong("its console is not written to a file"))?;
    // With one host all that is named by path was always taken to lie here.
    let is_here = host.is_local() || !runbook.hosts.are_several();
    if !is_here && !console.file.starts_with(&runbook.replica_dir) {
        return Err(wrong("its console is a file of another host, which can't be read from here"));
    }
    blocking(move || {
        let failed = |source| FailoverError::File { path: console.file.clone(), source };
        Ok(end_of(&console.file, from).map_err(failed)?.contains(&text))
    })
    .await
}

/// How much the console of a replica that is about to be started holds from before, when it ran here last.
pub(super) fn console_before(xml: &str) -> Option<u64> {
    let console = replica_xml::console(xml).filter(|console| console.grows)?;
    std::fs::metadata(console.file).ok().map(|file| file.len())
}

/// Of what was written past `from`, the end. A file that is shorter was begun anew.
fn end_of(file: &Path, from: u64) -> io::Result<String> {
    let mut opened = File::open(file)?;
    let len = opened.metadata()?.len();
    let from = if len < from { 0 } else { from };
    opened.seek(SeekFrom::Start(from.max(len.saturating_sub(LOOKED_AT))))?;
    let mut bytes = Vec::new();
    opened.take(LOOKED_AT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Of a console's file, how much of its end is looked at.
const LOOKED_AT: u64 = 1 << 20;
const CONNECT_WITHIN: Duration = Duration::from_secs(2);
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// That a guest is tried at, of those that it tells.
const ADDRESSES_MAX: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_read_from_its_file_and_what_it_said_before_the_start_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("console.log");
        let xml = |append: &str| {
            format!(
                "<domain><devices><serial type='file'><source path='{}'{append}/></serial></devices></domain>",
                file.display()
            )
        };
        let growing = xml(" append='on'");
        assert_eq!(console_before(&growing), None, "it never ran here");
        std::fs::write(&file, "login: ").unwrap();
        assert_eq!((console_before(&growing), console_before(&xml(""))), (Some(7), None));
        std::fs::write(&file, "login: ready").unwrap();
        assert_eq!(end_of(&file, 7).unwrap(), "ready");
        std::fs::write(&file, "new").unwrap();
        assert_eq!(end_of(&file, 7).unwrap(), "new", "it was begun anew");
    }

    #[test]
    fn a_guest_is_looked_for_where_others_can_reach_it() {
        let interface = |ips: &[&str]| {
            let address = |ip: &&str| lifeboat::address::Address::new(ip.parse().unwrap(), 24).unwrap();
            Interface { name: "eth0".into(), mac: None, addresses: ips.iter().map(address).collect() }
        };
        let told = [interface(&["127.0.0.1", "fe80::1", "169.254.3.4"]), interface(&["10.1.0.5", "fd00::5"])];
        let found: Vec<String> = outward(&told).iter().map(ToString::to_string).collect();
        assert_eq!(found, ["10.1.0.5", "fd00::5"]);
        let many: Vec<Interface> = (1..20).map(|no| interface(&[&format!("10.1.0.{no}")])).collect();
        assert_eq!(outward(&many).len(), ADDRESSES_MAX, "a guest may say anything");
    }
}
