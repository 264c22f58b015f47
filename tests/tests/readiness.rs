//! `lifeboat check`: what it calls ready is failed over, and what would stand in a failover's way is named before.

use anyhow::{Result, ensure};
use rig::{
    Guest, Rig, Site, eventually,
    older_qemu::SAID,
    product::{Agent, Controller, small},
};
use serde_json::Value;
use std::time::Duration;

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// The exit code, the verdict, and the codes of what was found.
fn check(controller: &Controller, name: &str) -> Result<(Option<i32>, String, Vec<String>)> {
    let said = controller.cli(&["check", name, "--json"])?;
    let found: Value = serde_json::from_str(&said.stdout)?;
    let codes = found[0]["findings"].as_array().into_iter().flatten();
    let codes = codes.map(|finding| finding["code"].as_str().unwrap_or_default().to_owned()).collect();
    Ok((said.status.code(), found[0]["verdict"].as_str().unwrap_or_default().to_owned(), codes))
}

fn becomes(controller: &Controller, code: i32, verdict: &str, finding: Option<&str>) -> Result<()> {
    let mut last = None;
    let done = eventually(SOON, &format!("`lifeboat check` to say {verdict} ({finding:?})"), || {
        let (exit, said, codes) = check(controller, "shop")?;
        let found = finding.is_none_or(|finding| codes.iter().any(|code| code == finding));
        let fits = exit == Some(code) && said == verdict && found;
        last = Some((exit, said, codes));
        Ok(fits.then_some(()))
    });
    done.map_err(|error| error.context(format!("{last:?}")))
}

/// A domain of another's name, as somebody defines it by mistake.
fn squatter(site: &Site, guest: &Guest) -> Result<()> {
    let xml = guest.site().virsh(["dumpxml", "--inactive", guest.name()])?;
    let (before, rest) = xml.split_once("<uuid>").unwrap_or_default();
    let (_, after) = rest.split_once("</uuid>").unwrap_or_default();
    let path = site.dir("squatter")?.join("web.xml");
    std::fs::write(&path, format!("{before}{after}"))?;
    site.virsh(["define", &path.to_string_lossy()]).map(drop)
}

/// Goal: ready means that a failover works, and what would stop one is said before, with a code for programs. Method: a group
/// of one; its agent goes away; its name is taken at the site, by which the failover itself is refused; all is mended; the
/// site's QEMU becomes an older one than the source's, as its libvirt says, and it is failed over all the same.
#[test]
fn what_is_ready_is_failed_over_and_what_stands_in_the_way_is_named_before() -> Result<()> {
    let rig = Rig::new("ready")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web"))?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::install(&a, &controller, "[defaults]\nmax_pause = \"5s\"")?;
    agent.start()?;
    eventually(SOON, "the group to be made", || {
        let made = controller.cli(&["group", "create", "shop", "--vm", "web", "--rpo", "20s"])?;
        Ok(made.status.success().then_some(()))
    })?;
    becomes(&controller, 0, "ready", None)?;
    let (_, _, codes) = check(&controller, "shop")?;
    ensure!(!codes.iter().any(|code| code.starts_with("qemu")), "the two QEMUs are one: {codes:?}");

    agent.stop()?;
    becomes(&controller, 4, "degraded", Some("agent-away"))?;

    squatter(&b, &guest)?;
    becomes(&controller, 5, "not-ready", Some("name-taken"))?;
    let refused = controller.cli(&["failover", "shop", "--emergency", "--yes"])?;
    ensure!(!refused.status.success() && refused.stderr.contains("another UUID"), "{refused:?}");
    b.virsh(["undefine", "web"])?;

    agent.start()?;
    becomes(&controller, 0, "ready", None)?;
    b.pretend_older_qemu()?;
    ensure!(b.virsh(["version"])?.contains(SAID), "{}", b.virsh(["version"])?);
    becomes(&controller, 4, "degraded", Some("qemu-older"))?;
    guest.destroy()?;
    controller.cli(&["failover", "shop", "--emergency", "--yes"])?.success()?;
    let replica = b.guest("web")?;
    replica.wait_for_state("running", SOON)?;
    becomes(&controller, 5, "not-ready", Some("failed-over"))?;
    let shown = controller.cli(&["status"])?.stdout;
    ensure!(shown.contains("GROUP") && shown.contains("NOT READY"), "{shown}");
    Ok(())
}
