//! No guest stays paused by us longer than `max_pause`, whatever becomes of the agent and of its watchdog: killed and
//! frozen at every step of a cut, on a real guest, with QEMU's own record of its stops and the guest's console as
//! witnesses. `LIFEBOAT_SOAK=N` goes through all steps N times.

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use rig::{
    DiskFormat, Guest, Rig,
    product::{Agent, Controller, killed_at, left_in_qemu, replica_unharmed, small},
    stillness::{Stillness, Verdict},
};
use std::{fs, time::Duration};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const MAX_PAUSE: Duration = Duration::from_secs(1);
const WEB: &str = "[defaults]\ninterval = \"200ms\"\n[[vm]]\nname = \"web\"";

/// Steps that an agent passes once with each point.
const EACH_POINT: [&str; 14] = [
    "begin",
    "head-read",
    "disks-prepared",
    "marked-pausing",
    "stopped",
    "memory-read",
    "device-saved",
    "disks-marked",
    "resumed",
    "views-open",
    "reading",
    "before-settle",
    "half-settled",
    "settled",
];
/// Steps that it passes once in its life.
const ONCE: [&str; 2] = ["head-open", "braked"];

/// Goal: the promise of the watchdog. Method: kill the agent at every step, freeze it at every step, then take the
/// watchdog away as well. All on one guest, which is then lost and must go on at the other site as it was.
#[test]
fn no_guest_stays_paused_longer_than_its_limit_however_the_agent_dies_or_hangs() -> Result<()> {
    let rounds = std::env::var("LIFEBOAT_SOAK").ok().and_then(|text| text.parse().ok()).unwrap_or(1_u64);
    let rig = Rig::new("watchdog")?;
    let (a, b, _link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let spec = small("web").disk(DiskFormat::Raw, 32).disk(DiskFormat::Qcow2, 32).tick_ms(20);
    let guest = a.define_and_start(&spec)?;
    let boot = guest.wait_for_tick(3, BOOT)?.boot;
    let quiet = {
        let witness = Stillness::watch(&guest)?;
        guest.wait_for_tick(guest.last().context("it ticks")?.tick + 100, SOON)?;
        witness.verdict()
    };
    eprintln!("without an agent: {quiet}");
    let witness = Stillness::watch(&guest)?;
    let mut agent = Agent::install(&a, &controller, WEB)?;

    let mut killed = 0;
    for round in 0..rounds {
        let each = EACH_POINT.map(|step| format!("cut.{step}:{}", 1 + round % 2));
        for place in ONCE.map(|step| format!("cut.{step}")).iter().chain(&each) {
            agent.env = killed_at(place);
            agent.start()?;
            agent.process()?.wait(SOON).with_context(|| format!("the agent should die at {place}"))?;
            ensure!(agent.process()?.killed_by(Signal::SIGKILL), "at {place} it ended by itself");
            goes_on(&guest).with_context(|| format!("after the agent died at {place}"))?;
            killed += 1;
        }
    }
    bounded("killed", killed, &witness, &quiet)?;

    let frozen = freeze(&mut agent, &guest, rounds)?;
    bounded("frozen", frozen, &witness, &quiet)?;
    drop(witness);

    without_its_watchdog(&mut agent, &controller, &guest)?;
    agent.start()?;
    controller.wait_more_points("web", 2, SOON)?;
    agent.stop()?;
    assert_eq!(left_in_qemu(&guest)?, Vec::<String>::new());
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &boot, 0, SOON)?;
    Ok(())
}

/// Freezes one agent at every step, `rounds` times, and thaws it each time only when the guest has gone on without it.
fn freeze(agent: &mut Agent, guest: &Guest, rounds: u64) -> Result<u64> {
    // Each step at a pass of its own, with a whole point in between: an engine whose pauses are too long again and again
    // would be put aside, and rightly so.
    let places = EACH_POINT.iter().zip(1..).flat_map(|(step, place)| {
        (0..rounds).map(move |round| format!("cut.{step}:{}", 2 * (place + round * EACH_POINT.len() as u64)))
    });
    let places: Vec<String> = places.collect();
    agent.env = vec![("LIFEBOAT_STOP_AT".into(), places.join(","))];
    agent.start()?;
    for frozen in 1..=places.len() {
        agent.wait_frozen(SOON)?;
        let log = agent.process()?.log();
        let at = log.lines().rfind(|line| line.starts_with("fault:")).unwrap_or("nowhere").to_owned();
        goes_on(guest).with_context(|| format!("while the agent hangs ({frozen}): {at}"))?;
        agent.process()?.thaw()?;
    }
    agent.kill9()?;
    Ok(places.len() as u64)
}

/// The watchdog itself is killed, and frozen; then it dies together with the agent in the middle of a pause, which is
/// for the service manager to notice: it runs `release-paused` then.
fn without_its_watchdog(agent: &mut Agent, controller: &Controller, guest: &Guest) -> Result<()> {
    agent.start()?;
    controller.wait_more_points("web", 1, SOON)?;
    for signal in [Signal::SIGKILL, Signal::SIGSTOP] {
        let old = agent.watchdogs()?;
        ensure!(old.len() == 1, "one watchdog: {old:?}");
        kill(old[0], signal)?;
        controller.wait_more_points("web", 2, SOON).with_context(|| format!("{signal} to the watchdog"))?;
        ensure!(agent.watchdogs()?.iter().any(|pid| !old.contains(pid)), "another watchdog took its place");
        goes_on(guest)?;
        if signal == Signal::SIGSTOP {
            kill(old[0], Signal::SIGCONT)?;
        }
    }
    agent.kill9()?;
    agent.env = vec![("LIFEBOAT_STOP_AT".into(), "cut.stopped".into())];
    agent.start()?;
    agent.wait_frozen(SOON)?;
    for pid in agent.watchdogs()? {
        kill(pid, Signal::SIGKILL)?;
    }
    agent.kill9()?;
    let state = guest.state()?;
    agent.command()?.arg("release-paused").run()?;
    // The watchdog may have been quicker than we were.
    ensure!(["paused", "running"].contains(&state.as_str()), "{state}");
    goes_on(guest)?;
    // An operator's pause is not ours to end, even where a marker says that we had one.
    guest.suspend()?;
    let markers = guest.site().dir("agent")?.join("run/paused");
    fs::create_dir_all(&markers)?;
    let uuid = guest.site().virsh(["domuuid", "web"])?.trim().to_owned();
    fs::write(markers.join(&uuid), "left behind")?;
    agent.command()?.arg("release-paused").run()?;
    ensure!(guest.state()? == "paused", "an operator's pause was ended");
    guest.resume()?;
    Ok(())
}

/// By QEMU's own record no pause was longer than its limit, but for what the machine itself kept everybody waiting. The
/// silences on the console are shown beside it: on a busy machine an emulated guest is slow by itself.
fn bounded(what: &str, times: u64, witness: &Stillness, quiet: &Verdict) -> Result<()> {
    let seen = witness.verdict();
    eprintln!("{what} {times} times: {seen}");
    let late = seen.lateness.max(quiet.lateness);
    let longest = seen.pauses.first().context("there were pauses")?;
    ensure!(*longest <= MAX_PAUSE + late, "{what}: the guest stood for {longest:?}; {seen}");
    Ok(())
}

/// The guest runs, and proves it.
fn goes_on(guest: &Guest) -> Result<()> {
    let then = guest.last().context("it ticked before")?.tick;
    let report = guest.wait_for_tick(then + 5, SOON)?;
    ensure!(report.unharmed(), "{report:?}");
    Ok(())
}
