//! A group's runbook, carried out at a site: its scripts, its order, each kind of wait, its networks, its hook; and told
//! beforehand.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Guest, Rig, Site, eventually,
    product::{Agent, Controller, replica_unharmed, small},
};
use serde_json::Value;
use std::{
    fs,
    fs::File,
    io::Read,
    os::fd::FromRawFd,
    path::{Path, PathBuf},
    time::Duration,
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const MAC: &str = "52:54:00:12:34:56";

/// What is written in the group's file. `before` is its first script; `log` is where the others say when they ran.
fn runbook(before: &str, log: &Path) -> String {
    let say = |word: &str| {
        let count = "$(virsh -c qemu:///system list --name | wc -w)";
        let line = format!("echo {word} $LIFEBOAT_GROUP $LIFEBOAT_KIND {count} >>{}", log.display());
        format!("[\"sh\", \"-c\", \"{line}\"]")
    };
    format!(
        "[[group]]\nname = \"shop\"\nvms = [\"web\", \"db\"]\nrpo = \"1s\"\n[group.runbook]\nbefore = [{before}{}]\n\
         after = [{}]\n[group.runbook.networks]\nlan-a = \"network:lan-b\"\n{VMS}",
        say("before"),
        say("after")
    )
}

const VMS: &str = "[group.runbook.vm.db]
wait_for = [\"agent\", \"tcp:8080\", \"tcp:10.1.0.5:8080\", \"delay:1s\"]
wait_at_most = \"30s\"
guest_hook = [\"/bin/sh\", \"-c\", \"echo hook-ran >/dev/ttyS0\"]
[group.runbook.vm.web]
after = [\"db\"]
wait_for = [\"console:tick=\", \"console:said-before\"]
wait_at_most = \"10s\"
";

/// Over a bridge that is there already: for one of its own libvirt wants a firewall.
fn network(site: &Site, name: &str) -> Result<()> {
    let (file, bridge) = (site.folder().join(format!("{name}.xml")), name.replace("lan-", "br"));
    site.run(["ip", "link", "add", &bridge, "type", "bridge"])?;
    site.run(["ip", "address", "add", "10.1.0.1/24", "dev", &bridge])?;
    site.run(["ip", "link", "set", &bridge, "up"])?;
    let xml =
        format!("<network><name>{name}</name><forward mode='bridge'/><bridge name='{bridge}'/></network>");
    fs::write(&file, xml)?;
    site.virsh(["net-create", &file.display().to_string()]).map(drop)
}

/// Hears the announcements (RARP) that come by on a site's networks.
struct Announcements(File);

impl Announcements {
    fn of(site: &Site) -> Result<Self> {
        let opened = site.in_network(|| {
            // SAFETY: no pointers; the descriptor is owned by whoever gets it.
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, i32::from(RARP.to_be())) }
        })?;
        ensure!(opened >= 0, "a socket for RARP: {}", std::io::Error::last_os_error());
        let limit = libc::timeval { tv_sec: 5, tv_usec: 0 };
        let size = libc::socklen_t::try_from(size_of::<libc::timeval>())?;
        // SAFETY: `limit` outlives the call, and `size` is its size.
        let set = unsafe {
            libc::setsockopt(opened, libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const limit).cast(), size)
        };
        // SAFETY: it was opened above, and nobody else has it.
        let heard = Self(unsafe { File::from_raw_fd(opened) });
        ensure!(set == 0, "a limit of time for RARP");
        Ok(heard)
    }

    /// Whether this card was announced.
    fn have(mut self, mac: &str) -> Result<()> {
        let mut frame = [0u8; 256];
        for _ in 0..1000 {
            let length = self.0.read(&mut frame).context("no announcement of the card was heard")?;
            let from = frame.get(6..12).filter(|_| length >= 12).unwrap_or_default();
            let from: Vec<String> = from.iter().map(|byte| format!("{byte:02x}")).collect();
            if from.join(":") == mac {
                return Ok(());
            }
        }
        anyhow::bail!("of a thousand announcements none was of {mac}")
    }
}

const RARP: u16 = 0x8035;

struct Scene {
    a: Site,
    b: Site,
    controller: Controller,
    guests: [Guest; 2],
    boots: [String; 2],
    /// What scripts said.
    log: PathBuf,
    _agent: Agent,
    _rig: Rig,
}

impl Scene {
    /// `db` has a card, an address and something that listens; `web` has a console.
    fn new() -> Result<Self> {
        let rig = Rig::new("runbook")?;
        let (a, b, _link) = rig.pair()?;
        network(&a, "lan-a")?;
        network(&b, "lan-b")?;
        let controller = Controller::running(&b)?;
        let card = "type='network'><source network='lan-a'/>";
        let db = a.define_and_start(&small("db").disk(DiskFormat::Raw, 16).agent().card(MAC, card))?;
        let web = a.define_and_start(&small("web").disk(DiskFormat::Raw, 16))?;
        let boots = [db.wait_for_tick(3, BOOT)?.boot, web.wait_for_tick(3, BOOT)?.boot];
        db.wait_for_agent(BOOT)?;
        db.run_inside(
            "ip link set eth0 up; ip addr add 10.1.0.5/24 dev eth0; /bin/busybox httpd -p 8080 -h /run; \
             echo inside=done >/dev/ttyS0",
        )?;
        eventually(SOON, "the guest to listen", || Ok(db.console().has_said("inside=done").then_some(())))?;
        let mut agent = Agent::install(&a, &controller, "[defaults]\nmax_pause = \"5s\"")?;
        agent.start()?;
        let log = b.dir("scripts")?.join("log");
        Ok(Self { a, b, controller, guests: [db, web], boots, log, _agent: agent, _rig: rig })
    }

    fn apply(&self, text: &str) -> Result<Value> {
        let file = self.b.dir("scripts")?.join("groups.toml");
        fs::write(&file, text)?;
        let file = file.display().to_string();
        eventually(SOON, "the group to be made", || Ok(self.controller.json(&["apply", "-f", &file]).ok()))
    }

    fn scripts_said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }
}

/// Goal: what a runbook says is done, in its order, and nothing that was said before counts for a wait; a script that fails
/// calls a planned failover off, and the sources go on; `--dry-run` tells all of it beforehand. Method: a member with an agent
/// and an address, which is waited for by all kinds of waits, and one whose console has said something when it ran here last;
/// scripts say how many replicas run; the site hears whether its networks are told where the card is now.
#[test]
fn a_runbook_is_carried_out_in_its_order_and_told_beforehand() -> Result<()> {
    let scene = Scene::new()?;
    scene.apply(&runbook("[\"sh\", \"-c\", \"echo the gate is shut; exit 7\"], ", &scene.log))?;
    scene.controller.wait_more_group_points("shop", 2, SOON)?;
    let off = scene.controller.cli(&["failover", "shop", "--planned", "--yes"])?;
    ensure!(!off.status.success() && off.stderr.contains("called off"), "{off:?}");
    ensure!(off.stderr.contains("the gate is shut"), "{off:?}");
    for (guest, boot) in scene.guests.iter().zip(&scene.boots) {
        let last = guest.last().context("it ticks")?;
        let on = guest.wait_for_tick(last.tick + 5, SOON)?;
        ensure!(on.boot == *boot && on.unharmed(), "{on:?}");
    }
    ensure!(scene.b.virsh(["list", "--all", "--name"])?.trim().is_empty(), "nothing of it is left here");

    fs::remove_file(&scene.log).context("the second script had run all the same")?;
    let changed = scene.apply(&runbook("", &scene.log))?;
    ensure!(
        changed[0]["what"] == "change" && changed[0]["lines"].to_string().contains("the gate"),
        "{changed}"
    );
    scene.controller.wait_more_group_points("shop", 2, SOON)?;
    told(&scene)?;

    // As if it had run here before.
    fs::write(scene.b.host_path("/var/log/libvirt/qemu/web-console.log")?, "said-before\n")?;
    let announced = Announcements::of(&scene.b)?;
    let report = scene.controller.json(&["failover", "shop", "--planned", "--yes"])?;
    let warnings = report["warnings"].as_array().context("warnings")?;
    let only = warnings.first().and_then(Value::as_str).unwrap_or_default();
    ensure!(warnings.len() == 1 && only.contains("web: console:said-before did not come"), "{report:#}");
    ensure!(
        scene.scripts_said() == "before shop planned 0\nafter shop planned 2\n",
        "{}",
        scene.scripts_said()
    );
    let of = |name: &str| {
        report["members"].as_array().into_iter().flatten().find(|of| of["name"] == name).cloned()
    };
    let (db, web) = (of("db").context("db")?, of("web").context("web")?);
    let ran = |member: &Value| member["running_at"].as_u64().context("when it ran");
    // Not how long it takes, but that it was waited for.
    ensure!(ran(&web)? >= ran(&db)? + 1000, "web did not wait for db: {report:#}");
    for what in ["network announced", "guest hook", "clock stepped"] {
        let done = |step: &Value| step["what"] == what && step["done"] == true;
        ensure!(db["after_resume"].as_array().into_iter().flatten().any(done), "{what}: {db:#}");
    }
    announced.have(MAC)?;
    let replicas = [scene.b.guest("db")?, scene.b.guest("web")?];
    ensure!(replicas[0].console().has_said("hook-ran"), "the hook said nothing");
    ensure!(scene.b.virsh(["dumpxml", "db"])?.contains("network='lan-b'"));
    for (replica, boot) in replicas.iter().zip(&scene.boots) {
        replica_unharmed(replica, boot, 0, SOON)?;
    }
    ensure!(scene.a.virsh(["list", "--name"])?.trim().is_empty(), "a source still runs");
    Ok(())
}

/// What a failover would do is told, and nothing is done.
fn told(scene: &Scene) -> Result<()> {
    for (kind, first) in
        [("--planned", "bring the sources of web, db to stand"), ("--emergency", "fence web, db")]
    {
        let said = scene.controller.cli(&["failover", "shop", kind, "--dry-run"])?.success()?;
        let order = [
            first,
            "restore disks and memory",
            "on `lan-a` there on network `lan-b` here",
            "echo before",
            "start db; run `/bin/sh -c echo hook-ran",
            "wait for agent, tcp:8080, tcp:10.1.0.5:8080, delay:1s, each for 30s at the most",
            "start web, once db is up; wait for console:tick=, console:said-before, each for 10s",
            "echo after",
        ];
        let places: Option<Vec<usize>> = order.iter().map(|words| said.find(words)).collect();
        ensure!(places.is_some_and(|places| places.is_sorted()), "{said}");
    }
    ensure!(scene.scripts_said().is_empty(), "a script was run: {}", scene.scripts_said());
    Ok(())
}
