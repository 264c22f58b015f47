//! What happens, in order: two sites, a guest at work, points, a power cut, a failover, and a long look at the replica.
//! Says what it does as it goes. Calls the rig and the products' commands only, as an operator would.

use crate::{
    host::Host,
    interrupt,
    judge::{self, Found, Lost, since},
    life,
    story::{Act, Consoles, Event, GuestFacts, LinkFacts, Point, Protection, SiteFacts, Story},
    witness::{Sighting, Witness, now_ms},
};
use anyhow::{Context, Result};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use rig::{
    DiskFormat, Guest, GuestSpec, Rig, Shape, Site,
    product::{Agent, Controller},
};
use std::{sync::Arc, thread, time::Duration};

pub fn play() -> Result<Story> {
    let rig = Arc::new(Rig::new("demo")?);
    interrupt::takes_down(Arc::downgrade(&rig));
    let mut scene = Scene::set(&rig)?;
    let protection = scene.protect()?;
    let lost = scene.cut_the_power()?;
    let found = scene.fail_over()?;
    let acts = life::play(&rig, &mut |what| scene.note(now_ms(), what))?;
    scene.tell(protection, lost, found, acts)
}

/// Who is on stage.
struct Scene {
    a: Site,
    b: Site,
    link: rig::Link,
    controller: Controller,
    guest: Guest,
    spec: GuestSpec,
    at_a: Witness,
    agent: Option<Agent>,
    host: Host,
    began_ms: u64,
    events: Vec<Event>,
}

impl Scene {
    fn set(rig: &Rig) -> Result<Self> {
        let began_ms = now_ms();
        let (a, b) = (rig.site("A")?, rig.site("B")?);
        let link = rig.link(&a, &b, Shape::mbit(LINK_MBIT))?;
        let controller = Controller::running(&b)?;
        let spec = GuestSpec::new(NAME)
            .memory_mib(MEMORY_MIB)
            .disk(DiskFormat::Raw, DISK_MIB)
            .disk(DiskFormat::Qcow2, DISK_MIB)
            .pattern_mib(PATTERN_MIB)
            .dirty_kib(DIRTY_KIB);
        let guest = a.define_and_start(&spec)?;
        let at_a = Witness::of(guest.console());
        let host = Host::look(rig.accel(), &a);
        let events = Vec::new();
        let mut scene =
            Self { a, b, link, controller, guest, spec, at_a, agent: None, host, began_ms, events };
        scene.note(now_ms(), "two sites are up; the guest `web` boots at A");
        let first = scene.guest.wait_for_tick(3, BOOT)?;
        scene.note(
            now_ms(),
            format!("`web` is at work: it changes memory and writes to {} disks", first.disks),
        );
        Ok(scene)
    }

    /// An agent at A, and points at B.
    fn protect(&mut self) -> Result<Protection> {
        let interval = format!("{}ms", INTERVAL.as_millis());
        let mut agent = Agent::protecting(&self.a, &self.controller, &[NAME], &interval)?;
        self.note(
            now_ms(),
            format!("the agent at A protects it: a point each {:.0} s", INTERVAL.as_secs_f64()),
        );
        let first = self.controller.wait_points(NAME, 1, SEED)?;
        let committed = first.first().and_then(|point| point["committed_at"].as_u64());
        self.note(committed.unwrap_or_else(now_ms), "B holds the first point: all memory, both disks");
        let points = self.controller.wait_points(NAME, POINTS, PATIENCE)?;
        self.note(now_ms(), format!("B holds {} points; from the second on, of changes only", points.len()));
        // The power fails when it likes, not just after a point.
        thread::sleep(INTERVAL.mul_f64(SmallRng::from_os_rng().random_range(0.0..1.0)));
        let memory_engine = agent.vm(NAME)?["memory"].as_str().unwrap_or("none").to_owned();
        let (agent_rss_kib, agent_peak_rss_kib) = agent.process()?.memory_kib()?;
        self.agent = Some(agent);
        let interval_ms = INTERVAL.as_millis() as u64;
        Ok(Protection { interval_ms, memory_engine, agent_rss_kib, agent_peak_rss_kib })
    }

    fn cut_the_power(&mut self) -> Result<Lost> {
        let carried = self.link.bytes()?.a_to_b;
        let power_cut_ms = now_ms();
        self.a.power_cut();
        self.note(power_cut_ms, "POWER CUT at site A: host, agent and guest are gone");
        let mut agent = self.agent.take().context("the agent was started")?;
        let agent_log = agent.process()?.log();
        // What the guest wrote before is in the file by now; let the witness read to its end.
        let last = self.guest.last().context("the guest at A has said nothing")?.tick;
        rig::eventually(SOON, "the end of the console of A", || {
            Ok(self.at_a.sightings().last().filter(|seen| seen.report.tick >= last).map(drop))
        })?;
        let last_words = self.at_a.sightings();
        Ok(Lost {
            power_cut_ms,
            last_words,
            complaints: self.guest.console().complaints(),
            agent_log,
            carried,
        })
    }

    fn fail_over(&mut self) -> Result<Found> {
        let replica = self.b.guest(NAME)?;
        let at_b = Witness::of(replica.console());
        let command_ms = now_ms();
        self.note(command_ms, format!("lifeboat failover {NAME} --emergency"));
        let report = self.controller.failover(NAME, "latest")?;
        let running_ms = report["running_at"].as_u64().context("the failover report has no `running_at`")?;
        self.note(running_ms, "libvirt at B says that the replica runs");
        let first = at_b.wait_first(FIRST_WORD)?;
        self.note(first.at_ms, format!("the replica's first word: tick {}", first.report.tick));
        let checked = replica.wait_full_check(CHECK);
        match &checked {
            Ok(seen) => {
                let errors = seen.mem_errors + seen.disk_errors;
                self.note(now_ms(), format!("it has checked all its memory and both disks: {errors} errors"));
            }
            Err(_) => self.note(now_ms(), "it has NOT checked everything in time"),
        }
        let complaints = replica.console().complaints();
        Ok(Found { command_ms, report, words: at_b.sightings(), complaints, checked })
    }

    fn tell(mut self, protection: Protection, lost: Lost, found: Found, story: Vec<Act>) -> Result<Story> {
        let site_log = self.controller.process()?.log();
        let stored = self.controller.points(NAME)?;
        let points: Vec<Point> =
            stored.iter().map(|point| Point::read(point, &lost.agent_log, &site_log)).collect();
        let (rss, peak) = self.controller.process()?.memory_kib()?;
        let site = SiteFacts {
            controller_rss_kib: rss,
            controller_peak_rss_kib: peak,
            stored_bytes: points.iter().map(|point| point.stored_bytes).sum(),
        };
        let failover = judge::failover(&points, &lost, &found, &site_log)?;
        let mut checks = judge::checks(&points, &failover, &lost, &found);
        checks.push(judge::group(&story));
        let words = |seen: &[Sighting]| seen.iter().map(|seen| seen.line.clone()).collect::<Vec<_>>();
        let before = lost.last_words.len().saturating_sub(LINES);
        Ok(Story {
            unharmed: checks.iter().all(|check| check.holds),
            checks,
            console: Consoles {
                last_before: words(&lost.last_words[before..]),
                first_after: words(&found.words[..found.words.len().min(LINES)]),
            },
            points,
            failover,
            story,
            events: self.events,
            guest: GuestFacts {
                name: NAME.to_owned(),
                memory_mib: self.spec.memory_mib,
                disks: self
                    .spec
                    .disks
                    .iter()
                    .map(|disk| format!("{} {} MiB", disk.format, disk.size_mib))
                    .collect(),
                boot_id: lost.last_words.last().map_or_else(String::new, |seen| seen.report.boot.clone()),
            },
            protection,
            site,
            link: LinkFacts { rate_mbit: LINK_MBIT, a_to_b_bytes: lost.carried },
            host: self.host,
        })
    }

    fn note(&mut self, at_ms: u64, what: impl Into<String>) {
        let event = Event { at_s: since(self.began_ms, at_ms), what: what.into() };
        show(event.at_s, &event.what);
        self.events.push(event);
    }
}

fn show(at_s: f64, what: &str) {
    eprintln!("{at_s:7.1} s  {what}");
}

const NAME: &str = "web";
const LINK_MBIT: u64 = 1000;
const MEMORY_MIB: u64 = 384;
const PATTERN_MIB: u64 = 64;
/// Each tick, ten of them a second at the most.
const DIRTY_KIB: u64 = 512;
const DISK_MIB: u64 = 256;
const INTERVAL: Duration = Duration::from_secs(2);
const POINTS: usize = 6;
/// Console lines shown of each side.
const LINES: usize = 3;
const BOOT: Duration = Duration::from_secs(120);
const SEED: Duration = Duration::from_secs(120);
const PATIENCE: Duration = Duration::from_secs(120);
const FIRST_WORD: Duration = Duration::from_secs(60);
const CHECK: Duration = Duration::from_secs(180);
const SOON: Duration = Duration::from_secs(10);
