//! What goes on for long costs no more at its end than near its beginning, by what the daemons hold of the machine. A
//! short look in each run of the tests; `LIFEBOAT_LONG_RUN=1800` makes it half an hour, as `make soak` does.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Proc, Rig, eventually,
    product::{Agent, Controller, replica_unharmed, small},
};
use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    time::{Duration, Instant},
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const WEB: &str = "[defaults]\ninterval = \"1s\"\nmax_pause = \"5s\"\n[[vm]]\nname = \"web\"";
/// What a daemon may hold more at the end: heaps are not given back at once.
const SLACK_KIB: u64 = 32 << 10;

/// What a daemon holds: KiB of memory, descriptors, threads.
#[derive(Clone, Copy, Debug)]
struct Held {
    memory_kib: u64,
    descriptors: usize,
    threads: usize,
}

impl Held {
    fn by(process: &mut Proc) -> Result<Self> {
        let (memory_kib, _) = process.memory_kib()?;
        let pid = process.pid_in_host()?;
        let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map(Iterator::count);
        Ok(Self { memory_kib, descriptors: count("fd")?, threads: count("task")? })
    }

    fn outgrew(&self, earlier: &Self) -> bool {
        self.memory_kib > earlier.memory_kib + SLACK_KIB
            || self.descriptors > earlier.descriptors + 8
            || self.threads > earlier.threads + 8
    }
}

/// Goal: nothing piles up: memory, descriptors, threads, points that no rule wants. Method: a point each second of
/// a guest that works, under a rule that takes points away all the time; looked at after a fifth of the time and at the end.
#[test]
fn long_protection_piles_nothing_up_and_ends_in_a_failover_unharmed() -> Result<()> {
    let seconds = std::env::var("LIFEBOAT_LONG_RUN").ok().and_then(|text| text.parse().ok()).unwrap_or(90);
    let long = Duration::from_secs(seconds);
    let rig = Rig::new("long-run")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::install(&b)?;
    // A fifth of them is kept.
    let keep = format!("keep = [\"all for {}s\"]\n", (seconds / 5).max(8));
    let site = b.dir("lb")?.join("site.toml");
    fs::OpenOptions::new().append(true).open(&site)?.write_all(keep.as_bytes())?;
    controller.start()?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.start()?;
    controller.wait_points("web", 2, SOON)?;

    let began = Instant::now();
    let mut early = None;
    while began.elapsed() < long {
        // One point more each time, however slow the machine is.
        let newest = |points: &[Value]| points.last().map(|point| point["seq"].as_u64());
        let before = newest(&controller.points("web")?);
        let points = eventually(SOON, "a newer point", || {
            let points = controller.points("web").unwrap_or_default();
            Ok((newest(&points) != before).then_some(points))
        })?;
        if early.is_none() && began.elapsed() >= long / 5 {
            early = Some((Held::by(agent.process()?)?, Held::by(controller.process()?)?, points.len()));
        }
    }
    let (agent_early, controller_early, points_early) = early.context("no early look")?;
    let (agent_late, controller_late) = (Held::by(agent.process()?)?, Held::by(controller.process()?)?);
    let points = controller.points("web")?.len();
    eprintln!("agent: {agent_early:?}, then {agent_late:?}");
    eprintln!("controller: {controller_early:?}, then {controller_late:?}");
    eprintln!("points kept: {points_early}, then {points}; {} cut", agent.acknowledged()?.len());
    ensure!(!agent_late.outgrew(&agent_early), "the agent grew");
    ensure!(!controller_late.outgrew(&controller_early), "the controller grew");
    ensure!(agent.acknowledged()?.len() > points, "nothing was taken away");
    assert_eq!(controller.json(&["verify"])?["findings"], json!([]));
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}
