//! What is made of what was seen. Pure: values in, findings out. Called by `judge`.

use super::{Finding, Weight};
use crate::failover::{addresses::plan::Cards, preflight::PreflightError, qemu_version::Takes};
use lifeboat::{
    hypervisor::libvirt::HypervisorError,
    units::{ByteSize, UnixMs},
};
use std::time::Duration;

const DAY: Duration = Duration::from_secs(24 * 3600);
/// Certificates are renewed within this time before they end.
const EXPIRES_SOON: Duration = Duration::from_secs(30 * 24 * 3600);
/// Of the RPO; a little later than it is how things go.
const FAR_LATER: u64 = 10;

/// What the checks of a failover found.
pub fn preflight(vm: &str, problem: &PreflightError) -> Finding {
    let code = match problem {
        PreflightError::Hypervisor(_) => "libvirt",
        PreflightError::NameTaken { .. } => "name-taken",
        PreflightError::AlreadyRunning => "runs-here",
        PreflightError::FileMissing { .. } => "file-missing",
        PreflightError::NetworkMissing { .. } => "network-missing",
        PreflightError::HugePages(_) => "huge-pages",
        PreflightError::MachineMissing { .. } => "machine-missing",
        PreflightError::NoRoom { .. } => "no-room",
        PreflightError::NoMemory { .. } => "memory",
        PreflightError::Disk { .. } => "replica-dir",
    };
    Finding::new(Weight::Blocks, code, Some(vm), problem.to_string())
}

/// Whether the QEMU at a place (`this site`, `host two`) takes the guest's memory.
pub fn qemu(vm: &str, place: &str, takes: &Takes) -> Option<Finding> {
    let (weight, code, what) = match takes {
        Takes::Yes => return None,
        Takes::May { saved, here } => {
            let what = format!(
                "QEMU is {here} at {place}, and the guest runs on {saved}: QEMU does not promise that an earlier version \
                 takes the memory of a later one, and a replica whose memory is refused boots from its disks; install QEMU \
                 {saved} or later there, or see by `lifeboat drill` that the guest goes on"
            );
            (Weight::Degrades, "qemu-older", what)
        }
        Takes::Unknown(why) => {
            let what = format!("whether the QEMU at {place} takes the guest's memory is not known: {why}");
            (Weight::Note, "qemu-unknown", what)
        }
    };
    Some(Finding::new(weight, code, Some(vm), what))
}

/// Whether the site's processor has what the guest's has, where that was asked.
pub fn processor(vm: &str, has: Result<bool, HypervisorError>) -> Option<Finding> {
    let (weight, code, what) = match has {
        Ok(true) => return None,
        Ok(false) => {
            let what = "this site's processor lacks something that the guest was started with; give the guest an older CPU \
                        model, or the site a newer processor";
            (Weight::Blocks, "processor", what.to_owned())
        }
        Err(error) => {
            let what = format!("whether this site's processor fits is not known: {error}");
            (Weight::Note, "processor-unknown", what)
        }
    };
    Some(Finding::new(weight, code, Some(vm), what))
}

/// What of the runbook's addresses can't be given to a replica, as far as that can be told beforehand.
pub fn addresses(vm: &str, cards: &Cards) -> Vec<Finding> {
    let degrades = |what: String| Finding::new(Weight::Degrades, "addresses", Some(vm), what);
    let left = cards.without_the_guest().into_iter().filter(|step| !step.done);
    let mut found: Vec<Finding> = left.map(|step| degrades(step.to_string())).collect();
    if cards.need_the_guest() && !cards.agent {
        let what = "the runbook has addresses for it, and the guest has no channel for an agent, which would take them";
        found.push(degrades(what.into()));
    }
    found
}

/// `age` of the newest point, where it should be `target` at the most.
pub fn rpo(vm: Option<&str>, age: Duration, target: Duration) -> Option<Finding> {
    if age <= target {
        return None;
    }
    let far = age.as_millis() > target.as_millis().saturating_mul(u128::from(FAR_LATER));
    let what = format!(
        "the newest point is {} old, and should be {} at the most{}",
        seconds(age),
        seconds(target),
        if far { "; see `lifeboat status` for what holds points up" } else { "" }
    );
    Some(Finding::new(Weight::Degrades, "rpo", vm, what))
}

/// A certificate of the site's.
pub fn certificate(expires: UnixMs, now: UnixMs) -> Option<Finding> {
    let left = Duration::from_millis(expires.0.saturating_sub(now.0));
    let what = if left.is_zero() {
        "the site's certificate has expired: no agent can connect; `lifeboat-site-controller init --address HOST` makes a new one".into()
    } else if left < EXPIRES_SOON {
        format!(
            "the site's certificate expires in {} days; `lifeboat-site-controller init --address HOST` makes a new one",
            left.as_secs() / DAY.as_secs()
        )
    } else {
        return None;
    };
    Some(Finding::new(Weight::Degrades, "certificate", None, what))
}

/// That of an agent, which has VMs that are looked at.
pub fn agent_certificate(agent: &str, expires: UnixMs, now: UnixMs) -> Option<Finding> {
    let left = Duration::from_millis(expires.0.saturating_sub(now.0));
    let what = format!(
        "the certificate of agent {agent} expires in {} days, and no point comes after that; enrol it again \
         (`lifeboat-agent enrol`)",
        left.as_secs() / DAY.as_secs()
    );
    (left < EXPIRES_SOON).then(|| Finding::new(Weight::Degrades, "agent-certificate", None, what))
}

/// Memory of all replicas together, where the site has `free`.
pub fn memory(needed: u64, free: u64) -> Option<Finding> {
    let (needed_text, free_text) = (ByteSize(needed), ByteSize(free));
    let what = format!(
        "the replicas take {needed_text} of memory, and this site has {free_text} free; stop something else"
    );
    (needed > free).then(|| Finding::new(Weight::Blocks, "memory", None, what))
}

/// What is free where points are stored.
pub fn store(free: u64, reserve: u64) -> Option<Finding> {
    let (free_text, reserve_text) = (ByteSize(free), ByteSize(reserve));
    let what = format!(
        "the store has {free_text} free and takes no points below {reserve_text}; give it a larger disk, or keep less (`lifeboat prune`)"
    );
    (free < reserve.saturating_add(reserve / 2))
        .then(|| Finding::new(Weight::Degrades, "store-full", None, what))
}

pub(super) fn seconds(span: Duration) -> String {
    match span.as_secs() {
        0..=9 => format!("{:.1} s", span.as_secs_f64()),
        secs @ 10..=599 => format!("{secs} s"),
        secs @ 600..=35999 => format!("{} min", secs / 60),
        secs => format!("{} h", secs / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        failover::replica_xml::{Card, Wiring},
        group::{
            GroupSpec,
            address_spec::{CardSpec, Occasion},
        },
    };
    use lifeboat::{address::Mac, hypervisor::version::QemuVersion, id::VmId};

    #[test]
    fn addresses_that_a_guest_can_t_be_given_are_told_beforehand() {
        let mut spec = GroupSpec::new("shop", &["web"]);
        let address = CardSpec { ip: vec!["10.9.0.5/24".into()], ..CardSpec::default() };
        spec.runbook.vm.entry("web".into()).or_default().address = vec![address];
        let card = Card { mac: Mac::made_up([0, 0, 1]), on: None, virtio: true };
        let found = |cards: &[&Card], agent| {
            let wiring = Wiring { cards: cards.iter().map(|card| (*card).clone()).collect(), agent };
            let rules = spec.addresses("web", Occasion::Failover).unwrap();
            let cards = Cards::new(rules, wiring, VmId::from_bytes([1; 16]), true);
            addresses("web", &cards).into_iter().map(|found| found.what).collect::<Vec<_>>()
        };
        assert!(found(&[&card], true).is_empty());
        let silent = found(&[&card], false);
        assert!(silent.len() == 1 && silent[0].contains("no channel"), "{silent:?}");
        let which = found(&[&card, &card], true);
        assert!(which.len() == 1 && which[0].contains("2 cards"), "{which:?}");
    }

    #[test]
    fn what_is_late_short_or_about_to_expire_is_said_and_what_is_not_is_silent() {
        let s = Duration::from_secs;
        assert_eq!(rpo(None, s(5), s(5)), None);
        let late = rpo(Some("web"), s(6), s(5)).unwrap();
        assert!(
            late.weight == Weight::Degrades && late.what.contains("6.0 s") && !late.what.contains("status")
        );
        assert!(rpo(None, s(60), s(5)).unwrap().what.contains("lifeboat status"));

        let days = |days: u64| UnixMs(days * 24 * 3600 * 1000);
        assert_eq!(certificate(days(100), days(1)), None);
        assert!(certificate(days(20), days(1)).unwrap().what.contains("19 days"));
        assert!(certificate(days(1), days(2)).unwrap().what.contains("expired"));

        assert_eq!(agent_certificate("kvm1", days(100), days(1)), None);
        let ends = agent_certificate("kvm1", days(20), days(1)).unwrap();
        assert!(ends.weight == Weight::Degrades && ends.what.contains("kvm1 expires in 19 days"), "{ends:?}");

        let version = QemuVersion::new;
        let takes = Takes::May { saved: version(10, 0, 2), here: version(7, 2, 22) };
        let found = qemu("web", "host two", &takes).unwrap();
        assert!(
            found.weight == Weight::Degrades && found.what.contains("QEMU is 7.2.22 at host two"),
            "{found:?}"
        );
        assert_eq!(qemu("web", "this site", &Takes::Unknown("why".into())).unwrap().weight, Weight::Note);
        assert_eq!(qemu("web", "this site", &Takes::Yes), None);

        assert_eq!(memory(10, 10), None);
        assert_eq!(memory(11, 10).unwrap().weight, Weight::Blocks);
        assert_eq!(store(1500, 1000), None);
        assert_eq!(store(1499, 1000).unwrap().code, "store-full");
    }
}
