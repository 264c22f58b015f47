//! What a replica is given after its resume, and what becomes of one that does not go on.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Rig, Site, eventually,
    product::{Agent, Controller, replica_unharmed, small},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);

const GROUP: &str = "[[group]]
name = \"shop\"
vms = [\"web\"]
rpo = \"1s\"
[group.runbook.vm.web]
guest_hook = [\"/usr/local/sbin/resumed\"]
";

/// Goal: a guest that goes on is told all that can be told without an agent in it, and what was not done is said.
/// Method: a guest with a generation id and no agent, in a group whose runbook has a hook for it; libvirt's word for the id
/// at both sites.
#[test]
fn a_resumed_replica_has_a_new_generation_id_and_what_could_not_be_done_is_told() -> Result<()> {
    let rig = Rig::new("after-resume")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 16).more("<genid/>"))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let _agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    let groups = a.folder().join("groups.toml");
    fs::write(&groups, GROUP)?;
    let groups = groups.display().to_string();
    eventually(SOON, "the group to be made", || {
        Ok(controller.cli(&["apply", "-f", &groups])?.status.success().then_some(()))
    })?;
    controller.wait_more_group_points("shop", 2, SOON)?;
    let before = genid(&a)?;
    a.power_cut();
    let of_group = controller.json(&["failover", "shop", "--emergency", "--yes"])?;
    let report = of_group["members"][0].clone();
    assert_eq!((&report["resumed"], &report["cold_boot"]), (&true.into(), &Value::Null), "{report}");
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    assert_ne!(genid(&b)?, before);
    let step = |what: &str| {
        let steps = report["after_resume"].as_array().into_iter().flatten();
        steps
            .clone()
            .find(|step| step["what"] == what)
            .cloned()
            .with_context(|| format!("{what} in {report}"))
    };
    assert_eq!(step("VM generation id changed")?["done"], true, "{report}");
    for (what, why) in [
        ("clock stepped", "no channel"),
        ("network announced", "no network interface"),
        ("guest hook", "no channel"),
    ] {
        let step = step(what)?;
        assert!(
            step["done"] == false && step["why"].as_str().is_some_and(|said| said.contains(why)),
            "{step}"
        );
    }
    let again = controller.failover("web", "latest")?;
    assert_eq!(again["after_resume"], report["after_resume"], "it is remembered");
    Ok(())
}

/// Goal: what needs an agent in the guest is really done in it. Method: Debian's agent; the guest's clock is years behind
/// when the point is cut, and the hook says on the console that it ran.
#[test]
fn a_resumed_replica_with_an_agent_has_the_right_time_and_its_hook_has_run() -> Result<()> {
    let rig = Rig::new("agent-inside")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::install(&b)?;
    controller.configure("guest_hook = [\"/bin/sh\", \"-c\", \"echo went-on >/dev/ttyS0\"]\n")?;
    controller.start()?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 16).agent())?;
    guest.wait_for_agent(BOOT)?;
    let long_ago = json!({ "execute": "guest-set-time", "arguments": { "time": LONG_AGO_MS * 1_000_000 } });
    guest.ask_agent(&long_ago)?;
    let began = now_ms()?;
    let boot = guest
        .wait(SOON, "its clock to be wrong", |report| report.clock_ms < began / 2 + LONG_AGO_MS / 2)?
        .boot;
    let _agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 2, SOON)?;
    a.power_cut();
    let began = now_ms()?;
    let report = controller.failover("web", "latest")?;
    assert_eq!(report["resumed"], true, "{report}");
    for what in ["clock stepped", "guest hook"] {
        let steps = report["after_resume"].as_array().into_iter().flatten();
        let step =
            steps.clone().find(|step| step["what"] == what).with_context(|| format!("{what} in {report}"))?;
        assert_eq!(step["done"], true, "{step}");
    }
    let replica = b.guest("web")?;
    let right = replica.wait(SOON, "its clock to be right", |report| report.clock_ms >= began)?;
    assert!(right.clock_ms <= now_ms()?, "{right:?}");
    assert!(replica.console().has_said("went-on"), "the hook said nothing");
    replica_unharmed(&replica, &boot, 0, SOON)?;
    Ok(())
}

const LONG_AGO_MS: u64 = 1_000_000_000_000;

fn now_ms() -> Result<u64> {
    Ok(u64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?)
}

/// A guest that was at work and is lost with its site.
struct Lost {
    b: Site,
    controller: Controller,
    boot: String,
    /// Where its replicas will lie, an attempt each.
    folder: PathBuf,
    _agent: Agent,
    _rig: Rig,
}

impl Lost {
    fn new(name: &str) -> Result<Self> {
        let rig = Rig::new(name)?;
        let (a, b, _) = rig.pair()?;
        let controller = Controller::running(&b)?;
        let spec = small("web").disk(DiskFormat::Raw, 16);
        let boot = a.define_and_start(&spec)?.wait_for_tick(3, BOOT)?.boot;
        let agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
        controller.wait_points("web", 2, SOON)?;
        a.power_cut();
        let folder = controller.replica_dir().join(spec.uuid.to_string());
        Ok(Self { b, controller, boot, folder, _agent: agent, _rig: rig })
    }
}

/// Goal: a refusal that passes costs no memory: the replica is resumed at the second try, also by a controller that died
/// in between, and the report says what was refused. Method: a memory image that is spoiled once.
#[test]
fn a_resume_that_is_refused_for_a_passing_reason_is_tried_once_more() -> Result<()> {
    let Lost { _rig, _agent, b, mut controller, boot, folder } = Lost::new("tried-again")?;

    spoil(&mut controller, &folder)?;
    controller.stop()?;
    controller.env = vec![("LIFEBOAT_KILL_AT".into(), "failover.tried-once".into())];
    controller.start()?;
    let killed = controller.cli(&["failover", "web", "--emergency", "--yes"])?;
    ensure!(!killed.status.success(), "the controller was to be killed: {killed:?}");
    controller.kill9()?;
    controller.env = Vec::new();
    controller.start()?;
    let report = controller.failover("web", "latest")?;
    assert_eq!((&report["resumed"], &report["cold_boot"]), (&true.into(), &Value::Null), "{report}");
    let refused = report["refused"].as_array().context("what was refused")?;
    assert!(refused.len() == 1 && refused[0].as_str().is_some_and(|why| why.contains("refused")), "{report}");
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}

/// Goal: a replica whose state QEMU refuses twice is booted from the same point's disks, on disks of its own, and says so;
/// with `--no-cold-boot` it is left at that. Method: the controller is killed with the memory image complete; a device in it
/// gets a name that no QEMU knows; so in each attempt.
#[test]
fn a_replica_whose_state_is_refused_boots_from_the_disks_of_the_point_and_says_why() -> Result<()> {
    let Lost { _rig, _agent, b, mut controller, boot, folder } = Lost::new("cold-boot")?;

    spoil(&mut controller, &folder)?;
    spoil(&mut controller, &folder)?;
    let left = controller.cli(&["failover", "web", "--emergency", "--yes", "--no-cold-boot"])?;
    assert!(!left.status.success() && left.stderr.contains("refused 2 times"), "{left:?}");
    assert!(b.virsh(["list", "--name"])?.trim().is_empty(), "nothing runs");

    spoil(&mut controller, &folder)?;
    spoil(&mut controller, &folder)?;
    let report = controller.failover("web", "latest")?;
    assert_eq!((&report["resumed"], &report["already_done"]), (&false.into(), &false.into()), "{report}");
    assert!(report["cold_boot"].as_str().is_some_and(|why| why.contains("refused 2 times")), "{report}");
    assert_eq!(report["refused"].as_array().map(Vec::len), Some(2), "{report}");
    assert_eq!(report["after_resume"].as_array().map(Vec::len), Some(0), "{report}");
    let replica = b.guest("web")?;
    let after =
        replica.wait(BOOT, "the replica to boot", |report| report.boot != boot && report.tick >= 3)?;
    assert!(after.unharmed(), "{after:?}");
    let disks = eventually(SOON, "its disk", || Ok(b.virsh(["domblklist", "web"]).ok()))?;
    let newest = attempts(&folder)?.pop().context("attempts")?;
    assert!(disks.contains(&newest.join("vda.raw").display().to_string()), "{disks}");
    Ok(())
}

/// A guest that can be told what to do, and its boot.
fn with_agent(site: &Site) -> Result<(Guest, String)> {
    let guest = site.define_and_start(&small("web").disk(DiskFormat::Raw, 16).agent())?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    guest.wait_for_agent(BOOT)?;
    Ok((guest, boot))
}

/// The failover to `point` ends with a replica that booted, unharmed, and says why.
fn boots_instead(controller: &Controller, site: &Site, point: &str, why: &str, boot: &str) -> Result<()> {
    let report = controller.failover("web", point)?;
    assert_eq!((&report["resumed"], &report["refused"]), (&false.into(), &json!([])), "{report}");
    assert!(report["cold_boot"].as_str().is_some_and(|said| said.contains(why)), "{report}");
    let replica = site.guest("web")?;
    let after =
        replica.wait(BOOT, "the replica to boot", |report| report.boot != boot && report.tick >= 3)?;
    assert!(after.unharmed(), "{after:?}");
    Ok(())
}

/// Goal: a replica that runs and will never go on is booted, and the report says why. Method: a guest that was halted when its
/// point was cut: nothing in it goes on at the site either.
#[test]
fn a_replica_that_will_never_go_on_boots_from_the_disks_of_the_point() -> Result<()> {
    let rig = Rig::new("no-progress")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let (guest, boot) = with_agent(&a)?;
    guest.run_inside("/bin/busybox halt -f")?;
    eventually(SOON, "the guest to be halted", || Ok(guest.qmp(REGISTERS)?.contains("HLT=1").then_some(())))?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 2, SOON)?;
    guest.wait_for_state("running", SOON)?;
    a.power_cut();
    boots_instead(&controller, &b, "latest", "halted for good", &boot)
}

/// Goal: so is one whose kernel panics when it goes on. Method: one that panics when it sees that it stood for seconds, by the
/// clock that goes on without it.
#[test]
fn a_replica_whose_kernel_panics_as_it_goes_on_boots_from_the_disks_of_the_point() -> Result<()> {
    let rig = Rig::new("panics")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let (guest, boot) = with_agent(&a)?;
    guest.run_inside(PANICS)?;
    eventually(SOON, "its watch to begin", || Ok(guest.console().has_said("watch=begun").then_some(())))?;
    let _agent = Agent::protecting(&a, &controller, &["web"], "500ms")?;
    controller.wait_points("web", 12, SOON)?;
    a.power_cut();
    let points = controller.points("web")?;
    let older = points[1]["point"].as_str().with_context(|| format!("{points:?}"))?;
    boots_instead(&controller, &b, older, "panicked", &boot)
}

/// A group of the guest, which counts as up when it says what it says soon after a boot only.
fn late(seconds: u32) -> String {
    format!(
        "[[group]]\nname = \"shop\"\nvms = [\"web\"]\nrpo = \"1s\"\n[group.runbook.vm.web]\n\
         wait_for = [\"console:tick=3 boot\"]\nwait_at_most = \"{seconds}s\"\nboot_if_not_up = true\n"
    )
}

/// The guest's points become the group's, and its source is lost.
fn lost_in_group(a: &Site, b: &Site, controller: &Controller, seconds: u32) -> Result<()> {
    let _agent = Agent::protecting(a, controller, &["web"], "500ms")?;
    controller.wait_points("web", 1, SOON)?;
    let file = b.folder().join("groups.toml");
    fs::write(&file, late(seconds))?;
    controller.cli(&["apply", "-f", &file.display().to_string()])?.success()?;
    controller.wait_more_group_points("shop", 2, SOON)?;
    a.power_cut();
    Ok(())
}

/// Goal: so is one that goes on and is not up in the time that its runbook gives it, where that says so, though the controller
/// dies as it has seen that; what it wrote meanwhile stays. Method: it counts as up when it says what it says soon after a
/// boot only; `--dry-run` tells beforehand.
#[test]
fn a_replica_that_is_not_up_in_its_time_boots_from_the_disks_of_the_point_if_its_runbook_says_so()
-> Result<()> {
    let rig = Rig::new("not-up")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let spec = small("web").disk(DiskFormat::Raw, 16);
    let guest = a.define_and_start(&spec)?;
    let boot = guest.wait_for_tick(6, BOOT)?.boot;
    lost_in_group(&a, &b, &controller, 15)?;
    let told = controller.cli(&["failover", "shop", "--emergency", "--dry-run"])?.success()?;
    ensure!(told.contains("if that does not come, boot it from its disks"), "{told}");

    controller.stop()?;
    controller.env = vec![("LIFEBOAT_KILL_AT".into(), "failover.not-up".into())];
    controller.start()?;
    let killed = controller.cli(&["failover", "shop", "--emergency", "--yes"])?;
    ensure!(!killed.status.success(), "the controller was to be killed: {killed:?}");
    let replica = b.guest("web")?;
    let ran = replica.last().context("it went on")?;
    ensure!(ran.boot == boot, "{ran:?}");
    controller.kill9()?;
    controller.env = Vec::new();
    controller.start()?;
    let report = controller.json(&["failover", "shop", "--emergency", "--yes"])?;
    let web = &report["members"][0];
    ensure!(web["resumed"] == false, "{report:#}");
    let why = web["cold_boot"].as_str().context("why it was booted")?;
    ensure!(why.contains("was not up: console:tick=3 boot did not come within 15 s"), "{report:#}");
    let after = replica.wait(BOOT, "the replica to boot", |said| said.boot != boot && said.tick >= 3)?;
    ensure!(after.unharmed(), "{after:?}");
    let attempts = attempts(&controller.replica_dir().join(spec.uuid.to_string()))?;
    ensure!(attempts.len() == 2, "{attempts:?}");
    let again = controller.cli(&["failover", "shop", "--emergency", "--yes"])?;
    ensure!(!again.status.success() && again.stderr.contains("already"), "{again:?}");
    Ok(())
}

/// Goal: one that stands because its operator wants it so is not booted, however late it is. Method: a guest that is
/// suspended when its points are cut.
#[test]
fn a_replica_that_stands_as_its_operator_wants_it_is_not_booted_for_being_late() -> Result<()> {
    let rig = Rig::new("stands-late")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Raw, 16))?;
    let boot = guest.wait_for_tick(6, BOOT)?.boot;
    guest.suspend()?;
    lost_in_group(&a, &b, &controller, 2)?;
    let report = controller.json(&["failover", "shop", "--emergency", "--yes"])?;
    let (web, late) = (&report["members"][0], report["warnings"].to_string());
    ensure!(web["resumed"] == true && web["cold_boot"].is_null(), "{report:#}");
    ensure!(late.contains("console:tick=3 boot did not come within 2 s"), "{report:#}");
    let replica = b.guest("web")?;
    ensure!(replica.state()? == "paused", "{}", replica.state()?);
    replica.resume()?;
    replica_unharmed(&replica, &boot, 6, SOON).map(drop)
}

const PANICS: &str = "/bin/busybox mount -t sysfs sysfs /sys; \
    stood() { read now </sys/class/rtc/rtc0/since_epoch; read up rest </proc/uptime; stood=$((now - ${up%.*})); }; \
    stood; before=$stood; echo watch=begun >/dev/ttyS0; \
    while :; do stood; [ $((stood - before)) -gt 2 ] && echo c >/proc/sysrq-trigger; before=$stood; \
    /bin/busybox usleep 20000; done";

const REGISTERS: &str =
    r#"{"execute":"human-monitor-command","arguments":{"command-line":"info registers -a"}}"#;

/// Begins the failover, or goes on with it, up to a complete memory image, and spoils that.
fn spoil(controller: &mut Controller, folder: &Path) -> Result<()> {
    controller.stop()?;
    controller.env = vec![("LIFEBOAT_KILL_AT".into(), "failover.restored".into())];
    controller.start()?;
    let killed = controller.cli(&["failover", "web", "--emergency", "--yes"])?;
    ensure!(!killed.status.success(), "the controller was to be killed: {killed:?}");
    controller.kill9()?;
    controller.env = Vec::new();
    let image = attempts(folder)?.pop().context("an attempt")?.join("memory.save");
    let mut bytes = fs::read(&image)?;
    let name = b"\x05i8254";
    let at = bytes.windows(name.len()).rposition(|window| window == name).context("the timer's state")?;
    bytes[at + 1] = b'x';
    fs::write(&image, bytes)?;
    controller.start()
}

/// Folders of the attempts, in order.
fn attempts(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>();
    let mut entries = entries?;
    entries.sort();
    Ok(entries)
}

fn genid(site: &Site) -> Result<String> {
    let xml = site.virsh(["dumpxml", "web"])?;
    let (_, rest) = xml.split_once("<genid>").context("a generation id")?;
    Ok(rest.split('<').next().unwrap_or_default().to_owned())
}
