//! The line between the sites: it may break, be slow, or carry what somebody else sends.

use anyhow::{Context, Result, ensure};
use rig::{
    DiskFormat, Rig, Shape, Site, eventually,
    product::{Agent, Controller, id, replica_unharmed, small},
};
use std::{
    net::{Ipv4Addr, UdpSocket},
    time::{Duration, Instant},
};

const BOOT: Duration = Duration::from_secs(90);
const SOON: Duration = Duration::from_secs(120);
const WEB: &str = "[[vm]]\nname = \"web\"\ninterval = \"500ms\"";

/// Goal: a line that breaks in mid point costs nothing but time. Method: much changed memory over a slow line, cut in
/// silence until both ends have noticed, and restored. The agent is restarted the second time.
#[test]
fn a_link_cut_in_mid_point_loses_nothing_that_was_acknowledged() -> Result<()> {
    let rig = Rig::new("link-cut")?;
    let (a, b, link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest =
        a.define_and_start(&small("web").disk(DiskFormat::Qcow2, 32).dirty_kib(2048).disk_writes(32))?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::install(&a, &controller, WEB)?;
    agent.start()?;
    controller.wait_points("web", 2, SOON)?;
    link.reshape(Shape::mbit(4))?;
    for restarted in [false, true] {
        let committed = controller.points("web")?.len();
        let sent = link.bytes()?.a_to_b;
        eventually(SOON, "a point to be half way", || {
            Ok((link.bytes()?.a_to_b > sent + 600_000).then_some(()))
        })?;
        link.cut()?;
        let held = controller.points("web")?;
        ensure!(held.len() >= committed, "{held:?}");
        if restarted {
            agent.kill9()?;
            agent.start()?;
            agent.wait_state("web", "connecting", SOON)?;
        } else {
            let row = agent.wait_state("web", "degraded", SOON)?;
            assert!(row["reason"].as_str().is_some_and(|why| why.contains("no link")), "{row}");
        }
        let then = guest.last().context("it ticks")?.tick;
        guest.wait_for_tick(then + 10, SOON)?;
        link.reshape(Shape::default())?;
        let now = controller.wait_points("web", held.len() + 2, SOON)?;
        for told in agent.acknowledged()? {
            ensure!(now.iter().any(|point| id(point) == told && point["state"] == "ok"), "{told} is lost");
        }
        agent.wait_state("web", "protected", SOON)?;
        link.reshape(Shape::mbit(4))?;
    }
    assert_eq!(controller.json(&["verify"])?["findings"], serde_json::json!([]));
    let before = guest.last().context("it ticks")?;
    a.power_cut();
    controller.failover("web", "latest")?;
    replica_unharmed(&b.guest("web")?, &before.boot, 0, SOON)?;
    Ok(())
}

/// Goal: `limit` is the most that the agent takes of the line. Method: what the link carried of a first point.
#[test]
fn the_agent_takes_no_more_of_the_line_than_it_was_given() -> Result<()> {
    let rig = Rig::new("limit")?;
    let (a, b, link) = rig.pair()?;
    let controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web"))?;
    guest.wait_for_tick(3, BOOT)?;
    let mut agent = Agent::install(&a, &controller, &format!("limit = \"8Mbit\"\n{WEB}"))?;
    let reaches = |bytes: u64| {
        eventually(SOON, "the link to carry a point", || Ok((link.bytes()?.a_to_b >= bytes).then_some(())))
    };
    agent.start()?;
    reaches(500_000)?; // what may go at once has gone
    let (began, before) = (Instant::now(), link.bytes()?.a_to_b);
    reaches(before + 5_000_000)?;
    let (took, carried) = (began.elapsed().as_secs_f64(), link.bytes()?.a_to_b - before);
    assert!(carried as f64 / took <= 1.3 * 1_000_000.0, "{carried} bytes in {took} s");
    Ok(())
}

/// Goal: strangers get nothing and cost nothing. Method: an agent with another site's certificate, and random bytes in
/// ten thousand datagrams; an agent that belongs here works before and after them.
#[test]
fn strangers_are_refused_without_costing_memory_and_friends_are_not() -> Result<()> {
    let rig = Rig::new("strangers")?;
    let (a, b, _link) = rig.pair()?;
    let mut controller = Controller::running(&b)?;
    let guest = a.define_and_start(&small("web"))?;
    guest.wait_for_tick(3, BOOT)?;
    let mut friend = Agent::install(&a, &controller, WEB)?;
    friend.start()?;
    controller.wait_points("web", 3, SOON)?;
    friend.stop()?;
    // Between the two measures only strangers knock: what a friend takes is another matter.
    let (before, _) = controller.process()?.memory_kib()?;
    let said = controller.process()?.log().lines().count();
    let points = controller.points("web")?.len();

    let mut elsewhere = Controller::running(&a)?;
    let mut stranger = Agent::install_in("stranger", &a, &elsewhere, WEB)?;
    elsewhere.stop()?;
    stranger.configure(&controller.address(), WEB)?;
    stranger.start()?;
    let link = eventually(SOON, "the stranger to be turned away", || {
        let link = stranger.status().ok().map(|status| status["link"].to_string()).unwrap_or_default();
        Ok(link.contains("certificate").then_some(link))
    });
    link.with_context(|| format!("{:?}", stranger.status()))?;
    stranger.kill9()?;
    assert_eq!(controller.points("web")?.len(), points);

    shout(&a, (b.address(), 7443))?;
    let (after, _) = controller.process()?.memory_kib()?;
    assert!(after < before + (16 << 10), "from {before} KiB to {after} KiB");

    friend.start()?;
    controller.wait_more_points("web", 3, SOON)?;
    friend.wait_state("web", "protected", SOON)?;
    let log = controller.process()?.log();
    let refusals = log.lines().skip(said).filter(|line| line.contains("WARN")).count();
    assert!(refusals <= 20, "{refusals} lines of complaint:\n{log}");
    Ok(())
}

/// Ten thousand datagrams of random bytes; some look like the start of a connection, with a version or without.
fn shout(from: &Site, to: (Ipv4Addr, u16)) -> Result<()> {
    let socket = from.in_network(|| UdpSocket::bind((from.address(), 0)))??;
    let mut noise = Noise(0x1234_5678_9abc_def1);
    for at in 0..10_000_usize {
        let mut datagram = vec![0; 1 + at % 1400];
        datagram.fill_with(|| noise.next());
        if at % 2 == 0 {
            datagram[0] |= 0xc0;
        }
        if let (0, Some(version)) = (at % 4, datagram.get_mut(1..5)) {
            version.copy_from_slice(&[0, 0, 0, 1]);
        }
        socket.send_to(&datagram, to)?;
    }
    Ok(())
}

/// Bytes that mean nothing, the same in every run.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u8 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.to_le_bytes()[3]
    }
}
