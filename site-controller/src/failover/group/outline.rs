//! What a group's failover would do, step by step, in words: its runbook as `--dry-run` prints it.
//! Promises: the steps stand in the order in which `group` takes them. Pure. Called by `api`.

use crate::group::{
    GroupSpec,
    spec::{NetworkHere, VmSteps},
};

/// What the site adds of its own.
#[derive(Clone, Copy, Debug, Default)]
pub struct OfSite<'a> {
    /// `fence_command` is run.
    pub fences: bool,
    /// In guests whose runbook names no hook.
    pub guest_hook: &'a [String],
}

/// `left_off`: members whose replicas are not started.
pub fn steps(spec: &GroupSpec, planned: bool, left_off: &[String], site: OfSite<'_>) -> Vec<String> {
    let (all, runbook) = (spec.vms.join(", "), &spec.runbook);
    let mut steps = Vec::new();
    if planned {
        steps.push(format!(
            "bring the sources of {all} to stand, and take their last points; from here on whatever fails before the commit lets \
             them go on"
        ));
        steps.extend(restore(spec, &all));
        steps.extend(scripts(spec, &runbook.before, "if it fails, all is called off"));
        steps.push("commit: from here on the VMs are this site's".into());
    } else {
        steps.push(format!("fence {all}: their sources' agents are refused"));
        if site.fences {
            steps.push("run the site's `fence_command` for each; if one fails, stop there".into());
        }
        steps.extend(restore(spec, &all));
        steps.extend(scripts(spec, &runbook.before, "if it fails, that is a warning"));
    }
    // What was checked when the group was made.
    for row in spec.starts().unwrap_or_else(|_| vec![spec.vms.clone()]) {
        steps.extend(row.iter().map(|vm| start(spec, vm, left_off.contains(vm), site)));
    }
    steps.extend(scripts(spec, &runbook.after, "if it fails, that is a warning"));
    if planned {
        steps.push(format!("shut the sources of {all} off for good"));
    }
    steps
}

fn restore(spec: &GroupSpec, all: &str) -> Vec<String> {
    // What was checked when the group was made.
    let networks = spec.networks().unwrap_or_default();
    let leads = networks.iter().map(|(from, here)| match here {
        NetworkHere::Network(name) => {
            format!("put cards that are on `{from}` there on network `{name}` here")
        }
        NetworkHere::Bridge(name) => format!("put cards that are on `{from}` there on bridge `{name}` here"),
        NetworkHere::Nowhere => format!("pull the cables of cards that are on `{from}` there"),
    });
    [format!("restore disks and memory of {all}")].into_iter().chain(leads).collect()
}

fn scripts<'a>(
    spec: &'a GroupSpec,
    commands: &'a [Vec<String>],
    failing: &'a str,
) -> impl Iterator<Item = String> + 'a {
    let limit = &spec.runbook.script_limit;
    commands
        .iter()
        .map(move |command| format!("run `{}` here, for {limit} at the most; {failing}", command.join(" ")))
}

fn start(spec: &GroupSpec, vm: &str, left_off: bool, site: OfSite<'_>) -> String {
    if left_off {
        return format!("define {vm}, and leave it off, as it is");
    }
    let none = VmSteps::default();
    let own = spec.runbook.vm.get(vm).unwrap_or(&none);
    let mut words = format!("start {vm}");
    if !own.after.is_empty() {
        words += &format!(
            ", once {} {} up",
            own.after.join(" and "),
            if own.after.len() > 1 { "are" } else { "is" }
        );
    }
    let hook = if own.guest_hook.is_empty() { site.guest_hook } else { &own.guest_hook };
    if !hook.is_empty() {
        words += &format!("; run `{}` in it", hook.join(" "));
    }
    if !own.wait_for.is_empty() {
        words +=
            &format!("; wait for {}, each for {} at the most", own.wait_for.join(", "), own.wait_at_most);
    }
    if own.boot_if_not_up {
        words += "; if that does not come, boot it from its disks";
    }
    if !spec.runbook.cold_boot {
        words += "; if it does not go on with its memory, leave it at that";
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shop() -> GroupSpec {
        let mut spec = GroupSpec::new("shop", &["web", "db"]);
        let owned = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let web = VmSteps {
            after: owned(&["db"]),
            wait_for: owned(&["tcp:80", "delay:5s"]),
            guest_hook: owned(&["/bin/resumed", "now"]),
            ..VmSteps::default()
        };
        spec.runbook.vm.insert("web".into(), web);
        spec.runbook.before = vec![owned(&["dns", "off"])];
        spec.runbook.after = vec![owned(&["dns", "on"])];
        spec.runbook.networks.insert("lan".into(), "network:dr-lan".into());
        spec
    }

    fn told(planned: bool, left_off: &[String], site: OfSite<'_>) -> String {
        steps(&shop(), planned, left_off, site).join("\n")
    }

    #[test]
    fn a_runbook_is_told_in_the_order_in_which_it_is_done() {
        let hook = ["/bin/hook".to_owned()];
        let site = OfSite { fences: true, guest_hook: &hook };
        let all = |planned: bool| {
            let said = told(planned, &[], site);
            let fence = if planned { "last points" } else { "`fence_command`" };
            let order = [
                fence,
                "restore disks",
                "on `lan` there on network `dr-lan` here",
                "`dns off`",
                "start db; run `/bin/hook`",
                "start web, once db is up; run `/bin/resumed now` in it; wait for tcp:80, delay:5s, each for 120s",
                "`dns on`",
            ];
            let places: Vec<usize> = order
                .iter()
                .map(|words| said.find(words).unwrap_or_else(|| panic!("{words}: {said}")))
                .collect();
            assert!(places.is_sorted(), "{said}");
            said
        };
        assert!(
            all(true).contains("commit") && !all(true).contains("fence") && !all(false).contains("commit")
        );
        let off = told(false, &["db".to_owned()], OfSite::default());
        assert!(
            off.contains("leave it off") && !off.contains("start db") && !off.contains("fence_command"),
            "{off}"
        );
    }
}
