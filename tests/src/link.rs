//! The WAN: a veth pair between two sites, shaped, cut and counted.
//! A cut link swallows packets without a word to either end, as a broken line does. Lives in the sites'
//! namespaces only, so it ends with them; after a site got its power back, [`Link::plug`] connects it
//! again. Calls `site`.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::site::Site;

/// What the line can do, each way. The default is a line without limits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Bits per second.
    pub rate_bit: Option<u64>,
    /// On the way from one end to the other; kernels without netem can't.
    pub delay: Option<Duration>,
}

impl Shape {
    pub fn mbit(rate: u64) -> Self {
        Self { rate_bit: Some(rate * 1_000_000), delay: None }
    }

    pub fn delay_ms(self, ms: u64) -> Self {
        Self { delay: Some(Duration::from_millis(ms)), ..self }
    }

    /// The words `tc` wants.
    fn discipline(&self) -> Vec<String> {
        let rate = |bits: u64| format!("rate {bits}bit");
        let words = match (self.delay, self.rate_bit) {
            (Some(delay), bits) => {
                format!(
                    "netem limit {NETEM_PACKETS} delay {}us {}",
                    delay.as_micros(),
                    bits.map(rate).unwrap_or_default()
                )
            }
            (None, Some(bits)) => {
                // What 10 ms carry, and at least one large segment.
                let burst = (bits / 8 / 100).max(BURST_MIN);
                format!("tbf {} burst {burst}b latency 100ms", rate(bits))
            }
            (None, None) => "pfifo limit 1000".to_owned(),
        };
        words.split_whitespace().map(str::to_owned).collect()
    }
}

/// Bytes that left each end since the link was plugged in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    pub a_to_b: u64,
    pub b_to_a: u64,
}

pub struct Link {
    a: Site,
    b: Site,
    shape: Mutex<Shape>,
}

impl Link {
    pub(crate) fn new(a: &Site, b: &Site, shape: Shape) -> Result<Self> {
        let link = Self { a: a.clone(), b: b.clone(), shape: Mutex::new(shape) };
        if let (Some(_), false) = (shape.delay, has_netem(a)?) {
            eprintln!(
                "rig: this kernel has no netem: the link from {} to {} has no delay",
                a.name(),
                b.name()
            );
            *link.shape.lock().unwrap_or_else(PoisonError::into_inner) = Shape { delay: None, ..shape };
        }
        link.plug()?;
        Ok(link)
    }

    /// Connects the two sites (again): for a site that was without power, or is new.
    pub fn plug(&self) -> Result<()> {
        let _ = self.a.command("ip").args(["link", "del", &self.device(&self.b)]).output()?; // there may be none
        let peer = self.b.pid()?.to_string();
        let (at_a, at_b) = (self.device(&self.b), self.device(&self.a));
        // The peer's process id is one of the host's, so this `ip` must see the host's /proc.
        crate::site::in_net_of(
            self.a.pid()?,
            &["ip", "link", "add", &at_a, "type", "veth", "peer", "name", &at_b, "netns", &peer],
        )?;
        for (site, device, other) in [(&self.a, &at_a, &self.b), (&self.b, &at_b, &self.a)] {
            let route = format!("{}/32", other.address());
            site.command("ip")
                .args(["addr", "replace", &format!("{}/32", site.address()), "peer", &route, "dev", device])
                .run()?;
            site.command("ip").args(["link", "set", device, "up"]).run()?;
        }
        self.restore()
    }

    /// From now on every packet is lost, both ways, silently.
    pub fn cut(&self) -> Result<()> {
        self.each_end(&["pfifo", "limit", "0"].map(str::to_owned))
    }

    /// Packets pass again, as the shape says.
    pub fn restore(&self) -> Result<()> {
        self.each_end(&self.shape().discipline())
    }

    /// Gives the line another shape.
    pub fn reshape(&self, shape: Shape) -> Result<()> {
        *self.shape.lock().unwrap_or_else(PoisonError::into_inner) = shape;
        self.restore()
    }

    /// The shape in effect: without delay if this kernel has none.
    pub fn shape(&self) -> Shape {
        *self.shape.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn bytes(&self) -> Result<Carried> {
        Ok(Carried { a_to_b: self.sent(&self.a, &self.b)?, b_to_a: self.sent(&self.b, &self.a)? })
    }

    fn sent(&self, from: &Site, to: &Site) -> Result<u64> {
        let (pid, device) = (from.pid()?, self.device(to));
        let table =
            std::fs::read_to_string(format!("/proc/{pid}/net/dev")).context("reading interface counters")?;
        let line = table.lines().find_map(|line| line.trim().strip_prefix(&device)?.strip_prefix(':'));
        // Eight columns of what came in, then bytes that went out.
        let bytes = line.and_then(|line| line.split_whitespace().nth(8)?.parse().ok());
        bytes.with_context(|| format!("site {} has no interface {device}", from.name()))
    }

    fn each_end(&self, discipline: &[String]) -> Result<()> {
        for (site, device) in [(&self.a, self.device(&self.b)), (&self.b, self.device(&self.a))] {
            site.command("tc").args(["qdisc", "replace", "dev", &device, "root"]).args(discipline).run()?;
        }
        Ok(())
    }

    /// An interface is named after the site it leads to.
    fn device(&self, to: &Site) -> String {
        format!("to-{}", to.name())
    }
}

fn has_netem(site: &Site) -> Result<bool> {
    let out = site
        .command("tc")
        .args(["qdisc", "replace", "dev", "lo", "root", "netem", "delay", "1us"])
        .output()?;
    if out.status.success() {
        site.command("tc").args(["qdisc", "del", "dev", "lo", "root"]).run()?;
    }
    Ok(out.status.success())
}

const NETEM_PACKETS: u32 = 20_000;
const BURST_MIN: u64 = 64 << 10;
