//! Whether the hosts of a site have what the replicas need, where there are several. Asks as a failover does. Called by
//! `judge`.

use super::{
    Finding, Weight,
    judge::{Judge, Member},
    rules,
};
use crate::{
    failover::{placing::Wanted, replica_xml::Needs, runbook::FailoverError},
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
        let over = placement.passed_over.into_iter().map(|over| {
            let what = format!("host {} can't be used: {}", over.host, over.why);
            found(Weight::Degrades, "host-away", None, what)
        });
        let placed = wanted.iter().zip(placement.placed).filter_map(|(of, placed)| {
            let what = format!("it would start at host {}", placed?.name);
            Some(found(Weight::Note, "host", Some(&of.name), what))
        });
        let unfit = placement.unfit.into_iter().map(|(at, over)| {
            let what = format!("host {} can't take it: {}", over.host, over.why);
            found(Weight::Note, "host-unfit", Some(&wanted[at].name), what)
        });
        over.chain(placed).chain(unfit).collect()
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
