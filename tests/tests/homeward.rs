//! The way home by one command each: `lifeboat reprotect` and `lifeboat failback`, of a group and of a VM, led from the site
//! where it runs.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Link,
    ends::{End, World},
    eventually,
    product::{killed_at, small},
};
use std::{env, time::Duration};

const BOOT: Duration = Duration::from_secs(120);
const SOON: Duration = Duration::from_secs(240);

/// What runs at `from` is protected to `to` by one command; only what changed travels.
fn reprotect(from: &End, to: &End, group: &str, link: &Link, trip: usize) -> Result<()> {
    let carried = link.bytes()?;
    let done = from.does("reprotect", group, to)?;
    let mut disks = 0;
    let members = done["members"].as_array().context("members")?;
    for member in members {
        let point = to.first_point(member)?;
        let disk = point["disk_changed_bytes"].as_u64().unwrap_or(u64::MAX);
        let whole: u64 = member["seed"]["disks"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|disk| disk["bytes"].as_u64())
            .sum();
        ensure!(whole > 0 && disk < whole / 2, "the disks travelled: {point}");
        disks += whole;
    }
    to.controller.wait_more_group_points(group, 1, SOON)?;
    let now = link.bytes()?;
    let wire = now.a_to_b + now.b_to_a - carried.a_to_b - carried.b_to_a;
    eprintln!("trip {trip}, to {}: {wire} bytes for {disks} of disk", to.site.name());
    // Memory that a site has never seen travels once.
    ensure!(trip == 0 || wire < disks / 2, "the line carried {wire}");
    Ok(())
}

fn trips() -> usize {
    env::var("LIFEBOAT_TRIPS").ok().and_then(|trips| trips.parse().ok()).unwrap_or(1)
}

/// Goal: an operator brings a group to the other site and home again by one command each, as often as he likes; nothing
/// is lost, it is who it was, and whoever is left anywhere can't be started. Method: two guests at work; their own
/// counters, memory and disks are the witnesses; each command is also given when there is nothing for it to do.
#[test]
fn a_group_goes_to_the_other_site_and_home_again_by_one_command_each() -> Result<()> {
    let vms = ["web", "db"];
    let specs = [small("web").disk(DiskFormat::Raw, 48), small("db").disk(DiskFormat::Raw, 16)];
    let World { home, away, link, rig: _rig } = World::new("homeward", &specs, "")?;
    let boot = |vm: &&str| Ok(home.site.guest(vm)?.last().context("it ticks")?.boot);
    let boots = vms.iter().map(boot).collect::<Result<Vec<_>>>()?;
    eventually(SOON, "the group to be made", || {
        let made =
            away.controller.cli(&["group", "create", "shop", "--vm", "web", "--vm", "db", "--rpo", "2s"])?;
        Ok(made.status.success().then_some(()))
    })?;
    away.controller.wait_more_group_points("shop", 2, SOON)?;
    for trip in 0..trips() {
        away.expect(&vms)?;
        away.controller.json(&["failover", "shop", "--planned", "--yes"])?;
        away.has(&vms, &boots, &home)?;
        if trip == 0 {
            let early = away.tries("failback", "shop", &home, &["--yes"])?;
            ensure!(!early.status.success() && early.stderr.contains("lifeboat reprotect shop"), "{early:?}");
            let part = away.tries("reprotect", "web", &home, &["--yes"])?;
            ensure!(!part.status.success() && part.stderr.contains("in group `shop`"), "{part:?}");
            let unasked = away.tries("reprotect", "shop", &home, &[])?;
            ensure!(!unasked.status.success() && unasked.stderr.contains("--yes"), "{unasked:?}");
            let plan = away.tries("reprotect", "shop", &home, &["--dry-run"])?.success()?;
            ensure!(plan.contains("db runs here") && plan.contains("Group shop there: created"), "{plan}");
            ensure!(
                home.controller.status()?["vms"].as_array().is_some_and(Vec::is_empty),
                "nothing was changed"
            );
        }
        reprotect(&away, &home, "shop", &link, trip)?;
        let again = away.does("reprotect", "shop", &home)?;
        ensure!(again["group"] == "kept as it is" && again["members"][1]["agent"] == "B", "{again}");
        let plan = away.tries("failback", "shop", &home, &["--dry-run"])?.success()?;
        ensure!(plan.contains("shop goes home"), "{plan}");
        // It may stand for a cut when it is looked at.
        eventually(SOON, "it to run on", || Ok(away.runs("web")?.then_some(())))?;
        home.expect(&vms)?;
        let went = away.does("failback", "shop", &home)?;
        ensure!(went["already_home"] == false && went["failover"]["rpo_ms"] == 0, "{went}");
        home.has(&vms, &boots, &away)?;
        let again = away.does("failback", "shop", &home)?;
        ensure!(again["already_home"] == true, "{again}");
        reprotect(&home, &away, "shop", &link, trip)?;
        eventually(SOON, "home's agent to have it again", || {
            Ok(vms
                .iter()
                .all(|vm| home.agent.vm(vm).is_ok_and(|row| row["state"] == "protected"))
                .then_some(()))
        })?;
    }
    for end in [&home, &away] {
        end.controller.cli(&["verify"])?.success()?;
    }
    Ok(())
}

/// Goal: the way home is finished by the same command wherever the controller there died, and the VM never runs twice.
/// Method: it is killed at each step, in turn.
#[test]
fn the_way_home_is_finished_by_the_same_command_wherever_the_other_controller_died() -> Result<()> {
    let settings = "[[vm]]\nname = \"web\"\ninterval = \"500ms\"\nmemory = \"off\"";
    let spec = small("web").disk(DiskFormat::Raw, 16).idle();
    let World { mut home, away, link: _link, rig: _rig } = World::new("homeward-killed", &[spec], settings)?;
    // This time by a path.
    home.to = vec!["--to".into(), home.controller.socket().to_string_lossy().into_owned()];
    away.controller.wait_points("web", 1, SOON)?;
    away.controller.json(&["failover", "web", "--planned", "--yes"])?;
    let dies_at = |home: &mut End, place: &str, what: &str| -> Result<()> {
        home.controller.stop()?;
        home.controller.env = killed_at(place);
        home.controller.start()?;
        let ended = away.tries(what, "web", home, &["--yes"])?;
        ensure!(!ended.status.success(), "{place}: {ended:?}");
        home.controller.process()?.wait(SOON).with_context(|| format!("it should die at {place}"))?;
        ensure!(!(home.runs("web")? && away.runs("web")?), "{place}: it runs twice");
        home.controller.start()
    };
    for place in ["accept.seeded", "accept.named", "accept.raised", "accept.closed"] {
        dies_at(&mut home, place, "reprotect")?;
    }
    let done = away.does("reprotect", "web", &home)?;
    home.first_point(&done["members"][0])?;
    for place in ["planned.begun", "planned.named", "planned.restored"] {
        dies_at(&mut home, place, "failback")?;
        eventually(SOON, "it to go on where it was", || Ok(away.runs("web")?.then_some(())))?;
    }
    dies_at(&mut home, "planned.committed", "failback")?;
    let went = away.does("failback", "web", &home)?;
    ensure!(went["name"] == "web", "{went}");
    home.site.guest("web")?.wait_for_tick(2, BOOT)?;
    eventually(SOON, "it to be off where it was", || {
        Ok((away.site.guest("web")?.state()? == "shut off").then_some(()))
    })?;
    let done = home.does("reprotect", "web", &away)?;
    away.first_point(&done["members"][0])?;
    Ok(())
}
