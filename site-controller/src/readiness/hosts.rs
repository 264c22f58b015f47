//! Whether the hosts of a site have what the replicas need, where there are several. Asks as a failover does. Called by
//! `judge`.

use super::{
    Finding, Weight,
    judge::{Judge, Member},
    rules,
};
use crate::{
    failover::{
        error::FailoverError,
        placing::{Placement, Wanted},
        replica_xml::Needs,
    },
    store::PointSummary,
};

impl Member {
    pub(super) fn wanted(&self, point: &PointSummary, needs: Needs) -> Wanted {
        let (name, hosts) = (point.name.clone(), self.manner.hosts.clone());
        let needs = if point.stays_off { needs.idle() } else { needs };
        Wanted { vm: self.vm, name, needs, hosts, before: None, own_network: None }
    }
}

impl Judge {
    /// Of all members together.
    pub(super) async fn places(&self, wanted: Vec<Wanted>) -> Vec<Finding> {
        let (runbook, found) = (&self.runbook, Finding::new);
        let placement = match runbook.hosts.place(&wanted, &runbook.replica_dir, false).await {
            Ok(placement) => placement,
            Err(FailoverError::NoHost { name, why }) => {
                let what = format!("no host of this site can take it: {why}");
                return vec![found(Weight::Blocks, "no-host", Some(&name), what)];
            }
            Err(FailoverError::Preflight(problem)) => {
                return vec![Finding { vm: None, ..rules::preflight("", &problem) }];
            }
            Err(error) => return vec![found(Weight::Blocks, "check-failed", None, error.to_string())],
        };
        let names: Vec<&str> = wanted.iter().map(|of| of.name.as_str()).collect();
        findings(&names, placement)
    }

    /// Names in its runbook that are none of this site's hosts.
    pub(super) fn strangers(&self, member: &Member) -> Option<Finding> {
        let hosts = &self.runbook.hosts;
        let strangers = hosts.strangers(&member.manner.hosts);
        if strangers.is_empty() {
            return None;
        }
        let what =
            format!("`hosts` of its runbook names {}, which is none of this site's", strangers.join(", "));
        let (weight, what) = match hosts.are_several() {
            true => (Weight::Degrades, what),
            false => (Weight::Note, format!("{what}; there is only one, and it starts there")),
        };
        Some(Finding::new(weight, "unknown-host", Some(&member.name), what))
    }
}

/// What is made of where the members, by their names, would be placed. Pure.
fn findings(names: &[&str], placement: Placement) -> Vec<Finding> {
    let found = Finding::new;
    let over = placement.passed_over.into_iter().map(|over| {
        let what = format!("host {} can't be used: {}", over.host, over.why);
        found(Weight::Degrades, "host-away", None, what)
    });
    let unchecked = placement.unchecked.into_iter().map(|host| {
        let what = format!(
            "whether host {host} sees the folder of the replicas could not be checked: its libvirt has no storage driver; \
             install it there (Debian: libvirt-daemon-driver-storage; Fedora, RHEL: \
             libvirt-daemon-driver-storage-core), and restart libvirt"
        );
        found(Weight::Degrades, "host-unchecked", None, what)
    });
    let placed = names.iter().zip(placement.placed).filter_map(|(name, placed)| {
        let what = format!("it would start at host {}", placed?.name);
        Some(found(Weight::Note, "host", Some(name), what))
    });
    let unfit = placement.unfit.into_iter().map(|(at, over)| {
        let what = format!("host {} can't take it: {}", over.host, over.why);
        found(Weight::Note, "host-unfit", Some(names[at]), what)
    });
    let doubts = placement.doubts.into_iter();
    let doubts =
        doubts.filter_map(|(at, host, takes)| rules::qemu(names[at], &format!("host {host}"), &takes));
    over.chain(unchecked).chain(doubts).chain(placed).chain(unfit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        failover::{journal::Placed, placing::PassedOver},
        readiness::{Readiness, Verdict},
    };
    use lifeboat::units::UnixMs;

    fn verdict(placement: Placement) -> (Verdict, Vec<Finding>) {
        let readiness = Readiness {
            name: "shop".into(),
            is_group: true,
            verdict: Verdict::Ready,
            findings: findings(&["web"], placement),
            rpo_ms: None,
            memory_bytes: 0,
            disk_bytes: 0,
            checked_at: UnixMs(0),
        };
        let readiness = readiness.concluded();
        (readiness.verdict, readiness.findings)
    }

    #[test]
    fn a_host_that_can_t_say_what_it_sees_or_is_away_degrades_and_one_that_does_not_fit_is_a_note() {
        let (name, uri) = ("two".to_owned(), "qemu+ssh://root@two/system".to_owned());
        let placed = vec![Some(Placed { name, uri, memory: 1, vcpus: 1, started: false })];
        let well = Placement { placed, ..Placement::default() };
        let other = || PassedOver { host: "three".into(), why: "no network `lan`".into() };
        let (ready, _) = verdict(Placement { unfit: vec![(0, other())], ..well.clone() });
        assert_eq!(ready, Verdict::Ready);
        let (away, _) = verdict(Placement { passed_over: vec![other()], ..well.clone() });
        assert_eq!(away, Verdict::Degraded);

        let (unchecked, found) = verdict(Placement { unchecked: vec!["two".into()], ..well });
        assert_eq!((unchecked, found[0].code.as_str()), (Verdict::Degraded, "host-unchecked"));
        let what = &found[0].what;
        for words in
            ["host two", "could not be checked", "no storage driver", "libvirt-daemon-driver-storage"]
        {
            assert!(what.contains(words), "{what}");
        }
        assert!(
            found.iter().any(|found| found.what == "it would start at host two"),
            "it is used all the same"
        );
    }
}
