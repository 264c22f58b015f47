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
/// From then on what points tell of the RPO must outlive them: it is recorded every ten minutes.
const TO_BE_RECORDED: Duration = Duration::from_secs(1500);
/// What a daemon may hold more at the end (KiB, descriptors, threads), however long it ran. Heaps are not given back at
/// once; and the runtime has as many threads for blocking work as ever worked at a time, with a heap each, which it
/// keeps while there is a point each second.
const SLACK: [u64; 3] = [64 << 10, 8, 24];

/// What a daemon holds: KiB of memory, descriptors, threads.
#[derive(Clone, Copy, Debug)]
struct Held([u64; 3]);

impl Held {
    fn by(process: &mut Proc) -> Result<Self> {
        let (memory_kib, _) = process.memory_kib()?;
        let pid = process.pid_in_host()?;
        let count = |what: &str| anyhow::Ok(fs::read_dir(format!("/proc/{pid}/{what}"))?.count() as u64);
        Ok(Self([memory_kib, count("fd")?, count("task")?]))
    }

    /// The least or the most of several looks, each by itself.
    fn over(looks: &[Self], of: fn(u64, u64) -> u64) -> Option<Self> {
        looks.iter().copied().reduce(|one, other| Self(std::array::from_fn(|at| of(one.0[at], other.0[at]))))
    }
}

/// Buffers and threads come and go: a daemon grew if it never came back to what it held at most early on.
fn grew(looks: &[Held]) -> Result<bool> {
    let [early, late] = [&looks[..looks.len() * 2 / 5], &looks[looks.len() * 4 / 5..]];
    let early = Held::over(early, u64::max).context("no early look")?;
    let late = Held::over(late, u64::min).context("no late look")?;
    eprintln!("{early:?} early on at most, {late:?} late at least (KiB, descriptors, threads)");
    Ok(early.0.iter().zip(SLACK).zip(late.0).any(|((early, slack), late)| late > early + slack))
}

/// Goal: nothing piles up: memory, descriptors, threads, points that no rule wants; and what these told of the RPO is
/// known when they are gone. Method: a point each second of a guest that works, under a rule that takes points away all
/// the time; looked at after each point.
#[test]
fn long_protection_piles_nothing_up_and_ends_in_a_failover_unharmed() -> Result<()> {
    let seconds = std::env::var("LIFEBOAT_LONG_RUN").ok().and_then(|text| text.parse().ok()).unwrap_or(90);
    let long = Duration::from_secs(seconds);
    let rig = Rig::new("long-run")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::install(&b)?;
    // Two fifths of them are kept.
    let keep = format!("keep = [\"all for {}s\"]\n", (seconds * 2 / 5).max(8));
    let site = b.dir("lb")?.join("site.toml");
    fs::OpenOptions::new().append(true).open(&site)?.write_all(keep.as_bytes())?;
    controller.start()?;
    let guest = a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32))?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.start()?;
    controller.wait_points("web", 2, SOON)?;

    let began = Instant::now();
    let (mut agent_held, mut controller_held) = (Vec::new(), Vec::new());
    while began.elapsed() < long {
        // One point more each time, however slow the machine is.
        let newest = |points: &[Value]| points.last().map(|point| point["seq"].as_u64());
        let before = newest(&controller.points("web")?);
        eventually(SOON, "a newer point", || {
            Ok((newest(&controller.points("web").unwrap_or_default()) != before).then_some(()))
        })?;
        agent_held.push(Held::by(agent.process()?)?);
        controller_held.push(Held::by(controller.process()?)?);
    }
    ensure!(!grew(&agent_held)?, "the agent grew: {agent_held:?}");
    ensure!(!grew(&controller_held)?, "the controller grew: {controller_held:?}");
    let points = controller.points("web")?.len();
    eprintln!("{points} points kept, {} cut", agent.acknowledged()?.len());
    ensure!(agent.acknowledged()?.len() > points, "nothing was taken away");
    if long >= TO_BE_RECORDED {
        let report = controller.json(&["report", "web", "--since", &format!("{seconds}s")])?;
        let rpo = &report["subjects"][0]["rpo"];
        eprintln!(
            "RPO known for {} ms of {seconds} s, within the target for {} %",
            rpo["known_ms"], rpo["within_percent"]
        );
        let known = Duration::from_millis(rpo["known_ms"].as_u64().context("known_ms")?);
        ensure!(known > long * 3 / 5, "what points told is gone with them: {rpo}");
    }
    assert_eq!(controller.json(&["verify"])?["findings"], json!([]));
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}
