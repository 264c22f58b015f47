//! A database in a protected guest: whichever point it is restored to, it goes on, is whole, and lacks nothing that it had
//! said was committed. `LIFEBOAT_CONTINUOUS_POINTS` says how many points are cut; 10 unless said.

use anyhow::{Context, Result, ensure};
use rig::{
    Console, DiskFormat, Rig,
    database::{Testimony, furnish, start, wait},
    eventually,
    product::{Agent, Controller, Held, id, small},
};
use serde_json::Value;
use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread::sleep,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const PACE: &str = "[[vm]]\nname = \"bank\"\ninterval = \"1s\"\nmax_pause = \"10s\"\n";

/// Goal: what a database's users care about. Method: a guest whose database commits all the time, and is checked all the
/// time, by its own means, read from the disk; points of it with memory, then without; its site is lost. The first, a
/// middle and the newest point with memory are failed over to, where the same run of the database goes on with the next
/// transaction; and the newest without, where it recovers as after a power cut. In each the database's own integrity
/// check is clean, and what the guest had said was committed before that point was cut, and nothing that came later, is
/// there.
#[test]
fn a_database_goes_on_whole_and_complete_from_any_point() -> Result<()> {
    let rig = Rig::new("database")?;
    let (a, b, _link) = rig.pair()?;
    [&a, &b].into_iter().try_for_each(furnish)?;
    let mut controller = Controller::running(&b)?;
    let guest = start(&a, &small("bank").disk(DiskFormat::Raw, 64))?;
    wait(&guest, BOOT, "the database to work", |said| said.newest_commit() > 5 && !said.checks.is_empty())?;

    let ended = AtomicBool::new(false);
    let (points, heard) = std::thread::scope(|scope| {
        let listener = scope.spawn(|| listen(guest.console(), &ended));
        let points = points_with_and_without_memory(&a, &controller);
        a.power_cut();
        ended.store(true, Ordering::Relaxed);
        (points, listener.join())
    });
    let ((with, without), heard) = (points?, heard.map_err(|_| anyhow::anyhow!("the listener panicked"))?);
    let source = Testimony::of(guest.console());
    source.unharmed().context("the source itself")?;
    let boot = source.boots.first().context("it said its boot")?;
    eprintln!(
        "{} points with memory, {} without; {} transfers and {} checks at the source",
        with.len(),
        without.len(),
        source.newest_commit(),
        source.checks.len()
    );

    let held = Held::by(&mut controller, rig.folder())?;
    let all = [with.as_slice(), without.as_slice()].concat();
    for at in [0, with.len() / 2, with.len() - 1, all.len() - 1] {
        let (point, memory) = (id(&all[at]), at < with.len());
        // What is said at the source when the next point is cut was said, or not, when this one was.
        let after = all.get(at + 1).map(cut_at).transpose()?;
        let committed = Committed::around(&heard, cut_at(&all[at])?, after, source.newest_commit());
        let replica = held.failover(&mut controller, "bank", &point)?;
        let said = wait(&replica, SOON, "the restored database to commit and to be checked", |said| {
            said.checks.len() >= 3 && said.commits.len() >= 10
        });
        let said = said.with_context(|| format!("point {} of {}", at + 1, all.len()))?;
        // The first check's view may be older than the point; the last one began after it.
        let (first, check, last) = (said.commits[0], &said.checks[0], &said.checks[said.checks.len() - 1]);
        ensure!(said.boots.len() == 1 && (said.boots[0] == *boot) == memory, "{:?}, {boot}", said.boots);
        ensure!(committed.precede(first), "it went on with {first}: {committed:?}");
        ensure!(last.newest >= committed.before, "{last:?} lacks some: {committed:?}");
        // The first check after a boot precedes any transfer.
        ensure!(memory || (check.number == 1 && check.newest + 1 == first), "{check:?}, then {first}");
        eprintln!("point {} of {} went on with {first}: {committed:?}, {last:?}", at + 1, all.len());
        held.discard(&mut controller, &replica)?;
    }
    Ok(())
}

/// The points that the site holds, the oldest first.
fn points_with_and_without_memory(
    a: &rig::Site,
    controller: &Controller,
) -> Result<(Vec<Value>, Vec<Value>)> {
    let wanted = match std::env::var("LIFEBOAT_CONTINUOUS_POINTS") {
        Ok(text) => text.parse().with_context(|| format!("LIFEBOAT_CONTINUOUS_POINTS={text}"))?,
        Err(_) => 10,
    };
    let mut agent = Agent::install(a, controller, PACE)?;
    agent.start()?;
    let soon = SOON.max(Duration::from_secs(5) * u32::try_from(wanted)?);
    controller.wait_points("bank", wanted, soon)?;
    eprintln!("memory by {}", agent.vm("bank")?["memory"]);
    agent.stop()?;
    agent.configure(&controller.address(), &format!("{PACE}memory = \"off\"\n"))?;
    agent.start()?;
    let points = eventually(SOON, "points without memory", || {
        let points = controller.points("bank")?;
        Ok((points.iter().filter(|point| point["has_memory"] == false).count() >= 2).then_some(points))
    })?;
    let (with, without): (Vec<_>, _) = points.into_iter().partition(|point| point["has_memory"] == true);
    ensure!(with.len() >= wanted, "{} points with memory", with.len());
    Ok((with, without))
}

/// What had been said of commits around the instant of a point.
#[derive(Debug)]
struct Committed {
    /// Surely committed before it.
    before: u64,
    /// The last that may have been.
    at_most: u64,
}

impl Committed {
    fn around(heard: &[(u64, u64)], cut: u64, next: Option<u64>, last: u64) -> Self {
        let before = heard.iter().rev().find(|(at, _)| *at < cut).map_or(0, |(_, commit)| *commit);
        let after = next.and_then(|next| heard.iter().find(|(at, _)| *at >= next)).map(|(_, commit)| *commit);
        // One more may be committed and not yet said.
        Self { before, at_most: after.unwrap_or(last) + 1 }
    }

    /// Is `first` the transfer after them? That of which the line was torn by the cut is not heard of at either site.
    fn precede(&self, first: u64) -> bool {
        first > self.before && first <= self.at_most + 2
    }
}

/// Which commit was the last that the guest had said, and when that was so, in milliseconds since 1970.
fn listen(console: &Console, ended: &AtomicBool) -> Vec<(u64, u64)> {
    let mut heard = Vec::new();
    while !ended.load(Ordering::Relaxed) {
        let commit = Testimony::of(console).newest_commit();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        heard.push((u64::try_from(now.as_millis()).unwrap_or(u64::MAX), commit));
        sleep(Duration::from_millis(20));
    }
    heard
}

fn cut_at(point: &Value) -> Result<u64> {
    point["cut_at"].as_u64().with_context(|| format!("a point without cut_at: {point}"))
}
