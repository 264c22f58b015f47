//! Failovers for trial on the rig: nothing of the VMs is changed by one, nothing of it is left, and what it shows is true.
//! Where networks of the source lead at the site.

use anyhow::{Context, Result, ensure};
use rig::{
    Console, DiskFormat, Rig, Site, eventually,
    product::{Agent, Controller, killed_at, small},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

/// A network card and a screen, which the guest has no drivers for, and QEMU no less to restore.
fn devices(source: &str) -> String {
    format!(
        "<devices><interface {source}<mac address='52:54:00:12:34:56'/><model type='virtio'/></interface>\
         <video><model type='vga' vram='8192'/></video><graphics type='vnc' autoport='yes'/></devices>"
    )
}

/// What is there of any drill: domains, networks, files of replicas, journals of failovers.
fn left(site: &Site, controller: &Controller) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for list in [["list", "--all", "--name"], ["net-list", "--all", "--name"]] {
        let names = site.virsh(list)?;
        found.extend(names.lines().map(str::trim).filter(|name| name.contains("drill")).map(str::to_owned));
    }
    for folder in [controller.replica_dir(), controller.data_dir().join("failovers")] {
        for entry in fs::read_dir(folder)? {
            found.push(entry?.path().display().to_string());
        }
    }
    Ok(found)
}

fn apply(controller: &Controller, folder: &Path, text: &str) -> Result<()> {
    let file = folder.join("groups.toml");
    fs::write(&file, text)?;
    let file = file.display().to_string();
    eventually(SOON, "the group to be made", || {
        Ok(controller.cli(&["apply", "-f", &file])?.status.success().then_some(()))
    })
}

const SHOP: &str = "[[group]]
name = \"shop\"
vms = [\"db\", \"web\"]
rpo = \"1s\"
[group.runbook.vm.web]
after = [\"db\"]
wait_for = [\"console:tick=\"]
[group.runbook.vm.db]
wait_for = [\"console:tick=\", \"tcp:10.0.0.1:80\"]
";

/// Goal: a drill of a group shows its members where they stood, with memory and disks of one instant, while replication goes
/// on and the sources run; nothing of it is left, and its evidence is kept. Method: two guests at work, one of them with a
/// network card and a screen; the replicas are kept for a while, and ended; then one begins by itself.
#[test]
fn a_drill_shows_that_a_group_would_go_on_and_changes_nothing() -> Result<()> {
    let rig = Rig::new("drill")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = |vm: &str| small(vm).disk(DiskFormat::Raw, 16);
    let guests = [
        a.define_and_start(&spec("db").more(&devices("type='ethernet'>")))?,
        a.define_and_start(&spec("web"))?,
    ];
    let boots = [guests[0].wait_for_tick(3, BOOT)?.boot, guests[1].wait_for_tick(3, BOOT)?.boot];
    let mut agent = Agent::install(&a, &controller, "[defaults]\nmax_pause = \"5s\"")?;
    agent.start()?;
    let checks = "[group.drill]\nchecks = [[\"sh\", \"-c\", \"test -n \\\"$LIFEBOAT_REPLICAS\\\"\"]]\n";
    apply(&controller, a.folder(), &format!("{SHOP}{checks}"))?;
    controller.wait_more_group_points("shop", 2, SOON)?;

    let kept = controller.json(&["drill", "shop", "--keep"])?;
    ensure!(kept["passed"] == true && kept["state"] == "kept", "{kept:#}");
    ensure!(kept["rto_ms"].as_u64().is_some() && kept["checks"][0]["failed"] == Value::Null, "{kept:#}");
    ensure!(
        kept["notes"].to_string().contains("not tried"),
        "the address of the VM itself proves nothing: {kept:#}"
    );
    let ticks = guests.each_ref().map(|guest| guest.last().map_or(0, |report| report.tick));
    for (member, boot) in kept["members"].as_array().context("members")?.iter().zip(&boots) {
        ensure!(member["resumes"] == true, "{member}");
        let console = console_of(&kept, member)?;
        let first = console.wait(SOON, "the replica to report", |_| true)?;
        ensure!(first.boot == *boot, "it booted: {first:?}");
        console.wait(SOON, "all of it to be checked", |report| {
            report.mem_sweeps > first.mem_sweeps
                && report.disk_sweeps > first.disk_sweeps
                && report.unharmed()
        })?;
    }
    // The replicas run, and so do the sources, and points come.
    controller.wait_more_group_points("shop", 2, SOON)?;
    for ((guest, boot), tick) in guests.iter().zip(&boots).zip(ticks) {
        let later = guest.wait(SOON, "the source to go on", |report| report.tick > tick)?;
        ensure!(later.boot == *boot && later.unharmed(), "{later:?}");
    }
    let busy: Vec<String> = left(&b, &controller)?;
    ensure!(busy.iter().filter(|name| name.contains("-drill-")).count() >= 2, "{busy:?}");

    let ended = controller.json(&["drill", "shop", "--end"])?;
    ensure!(ended[0]["torn_down"] == true && ended[0]["state"] == "done", "{ended:#}");
    ensure!(left(&b, &controller)?.is_empty(), "{:?}", left(&b, &controller)?);
    let folder = controller.data_dir().join("drills").join(text(&kept["id"]));
    for (member, boot) in ended[0]["members"].as_array().context("members")?.iter().zip(&boots) {
        let said = fs::read_to_string(folder.join(text(&member["console"])))?;
        ensure!(said.contains(&format!("boot={boot}")) && !said.contains("hello"), "{said}");
    }
    let screen = fs::metadata(folder.join(text(&ended[0]["members"][0]["screen"])))?;
    ensure!(screen.len() > 100, "the picture has {} bytes", screen.len());
    let shown = controller.json(&["group", "show", "shop"])?;
    ensure!(shown["last_drill"]["id"] == kept["id"] && shown["last_drill"]["passed"] == true, "{shown:#}");
    reported(&controller, &b, &text(&kept["id"]))?;

    apply(&controller, a.folder(), &format!("{SHOP}[group.drill]\nevery = \"10s\"\n"))?;
    eventually(SOON, "a drill that began by itself", || {
        let all = controller.json(&["drills", "shop"])?;
        let all = all.as_array().context("drills")?;
        Ok(all.iter().any(|drill| drill["scheduled"] == true && drill["passed"] == true).then_some(()))
    })
}

/// The auditor's report of the group, as it is printed and as it is written, has what was seen.
fn reported(controller: &Controller, site: &Site, drill: &str) -> Result<()> {
    let out = site.folder().join("audit");
    let asked = ["report", "shop", "--since", "1h", "--out", &out.display().to_string()];
    let report = controller.json(&asked)?;
    let subjects = report["subjects"].as_array().context("subjects")?;
    ensure!(subjects.len() == 3 && subjects[0]["is_group"] == true, "{report:#}");
    for subject in subjects {
        let number = |path: &str| subject.pointer(path).and_then(Value::as_f64).context(path.to_owned());
        ensure!(number("/target_ms")? == 1000.0 && number("/points/memory")? >= 4.0, "{subject:#}");
        ensure!(number("/rpo/known_ms")? > 0.0 && number("/rpo/p50_ms")? > 0.0, "{subject:#}");
        ensure!(number("/rpo/p50_ms")? <= number("/rpo/longest_ms")?, "{subject:#}");
        ensure!((0.0..=100.0).contains(&number("/rpo/within_percent")?), "{subject:#}");
        ensure!(subject["drills"][0]["id"] == drill && subject["failovers"] == json!([]), "{subject:#}");
    }
    let last_drill = |finding: &Value| finding["code"] == "drill" && finding["weight"] == "note";
    let findings = subjects[0]["readiness"]["findings"].as_array().context("findings")?;
    ensure!(findings.iter().any(last_drill), "{findings:#?}");
    let written: Value = serde_json::from_str(&fs::read_to_string(out.join("lifeboat-report.json"))?)?;
    ensure!(written == report);
    let page = fs::read_to_string(out.join("lifeboat-report.html"))?;
    ensure!(page.contains(drill) && page.ends_with("</html>\n") && !page.contains("<script"), "{page}");
    Ok(())
}

/// Goal: a drill whose controller dies leaves nothing, wherever that was, and the next one passes. Method: it is killed at
/// each step, in turn.
#[test]
fn nothing_is_left_of_a_drill_wherever_its_controller_died() -> Result<()> {
    let rig = Rig::new("drill-killed")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let guest =
        a.define_and_start(&small("web").disk(DiskFormat::Raw, 16).more(&devices("type='ethernet'>")))?;
    guest.wait_for_tick(3, BOOT)?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 2, SOON)?;
    for step in ["drill.begun", "drill.network", "drill.disk", "drill.started", "drill.ended"] {
        controller.stop()?;
        controller.env = killed_at(step);
        controller.start()?;
        let ended = controller.cli(&["drill", "web"])?;
        ensure!(!ended.status.success(), "{step}: {ended:?}");
        controller.kill9()?;
        controller.start()?;
        eventually(SOON, &format!("what was left at {step} to be gone"), || {
            let drills = controller.json(&["drills", "web"])?;
            let drill = drills.as_array().and_then(|all| all.last().cloned()).context("a drill")?;
            Ok((drill["torn_down"] == true && left(&b, &controller)?.is_empty()).then_some(()))
        })?;
    }
    let drill = controller.json(&["drill", "web"])?;
    ensure!(drill["passed"] == true && drill["torn_down"] == true, "{drill:#}");
    ensure!(left(&b, &controller)?.is_empty(), "{:?}", left(&b, &controller)?);
    let interrupted = controller.json(&["drills", "web"])?;
    ensure!(interrupted.to_string().contains("the controller ended while it was at"), "{interrupted:#}");
    Ok(())
}

/// Goal: a replica's card is on the network that the runbook says, with the MAC address that it had; in a drill on the
/// network for drills. A drill is its group's, whatever that is called since, and does not pass if a check fails. Method:
/// networks of two names at the two sites, and libvirt's word; the group gets another name while its drill is kept.
#[test]
fn a_replica_s_card_is_on_the_network_that_the_runbook_says() -> Result<()> {
    let rig = Rig::new("networks")?;
    let (a, b, _link) = rig.pair()?;
    for (site, name) in [(&a, "lan-a"), (&b, "lan-b"), (&b, "lan-try")] {
        network(site, name)?;
    }
    let controller = Controller::running(&b)?;
    let spec =
        small("web").disk(DiskFormat::Raw, 16).more(&devices("type='network'><source network='lan-a'/>"));
    let guest = a.define_and_start(&spec)?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::install(&a, &controller, "[defaults]\nmax_pause = \"5s\"")?;
    agent.start()?;
    let group = "[[group]]\nname = \"shop\"\nvms = [\"web\"]\nrpo = \"1s\"\n[group.runbook]\ndrill_network = \"lan-try\"\n\
                 [group.runbook.networks]\nlan-a = \"network:lan-b\"\n";
    apply(&controller, a.folder(), group)?;
    controller.wait_more_group_points("shop", 2, SOON)?;

    let kept = controller.json(&["drill", "shop", "--keep"])?;
    ensure!(kept["passed"] == true, "{kept:#}");
    on_network(&b, &text(&kept["members"][0]["as_name"]), "lan-try")?;
    controller.json(&["group", "rename", "shop", "store"])?;
    let listed = controller.json(&["drills", "store"])?;
    ensure!(listed[0]["id"] == kept["id"] && listed[0]["state"] == "kept", "{listed:#}");
    controller.json(&["drill", "store", "--end"])?;
    ensure!(left(&b, &controller)?.is_empty(), "{:?}", left(&b, &controller)?);

    let checks = "[group.drill]\nchecks = [[\"sh\", \"-c\", \"echo nobody answers; exit 3\"]]\n";
    apply(&controller, a.folder(), &format!("{}{checks}", group.replace("\"shop\"", "\"store\"")))?;
    let failed = controller.cli(&["drill", "store", "--json"])?;
    ensure!(!failed.status.success(), "{failed:?}");
    let failed: Value = serde_json::from_str(&failed.stdout)?;
    ensure!(failed["passed"] == false && failed["torn_down"] == true, "{failed:#}");
    ensure!(text(&failed["checks"][0]["failed"]).contains("nobody answers"), "{failed:#}");
    ensure!(controller.cli(&["check", "store"])?.stdout.contains("nobody answers"));

    a.power_cut();
    controller.json(&["failover", "store", "--emergency", "--yes"])?;
    on_network(&b, "web", "lan-b")
}

fn on_network(site: &Site, domain: &str, network: &str) -> Result<()> {
    let xml = site.virsh(["dumpxml", domain])?;
    ensure!(xml.contains(&format!("network='{network}'")), "{xml}");
    ensure!(xml.contains("52:54:00:12:34:56") && !xml.contains("lan-a"), "{xml}");
    Ok(())
}

/// Over a bridge that is there already: for one of its own libvirt wants a firewall.
fn network(site: &Site, name: &str) -> Result<()> {
    let file = site.folder().join(format!("{name}.xml"));
    let bridge = name.replace("lan-", "br");
    site.run(["ip", "link", "add", &bridge, "type", "bridge"])?;
    site.run(["ip", "link", "set", &bridge, "up"])?;
    fs::write(
        &file,
        format!("<network><name>{name}</name><forward mode='bridge'/><bridge name='{bridge}'/></network>"),
    )?;
    site.virsh(["net-create", &file.display().to_string()]).map(drop)
}

fn console_of(drill: &Value, member: &Value) -> Result<Console> {
    let dir = PathBuf::from(text(&drill["dir"])).join(text(&member["vm"]));
    ensure!(dir.is_dir(), "{} is no folder", dir.display());
    Ok(Console::at(dir.join("console.log")))
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}
